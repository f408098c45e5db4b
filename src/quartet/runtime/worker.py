"""Who does the work of a run: a worker per process, and groups of them that are spoken to as one.

A worker is a plain class that knows its rank and its team as data. A group runs its methods:
`Local` here, others in `launch` behind processes and machines. What crosses a border are names,
paths, and what a step returns.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from quartet.distributed.balance import shares
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import local_tensor
from quartet.errors import QuartetError
from quartet.loops.progress import Progress
from quartet.stages.protocol import Stage, StageRun, Summary
from quartet.training.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    first_problem,
    read_checkpoint,
)
from quartet.training.random_state import GlobalRandom
from quartet.training.state_tree import Tree, save_tensors, split_tensors


class WorkerLost(QuartetError, RuntimeError):
    """Ranks that are dead, or did not answer in time: the message names them."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = tuple(ranks), why
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        super().__init__(f"{named} of the run {'was' if len(ranks) == 1 else 'were'} lost: {why}")


@runtime_checkable
class Handle(Protocol):
    """A call that is under way."""

    def result(self) -> list[Any]:
        """What each rank returned. Raises `WorkerLost` after the deadline."""
        ...


@runtime_checkable
class Group(Protocol):
    """Workers that do the same."""

    world: int

    def call(self, name: str, *args: Any) -> list[Any]:
        """The method of all ranks; what each returned, by rank. Only the lead speaks of what all
        know: others return None."""
        ...

    def map(self, name: str, rows: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        """A method that takes some rows and returns as much for each: every rank takes its share by
        tokens, and the results come in the order of the rows."""
        ...

    def start(self, name: str, *args: Any) -> Handle:
        """The same as `call`, to be waited for later."""
        ...

    def untouched(self) -> bool:
        """Whether no weight has moved since the last call ended: then a run that stops now has lost
        nothing."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stepped:
    progress: Progress | None
    """None: all steps of the stage are done, or another rank speaks."""
    notes: list[str]
    """What there was to say of memory."""


class Worker:
    """One rank of a run: its stages, and the one that has begun. Everything that changes from step
    to step is here."""

    def __init__(
        self, stages: Sequence[Stage], folder: Path, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.stages, self.folder, self.process_group = (
            {stage.name: stage for stage in stages},
            folder,
            process_group,
        )
        self.random = GlobalRandom()
        self.work: StageRun | None = None
        self._steps: Iterator[Progress] = iter(())
        self._at: Tree = None
        self._moves = 0

    def begin(self, name: str, checkpoint: str | None) -> bool:
        """Load the models of a stage, as a checkpoint left them where there is one. Whether there
        is anything to save."""
        found = None if checkpoint is None else read_checkpoint(Path(checkpoint))
        state = {} if found is None else found.state()
        if found is not None and "work" not in state:
            with _loading(found):
                self.random.load_state(state["random"])
        self.work = self.stages[name].begin(self.folder)
        done = 0
        if found is not None and "work" in state:
            with _loading(found):
                self._load(state)
            done = found.facts["step"]
        self._mark(self.work.steps(done))
        return bool(self.work.stateful)

    def step(self) -> Stepped:
        work = self._begun()
        progress = next(self._steps, None)
        self._mark()
        return Stepped(progress if self.process_group.is_rank_zero else None, work.notes())

    def finish(self) -> Summary:
        """Leave the results in the run folder, where this rank is the lead; say what came out."""
        work = self._begun()
        summary = work.finish()
        self.work, self._steps, self._at = None, iter(()), None
        return summary

    def save(self, folder: str) -> Tree:
        """Write the tensors of the state after the last whole step; the rest of the state."""
        state = {"random": self.random.state()} if self.work is None else self._at
        return save_tensors(Path(folder), state, self.process_group)

    def size(self) -> int:
        """Bytes of the tensors that `save` writes."""
        return sum(local_tensor(t).nbytes for t in split_tensors(self._at)[1].values())

    def go_back(self, checkpoint: str, scale: float) -> None:
        """Go back to a checkpoint of this stage, with all learning rates times `scale`. Where it is
        the one of step 0, which holds no weights, the stage begins again."""
        found = read_checkpoint(Path(checkpoint))
        state = found.state()
        if "work" in state:
            with _loading(found):
                self._load(state)
        else:
            self.work, self._steps, self._at = (
                None,
                iter(()),
                None,
            )  # its models go before they are loaded again
            self.begin(found.facts["stage"], checkpoint)
        work = self._begun()
        for optimizer in work.optimizers:
            optimizer.scale = scale
        self._mark(work.steps(found.facts["step"]))

    def scale(self) -> float:
        """What learning rates are multiplied by; 0 where nothing learns."""
        work = self._begun()
        return work.optimizers[0].scale if work.optimizers else 0.0

    def untouched(self) -> bool:
        return self.work is None or self.work.optimizer_steps() == self._moves

    def _load(self, state: Tree) -> None:
        self._begun().load_state(state["work"])
        self.random.load_state(state["random"])

    def _mark(self, steps: Iterator[Progress] | None = None) -> None:
        """This is what a checkpoint holds from now on. Its tensors are the live ones: good until
        the next step changes them."""
        work = self._begun()
        self._steps = self._steps if steps is None else steps
        self._at, self._moves = (
            {"work": work.state(), "random": self.random.state()},
            work.optimizer_steps(),
        )

    def _begun(self) -> StageRun:
        assert self.work is not None, "no stage has begun"
        return self.work


@contextlib.contextmanager
def _loading(found: Checkpoint) -> Iterator[None]:
    """Whatever a state says that the stage cannot take becomes one sentence about its
    checkpoint."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, ValidationError):
            reason = first_problem(error)
        else:
            reason = (
                f"there is no {error}"
                if isinstance(error, KeyError)
                else str(error).partition("\n")[0].rstrip(".")
            )
        raise DamagedCheckpoint(
            f"checkpoint {found.name} does not fit what this config trains ({reason}). Rename "
            f"{found.path} to go on from an "
            "earlier one."
        ) from error


class Local:
    """One worker, in this process: a call is a call."""

    world = 1

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def call(self, name: str, *args: Any) -> list[Any]:
        return [getattr(self.worker, name)(*args)]

    def map(self, name: str, rows: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        return list(getattr(self.worker, name)(list(rows)))

    def start(self, name: str, *args: Any) -> Handle:
        return Done(self.call(name, *args))

    def untouched(self) -> bool:
        return bool(self.worker.untouched())

    def close(self) -> None:
        """Nothing is left running."""


@dataclass(frozen=True)
class Done:
    """A call that was made at once."""

    results: list[Any]

    def result(self) -> list[Any]:
        return self.results


def mapped(
    rows: Sequence[Any],
    lengths: Sequence[int],
    world: int,
    call: Callable[[list[list[Any]]], list[list[Any]]],
) -> list[Any]:
    """The rows dealt out by tokens, and what came of them in their order. `call`: the rows of each
    rank in, its results out."""
    dealt = shares(lengths, world)
    found = call([[rows[i] for i in mine] for mine in dealt])
    made = dict(
        pair
        for mine, results in zip(dealt, found, strict=True)
        for pair in zip(mine, results, strict=True)
    )
    return [made[i] for i in range(len(rows))]
