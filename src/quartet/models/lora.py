"""What an adapter is, as a run's file says it. Known without torch and without peft."""

from typing import Literal

from quartet.parts import Field, part


@part
class Lora:
    """W x + (alpha / rank) · B A x, with A of `rank` rows and B, which starts at 0, of `rank`
    columns; W stays as it is (Hu et al. 2022)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(
        default=32.0,
        gt=0,
        description="Twice the rank is usual: what B A x counts for, times rank.",
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description='Names of the layers, such as ["q_proj", "v_proj"]; or "all-linear": all but '
        "the head.",
    )

    def parameters(self, hidden: int, layers: int, intermediate: int, kv_share: float = 1.0) -> int:
        """How many numbers it adds to a model of the Llama family, on all of its linear layers."""
        kv = int(hidden * kv_share)
        per_layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + intermediate)
        return layers * self.rank * per_layer
