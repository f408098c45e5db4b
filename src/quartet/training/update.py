"""What one update of the learner did: its result, and how that is collected on the way."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.kl import k3
from quartet.distributed.process_group import ProcessGroup
from quartet.errors import NonFinite
from quartet.experience import Experience, row_tokens
from quartet.tensors import Bool, Float, Tensor


@dataclass(frozen=True)
class Update:
    """What one call of `Learner.update` did. Each token's entry in a tensor is from the last time
    that the update visited the token."""

    losses: dict[str, float]
    """The terms of the loss, averaged over the optimizer steps."""
    step_stats: dict[str, float]
    """The total loss and the gradient norms, averaged over the optimizer steps, and the learning
    rates of the first."""
    clip_fraction: float
    """The share of token visits at which the clip removed the gradient."""
    first_ratio_error: float
    """The largest |ratio − 1| in the first minibatch, before any weight has moved: what rounding
    alone does."""
    step_kl: float | None
    """Mean KL(π_old ‖ π) per token after the update, where the algorithm reads it and the actor was
    trained."""
    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]
    row_advantages: Float[Tensor, "B"]
    """The mean advantage of each row."""
    trained_actor: bool = True
    """False where only the critic was trained, in its warm-up."""
    reference_moved: bool = False
    """Whether the weights of the reference have changed, which is a fault."""


@dataclass
class Tally:
    """Sums over the token visits of an update."""

    losses: dict[str, float] = field(default_factory=dict)
    num_clipped: int = 0
    num_visits: int = 0
    first_ratio_error: float = 0.0
    kl: float = 0.0
    """The sum of k3(π_old, π)."""

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of one micro-batch, by the names of `UpdateRecord.add`, and of losses."""
        for name, number in numbers.items():
            match name:
                case "#clipped":
                    self.num_clipped += int(number)
                case "#visits":
                    self.num_visits += int(number)
                case "#kl":
                    self.kl += number
                case "#first_ratio_error":
                    self.first_ratio_error = max(self.first_ratio_error, number)
                case _:
                    self.losses[name] = self.losses.get(name, 0.0) + number

    def copy(self) -> "Tally":
        return dataclasses.replace(self, losses=dict(self.losses))

    def all_reduce(self, process_group: ProcessGroup) -> "Tally":
        """Return the tally of all ranks."""
        # A rank that had no row of its own does not know the names of the terms.
        names_by_rank = process_group.all_gather(list(self.losses))
        names = sorted({name for names in names_by_rank for name in names})
        counts = (float(self.num_clipped), float(self.num_visits), self.kl)
        clipped, visits, kl, *losses = process_group.all_reduce_sum(
            *counts, *(self.losses.get(name, 0.0) for name in names)
        )
        error = process_group.all_reduce_max(self.first_ratio_error)
        return Tally(dict(zip(names, losses, strict=True)), int(clipped), int(visits), error, kl)


class UpdateRecord:
    """Collects what an update computes for each token, and the sums over its visits.

    What micro-batches give stays on the device until `settle`, which each optimizer step calls
    once: to read every number by itself would have the host wait for the device each time.
    """

    def __init__(
        self, experience: Experience, process_group: ProcessGroup, device: torch.device
    ) -> None:
        self.experience, self.process_group = experience, process_group
        shape, dtype = experience.old_logprobs.shape, experience.old_logprobs.dtype
        self.logprobs, self.entropy = (
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)
        )
        self.clipped = torch.zeros(shape, dtype=torch.bool, device=device)
        self.tally = Tally()
        self._last_epoch = Tally()
        """The tally when the last epoch ended."""
        self._rows: Sequence[int] = ()
        self._before_step = Tally()
        self._num_steps = 0
        self._unread: list[dict[str, Tensor]] = []
        """Numbers of micro-batches, on the device."""
        self._unchecked: list[tuple[str, Sequence[int], Tensor]] = []
        """What was computed, the rows of the experience, and whether each row is finite."""

    def begin_step(self, rows: Sequence[int]) -> None:
        """Begin an optimizer step on some rows. What an attempt at it records, `rewind` undoes."""
        self._rows, self._before_step = rows, self.tally.copy()
        self._num_steps += 1

    def rewind(self) -> None:
        """Return to the beginning of the step, and clear its rows.

        An attempt that ran out of memory is repeated with smaller micro-batches. Rows are cleared
        in the first attempt too: another rank may have visited them in the last epoch, and the
        ranks' tensors are summed in the end.
        """
        self.tally = self._before_step.copy()
        self._unread.clear()
        self._unchecked.clear()
        for tensor in (self.logprobs, self.entropy, self.clipped):
            tensor[self._rows] = 0

    @torch.no_grad()
    def check(
        self, what: str, numbers: Tensor | None, part: Experience, rows: Sequence[int]
    ) -> None:
        """Have `settle` raise `NonFinite` where a number of a response token is not finite. `part`
        is those rows of the experience."""
        if numbers is not None:
            finite = (numbers.isfinite() | ~part.response_mask).all(dim=1)
            self._unchecked.append((what, rows, finite))

    @torch.no_grad()
    def add(
        self,
        rows: list[int],
        part: Experience,
        forward: Forward,
        terms: Mapping[str, Tensor],
        algorithm: Algorithm,
    ) -> None:
        """Record a forward pass of one micro-batch. `part` is those rows of the experience, `terms`
        their losses."""
        numbers = dict(terms)
        if forward.logprobs is not None:
            assert forward.entropy is not None, "every pass of an actor gives both"
            numbers |= self._actor_numbers(rows, part, forward.logprobs, forward.entropy, algorithm)
        self.add_terms(numbers)

    def _actor_numbers(
        self,
        rows: list[int],
        part: Experience,
        logprobs: Float[Tensor, "b t"],
        entropy: Float[Tensor, "b t"],
        algorithm: Algorithm,
    ) -> dict[str, Tensor]:
        """Record the actor's outputs of each token, and return their sums by name."""
        mask, width = part.response_mask, part.tokens.shape[1]
        clipped = algorithm.clipped(part, logprobs)
        index = torch.tensor(rows).to(mask.device, non_blocking=True)
        self.logprobs[index, :width] = torch.where(mask, logprobs, 0.0)
        self.entropy[index, :width] = torch.where(mask, entropy, 0.0)
        self.clipped[index, :width] = clipped
        kl = torch.where(mask, k3(part.old_logprobs, logprobs), 0.0)
        numbers = {"#clipped": clipped.sum(), "#visits": mask.sum(), "#kl": kl.sum()}
        if self._num_steps == 1:  # no weight has moved yet
            error = ((logprobs - part.old_logprobs).expm1().abs() * mask).max()
            numbers["#first_ratio_error"] = error
        return numbers

    def add_terms(self, numbers: Mapping[str, Tensor]) -> None:
        """Record numbers of one micro-batch by name: terms of the loss, and those of `add`."""
        self._unread.append({name: number.detach() for name, number in numbers.items()})

    def settle(self) -> None:
        """Read what is on the device. Raises `NonFinite` with the first row that is not finite."""
        unread, unchecked = self._unread, self._unchecked
        self._unread, self._unchecked = [], []
        if unchecked and not bool(torch.cat([finite for *_, finite in unchecked]).all()):
            what, row = next(
                (what, rows[finite.tolist().index(False)])
                for what, rows, finite in unchecked
                if not bool(finite.all())
            )
            experience = self.experience
            raise NonFinite(what, experience.ids[row], row_tokens(experience, row))
        if not unread:
            return
        exact = torch.float64 if self.logprobs.device.type == "cpu" else torch.float32
        flat = torch.stack([n.to(exact) for numbers in unread for n in numbers.values()]).tolist()
        for numbers in unread:
            self.tally.add(dict(zip(numbers, flat, strict=False)))
            del flat[: len(numbers)]

    def end_epoch(self) -> float:
        """Return the mean k3(π_old, π) over the token visits of the epoch, on all ranks."""
        before, self._last_epoch = self._last_epoch, self.tally.copy()
        kl, visits = self.process_group.all_reduce_sum(
            self.tally.kl - before.kl, float(self.tally.num_visits - before.num_visits)
        )
        return kl / max(visits, 1)

    def all_reduce(self) -> None:
        """Collect what all ranks have recorded, in main memory."""
        self.logprobs, self.entropy, self.clipped = (
            tensor.cpu() for tensor in (self.logprobs, self.entropy, self.clipped)
        )
        self.process_group.all_reduce(self.logprobs, self.entropy, self.clipped)
        self.tally = self.tally.all_reduce(self.process_group)


def mean_stats(step_stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the optimizer steps that were taken, and as `skipped` the
    number of those that were not, if any."""
    taken = [stats for stats in step_stats if "skipped" not in stats]
    names = taken[0] if taken else {}
    means = {name: sum(stats[name] for stats in taken) / len(taken) for name in names}
    num_skipped = len(step_stats) - len(taken)
    return means | ({"skipped": float(num_skipped)} if num_skipped else {})
