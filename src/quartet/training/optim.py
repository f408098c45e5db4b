"""Optimizers and their schedules."""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from quartet.distributed.sharding import copy_saved, full_tensor, is_sharded
from quartet.errors import StateMisfit
from quartet.io.threads import Abandoned
from quartet.parts import Field, OrInf, part
from quartet.tensors import Tensor, torch
from quartet.training.optimizer_types import (
    ADAMW,
    TYPES,
    OptimizerError,
    OptimizerType,
    Traits,
    fuses,
)

MAX_SKIPPED = 10
"""Optimizer steps that `on_nonfinite = "skip"` leaves out; after more the run stops."""


@part
class OptimizerConfig:
    """The optimizer, the schedule of its learning rate, and the bound on the gradient."""

    lr: float = Field(default=1e-5, gt=0, description="The highest learning rate of the schedule.")
    optimizer: OptimizerType = Field(
        default="adamw",
        description='What steps the matrices of blocks: "adamw"; "adamw_8bit", whose moments take '
        'a quarter of the memory; or "muon". All else is AdamW\'s.',
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate goes on after the warm-up."
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="The share of lr that a falling schedule falls to."
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps over which the rate rises from 0."
    )
    warmup_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The same as a share of the stage's optimizer steps. Typical: 0.03.",
    )
    max_grad_norm: OrInf = Field(
        default=1.0, gt=0, description="Longer gradients are scaled down to this; inf leaves them."
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="The share of each weight, times the learning rate, that a step takes "
        "off; ≥ 0. Typical: 0 to 0.1.",
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95),
        description="Adam's decay rates of the means of gradients and of their squares, "
        "from 0 to 1. Typical: [0.9, 0.95] to [0.9, 0.999].",
    )
    eps: float = Field(
        default=1e-8,
        gt=0,
        description="Adam's epsilon, which is added to the root of the mean square; > 0. "
        "Typical: 1e-8.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description='An update whose loss or gradient is not finite stops the run; "skip" leaves '
        "out ten.",
    )

    def factor(self, step: int, total: int) -> float:
        """Return the share of `lr` at optimizer step 0 … total − 1.

        It rises over the w steps of the warm-up, (step + 1) / (w + 1), and then stays at 1, or
        falls towards m = `min_lr_ratio`, which it would reach at step `total`. With
        x = (step − w) / (total − w) it is m + (1 − m) (1 − x) on the linear schedule, and
        m + (1 − m) (1 + cos πx) / 2 on the cosine one (Loshchilov & Hutter 2017, one cycle).

        Without warm-up, m = 0.2 and 4 steps, linear gives 1, 0.8, 0.6, 0.4.
        """
        warmup = self.warmup(total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        left = max(total - step, 0) / max(total - warmup, 1)
        height = (1 - math.cos(math.pi * left)) / 2 if self.schedule == "cosine" else left
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * height

    def warmup(self, total: int) -> int:
        """Return the steps of the warm-up: `warmup_steps`, or the smallest whole number that is not
        below `warmup_ratio` × total."""
        # 0.07 × 100 is 7.000000000000001 in floating point, and 7 steps are meant.
        return self.warmup_steps or math.ceil(self.warmup_ratio * total - 1e-9)

    @property
    def depends_on_total(self) -> bool:
        """Whether the rate at a step depends on how many steps there are in all."""
        return self.schedule != "constant" or self.warmup_ratio > 0


class Optimizer:
    """Steps some parameters, with gradient clipping and a schedule over `total_steps`."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        config: OptimizerConfig,
        total_steps: int,
        matrices: Iterable[Tensor] = (),
    ) -> None:
        """`matrices` are the weight matrices in the models' blocks, which types other than AdamW
        step in their own way; some of them may not be trained. Raises OptimizerError where such a
        type is given no matrix, or parameters in a form that it does not take."""
        self.parameters, self.config, self.total_steps = list(parameters), config, total_steps
        self.parts = _parts(self.parameters, config, {id(matrix) for matrix in matrices})
        self.is_fused = fuses(self.parameters)
        """Whether AdamW steps with one kernel for each group of parameters."""
        self.steps = 0
        self.skipped = 0
        """Steps that were left out because the loss or a gradient was not finite."""
        self.scale = 1.0
        """A factor of the learning rate. Each rollback of a run halves it."""
        self.counting = threading.RLock()
        """Held while a step is counted."""
        self.halted = False
        """Whether no further step may be taken: another thread saves the weights as they are."""

    @property
    def torch_optimizers(self) -> list[Any]:
        """The optimizers of torch's kind that do the steps; they hold the moments."""
        return [part.stepper for part in self.parts]

    def moments(self, parameter: Tensor) -> dict[str, Any]:
        """Return the moments of a parameter; none where no gradient has reached it."""
        return dict(self._part_of(parameter).stepper.state.get(parameter, {}))

    def _part_of(self, parameter: Tensor) -> "_Part":
        return next(part for part in self.parts if id(parameter) in part.ids)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.scale * self.config.lr * self.config.factor(self.steps, self.total_steps)

    def skip(self) -> bool:
        """Count a step with numbers that are not finite, and return whether it may be left out."""
        self.skipped += 1
        return self.config.on_nonfinite == "skip" and self.skipped <= MAX_SKIPPED

    def clip(self) -> float:
        """Scale the gradient down to `max_grad_norm`, and return its norm before that, which is not
        finite if any gradient is not."""
        if not any(map(is_sharded, self.parameters)):
            return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        # torch takes no norm over sharded and plain gradients together.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        kinds = [
            [g for g in gradients if is_sharded(g)],
            [g for g in gradients if not is_sharded(g)],
        ]
        norm = math.hypot(
            *(float(full_tensor(torch.nn.utils.get_total_norm(kind))) for kind in kinds if kind)
        )
        if math.isfinite(norm):
            scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def step(self) -> None:
        """Step at the scheduled learning rate, and clear the gradients. Raises `Abandoned` if the
        optimizer was halted."""
        for stepper in self.torch_optimizers:
            for group in stepper.param_groups:
                group["lr"] = self.lr
        # Counted before the weights change: an interruption in between must see that they may have.
        with self.counting:
            if self.halted:
                raise Abandoned
            self.steps += 1
        for stepper in self.torch_optimizers:
            stepper.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for stepper in self.torch_optimizers:
            stepper.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return the parameters themselves, the moments of each, and the counters."""
        return {
            "optimizer": self.config.optimizer,
            "parameters": self.parameters,
            "moments": [self._saved_moments(p) for p in self.parameters],
            "steps": self.steps,
            "skipped": self.skipped,
            "scale": self.scale,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises `StateMisfit` where the state is another type's or of other parameters, and
        ValueError where it is no state."""
        saved_type = state.get("optimizer", "adamw")  # which was the only one once
        if saved_type != self.config.optimizer:
            raise StateMisfit(
                f'its optimizer is "{saved_type}", and "{self.config.optimizer}" cannot go on from '
                "its moments",
                f'set optimizer = "{saved_type}" again',
            )
        if len(state["parameters"]) != len(self.parameters):
            raise StateMisfit(
                f"{len(state['parameters'])} parameters were saved, and {len(self.parameters)} are "
                "trained now",
            )
        steps, skipped, scale = state["steps"], state["skipped"], state["scale"]
        if (
            not isinstance(steps, int)
            or not isinstance(skipped, int)
            or min(steps, skipped) < 0
            or not 0 < scale <= 1
        ):
            raise ValueError(
                f"an optimizer after {steps} steps, {skipped} skipped, with learning rates × "
                f"{scale}"
            )
        for mine, saved, moments in zip(
            self.parameters, state["parameters"], state["moments"], strict=True
        ):
            restored = self._restored_moments(mine, moments)
            if mine.shape != saved.shape:
                raise StateMisfit(
                    f"a parameter of shape {list(saved.shape)} was saved, and has shape "
                    f"{list(mine.shape)} now",
                )
            copy_saved(mine.data, saved)
            if restored:  # a parameter that no gradient has reached has none
                self._part_of(mine).stepper.state[mine] = restored
        self.steps, self.skipped, self.scale = steps, skipped, scale

    def _saved_moments(self, parameter: Tensor) -> dict[str, Any]:
        constants = self._part_of(parameter).traits.constants
        return {n: m for n, m in self.moments(parameter).items() if n not in constants}

    def _restored_moments(self, parameter: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return the moments that were saved, checked, and where the next step reads them."""
        if not saved:
            return {}
        part = self._part_of(parameter)
        moments = part.traits.fresh(part.stepper, parameter)
        names = moments.keys() - part.traits.constants
        if saved.keys() != names:
            raise ValueError(f"moments {', '.join(saved)} instead of {', '.join(sorted(names))}")
        for name in names:
            moments[name] = _restored(name, moments[name], saved[name])
        return moments


@dataclass(frozen=True)
class _Part:
    """The parameters that one optimizer of torch's kind steps."""

    traits: Traits
    stepper: Any
    ids: frozenset[int]


def _parts(parameters: list[Tensor], config: OptimizerConfig, matrices: set[int]) -> list[_Part]:
    """Return what steps the matrices, if that is not AdamW, and what steps all else."""
    traits = TYPES[config.optimizer]
    if traits is ADAMW:
        return [_part(ADAMW, parameters, config)]
    if not matrices:
        raise OptimizerError(
            f'optimizer = "{config.optimizer}" steps the matrices of transformer blocks, and this '
            'model has none that are known. Use "adamw".'
        )
    own = [p for p in parameters if id(p) in matrices]
    rest = [p for p in parameters if id(p) not in matrices]
    if not traits.takes_sharded and any(map(is_sharded, own)):
        raise OptimizerError(
            f'optimizer = "{config.optimizer}" does not step parameters that are held in parts. '
            'Use "adamw" or "muon".'
        )
    return [_part(t, some, config) for t, some in ((traits, own), (ADAMW, rest)) if some]


def _part(traits: Traits, parameters: list[Tensor], config: OptimizerConfig) -> _Part:
    return _Part(traits, traits.make(parameters, config), frozenset(map(id, parameters)))


def _restored(name: str, fresh: Any, saved: Any) -> Any:
    """Return a saved moment in the form of a fresh one."""
    if isinstance(fresh, int):
        if type(saved) is not int or saved < 0:
            raise ValueError(f"{name} is no number of steps")
        return saved
    if fresh.shape != saved.shape:
        raise ValueError("moments of another shape than their parameter")
    if isinstance(saved, torch.Tensor) and saved.is_floating_point() != fresh.is_floating_point():
        raise ValueError(f"{name} has another type of number than its optimizer's")
    return copy_saved(fresh, saved)


@part
class Optim(OptimizerConfig):
    """How an RL stage turns one step's experience into updates: the file's [optim] table."""

    lr: float = Field(default=1e-6, gt=0, description="The actor's highest learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="constant", description="How the learning rates go on after the warm-up."
    )
    eps: float = Field(
        default=1e-5, gt=0, description="Adam's epsilon; 1e-5 as in Ziegler et al. 2019."
    )
    critic_lr: float = Field(default=1e-5, gt=0, description="The critic's highest learning rate.")
    epochs: int = Field(default=4, ge=1, description="Passes over the experience of one step.")
    minibatches: int = Field(default=1, ge=1, description="Optimizer steps per epoch.")
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Tokens per forward pass: it bounds memory and changes no result. Chosen to "
        "suit the machine if left out.",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of an average of the actor, saved beside it; 0 keeps none. Typical: "
        "0.992.",
    )
    critic_warmup_steps: int = Field(
        default=0, ge=0, description="First steps in which only the critic learns."
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        description="No further epoch begins once the KL(π_old ‖ π) per token is above this. "
        "Typical: 0.02.",
    )

    def optimizer_config(self, lr: float) -> OptimizerConfig:
        """Return the settings of one optimizer, with its learning rate."""
        shared = {field.name: getattr(self, field.name) for field in fields(OptimizerConfig)}
        return OptimizerConfig(**shared | {"lr": lr})
