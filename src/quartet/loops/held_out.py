"""Evaluation on held-out rows while a stage trains: when, which weights were best, when to stop."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quartet.distributed.sharding import copy_saved, is_sharded
from quartet.errors import StateMisfit
from quartet.loops.progress import Progress
from quartet.tensors import Tensor

Merit = tuple[float, float]
"""How good some weights are: the accuracy, and the loss with its sign reversed."""


@dataclasses.dataclass(frozen=True)
class Evaluating:
    """How often a stage is evaluated, and what follows from that."""

    every: int = 0
    """Steps between evaluations; the last step is evaluated too. 0: there are none."""
    keep_best: bool = False
    """Whether the stage ends with the weights of its best evaluation."""
    patience: int = 0
    """Evaluations without improvement after which the stage ends; 0: it never does."""


NOT_EVALUATED = Evaluating()


class HeldOut:
    """Evaluates a model while it is trained, and keeps the best weights."""

    def __init__(
        self,
        config: Evaluating,
        num_steps: int,
        parameters: Sequence[Tensor],
        evaluate: Callable[[], Mapping[str, float]],
    ) -> None:
        """`evaluate` returns the "loss" on held-out rows and, for pairs, the "accuracy". Weights
        with a higher accuracy are better, and those with a lower loss where it is the same, or
        where there is none."""
        self.config, self.num_steps = config, num_steps
        self.parameters, self.evaluate = list(parameters), evaluate
        self.best_step = 0
        """The step of the best evaluation; 0 before the first."""
        self.best_merit: Merit | None = None
        self.num_worse = 0
        """Evaluations since the best one."""
        self.last_step = 0
        """The step of the last evaluation."""
        self.before: dict[str, float] = {}
        """What was measured before the first step, for the summary. A stage that is resumed has it
        from its checkpoint."""
        self._best: list[Tensor] = []

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the stage ends now, or has ended, before its last step."""
        return 0 < self.config.patience <= self.num_worse and self.last_step < self.num_steps

    def during(self, steps: Iterator[Progress]) -> Iterator[Progress]:
        """Yield the steps, with the metrics `held_out/loss` and `held_out/accuracy` where one is
        evaluated, until no patience is left."""
        if self.is_out_of_patience:
            return
        for progress in steps:
            yield self._evaluated(progress) if self._is_due(progress.number) else progress
            if self.is_out_of_patience:
                return

    def restore_best(self) -> None:
        """Give the model the weights of the best evaluation, where they are kept."""
        for parameter, best in zip(self.parameters, self._best, strict=bool(self._best)):
            parameter.data.copy_(best)

    def numbers(self, after: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of a summary: those from before the first step, and of each those
        after the last."""
        before = {f"held_out_{name}_before": number for name, number in self.before.items()}
        return before | {f"held_out_{name}": number for name, number in after.items()}

    def summary(self) -> dict[str, Any]:
        """Return what the evaluations have decided: `best_step` where the best weights are kept,
        and `stopped_at` where patience ended the stage."""
        chosen = {"best_step": self.best_step} if self.config.keep_best else {}
        return chosen | ({"stopped_at": self.last_step} if self.is_out_of_patience else {})

    def state(self) -> dict[str, Any]:
        return {
            "best_step": self.best_step,
            "best_merit": None if self.best_merit is None else list(self.best_merit),
            "num_worse": self.num_worse,
            "last_step": self.last_step,
            "before": self.before,
            "best": self._best,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises `StateMisfit` where the state is of other parameters than these."""
        merit, best = state["best_merit"], state["best"]
        numbers = [state[name] for name in ("best_step", "num_worse", "last_step")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"evaluations with the numbers {numbers}")
        if len(best) not in {0, len(self.parameters)}:
            raise StateMisfit(
                f"the best {len(best)} parameters were saved, and {len(self.parameters)} are "
                "trained now",
            )
        self.best_step, self.num_worse, self.last_step = numbers
        self.best_merit = None if merit is None else (float(merit[0]), float(merit[1]))
        # A version that did not write it measured it again.
        self.before = {name: float(number) for name, number in state.get("before", {}).items()}
        pairs = zip(self.parameters, best, strict=bool(best))
        self._best = [copy_saved(kept(parameter), saved) for parameter, saved in pairs]

    def _is_due(self, step: int) -> bool:
        every = self.config.every
        return every > 0 and (step % every == 0 or step == self.num_steps)

    def _evaluated(self, progress: Progress) -> Progress:
        metrics = self.evaluate()
        merit = metrics.get("accuracy", 0.0), -metrics["loss"]
        self.last_step = progress.number
        if self.best_merit is None or merit > self.best_merit:
            self.best_step, self.best_merit, self.num_worse = progress.number, merit, 0
            if self.config.keep_best:
                self._best = [kept(parameter) for parameter in self.parameters]
        else:
            self.num_worse += 1
        shown = {f"held_out/{name}": metrics[name] for name in MEASURES if name in metrics}
        return dataclasses.replace(
            progress, metrics=progress.metrics | shown, is_last=self.is_out_of_patience
        )


MEASURES = ("loss", "accuracy")
"""What is recorded of an evaluation."""


def kept(parameter: Tensor) -> Tensor:
    """Return a copy that training does not change: in main memory, and of a sharded parameter where
    its own part is."""
    held = parameter.detach()
    return held.clone() if is_sharded(held) else held.to("cpu", copy=True)
