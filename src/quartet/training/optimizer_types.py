"""The types of optimizers: what steps a parameter, and the moments that are kept of it.

Every type steps the matrices of a model's blocks in its own way. All else (embeddings, heads,
norms, biases) is AdamW's with float32 moments under each of them: rows of an embedding get
gradients rarely, which coarse moments do not stand (Dettmers et al. 2022), and Muon is
for matrices that map hidden states to hidden states (Jordan et al. 2024).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quartet.distributed.sharding import is_sharded
from quartet.errors import QuartetError
from quartet.tensors import Tensor, torch

if TYPE_CHECKING:
    from quartet.training.optim import OptimizerConfig

OptimizerType = Literal["adamw", "adamw_8bit", "muon"]


class OptimizerError(QuartetError, ValueError):
    """An optimizer that cannot be used here; the message says why."""


MUON_MOMENTUM = 0.95
"""As in Jordan et al. 2024, with Nesterov's look ahead."""


@dataclass(frozen=True)
class Traits:
    """What one optimizer does, and what it needs."""

    make: "Callable[[Sequence[Tensor], OptimizerConfig], Any]"
    """Returns a `torch.optim.Optimizer` of some parameters."""
    fresh: Callable[[Any, Tensor], dict[str, Any]]
    """Returns the moments of a parameter as they are before its first step, given the optimizer."""
    bytes_per_parameter: float
    """Bytes of moments."""
    takes_sharded: bool = True
    """Whether a rank can hold a part of a parameter (DTensor)."""
    takes_adapters: bool = True
    """Whether it is of use for the thin matrices of a LoRA adapter."""
    package: str | None = None
    """The package that it needs, which is also the extra that installs it."""
    constants: frozenset[str] = frozenset()
    """Tensors among the moments that are always the same, and not saved."""


def _adamw(parameters: Sequence[Tensor], config: "OptimizerConfig") -> Any:
    """Return torch's AdamW."""
    # torch updates a group of parameters at once, and cannot mix sharded and plain ones.
    groups = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)]
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fuses(parameters) or None,
    )


def fuses(parameters: Sequence[Tensor]) -> bool:
    """Return whether one kernel of AdamW steps a whole group, without the temporaries of torch's
    other ways."""
    return all(p.device.type == "cuda" for p in parameters)


def _fresh_adamw(adamw: Any, parameter: Tensor) -> dict[str, Any]:
    # Adam counts steps on the CPU, but where one kernel does all, on the device.
    device = parameter.device if adamw.defaults["fused"] else "cpu"
    return {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros_like(parameter.data),
        "exp_avg_sq": torch.zeros_like(parameter.data),
    }


def _adamw_8bit(parameters: Sequence[Tensor], config: "OptimizerConfig") -> Any:
    """Return AdamW with moments of 8 bits, in blocks of 256 numbers that share a float32 scale
    (Dettmers et al. 2022). Matrices of less than 4,096 numbers keep float32 moments."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        list(parameters),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def _fresh_adamw_8bit(adamw: Any, parameter: Tensor) -> dict[str, Any]:
    [group] = adamw.param_groups
    index = next(i for i, p in enumerate(group["params"]) if p is parameter)
    adamw.init_state(group, parameter, 0, index)
    return dict(adamw.state[parameter])


def _muon(parameters: Sequence[Tensor], config: "OptimizerConfig") -> Any:
    """Return torch's Muon: W ← (1 − lr · λ) W − 0.2 √max(n, m) · lr · O for a matrix of n × m,
    where O is about the nearest semi-orthogonal matrix to the momentum, by five Newton–Schulz
    iterations in bfloat16 (Jordan et al. 2024).

    The root mean square of O is 1 / √max(n, m), and that of AdamW's steps is 0.2 to 0.4 of lr; so
    the factor makes one `lr` mean steps of the same size under both (Liu et al. 2025, "Muon is
    Scalable for LLM Training", arXiv 2502.16982, section 2.2).
    """
    return torch.optim.Muon(
        list(parameters),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=MUON_MOMENTUM,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )


def _fresh_muon(_: Any, parameter: Tensor) -> dict[str, Any]:
    return {"momentum_buffer": torch.zeros_like(parameter.data)}


ADAMW = Traits(_adamw, _fresh_adamw, bytes_per_parameter=8.0)

TYPES: Mapping[OptimizerType, Traits] = {
    "adamw": ADAMW,
    "adamw_8bit": Traits(
        _adamw_8bit,
        _fresh_adamw_8bit,
        bytes_per_parameter=2 * (1 + 4 / 256),
        takes_sharded=False,
        package="bitsandbytes",
        constants=frozenset({"qmap1", "qmap2"}),
    ),
    "muon": Traits(_muon, _fresh_muon, bytes_per_parameter=4.0, takes_adapters=False),
}
"""What steps the matrices of blocks, by type."""
