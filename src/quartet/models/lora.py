"""The settings of a LoRA adapter. This file imports neither torch nor peft, so that a config can be
read without them."""

from typing import Literal

from quartet.parts import Field, part


@part
class Lora:
    """W x + (alpha / rank) · B A x, with A of `rank` rows and B, which starts at 0, of `rank`
    columns; W stays as it is (Hu et al. 2022)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(
        default=16,
        ge=1,
        description="The rows of A and columns of B: more can learn more, and take more "
        "memory. Typical: 8 to 64.",
    )
    alpha: float = Field(
        default=32.0,
        gt=0,
        description="The weight of B A x, times rank. Typical: twice the rank.",
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description='Names of the layers, such as ["q_proj", "v_proj"]; or "all-linear": all but '
        "the head.",
    )

    def parameters(
        self, hidden: int, layers: int, intermediate: int | None, kv_share: float = 1.0
    ) -> int:
        """Return the number of parameters of adapters on all linear layers of a Llama model, or,
        with `intermediate=None`, on those of attention."""
        kv = int(hidden * kv_share)
        per_layer = 2 * (hidden + hidden) + 2 * (hidden + kv)
        if intermediate is not None:
            per_layer += 3 * (hidden + intermediate)
        return layers * self.rank * per_layer
