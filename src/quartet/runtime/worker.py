"""The workers of a run: one per process, and groups of them that are called as one.

A `Worker` is a plain class that knows its process group. A `WorkerGroup` calls its methods by name
on every rank: `LocalWorkers` in this process, others in `launch` in further processes and on other
machines. Only names, paths, numbers and the results of methods cross between processes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import is_sharded, local_tensor
from quartet.errors import QuartetError, StateMisfit
from quartet.io.activity import activity
from quartet.io.heap import return_freed_memory
from quartet.io.threads import Abandoned, BackgroundThread, result_of
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
    """Ranks that have died or did not answer in time; the message names them."""

    def __init__(self, ranks: Sequence[int], why: str) -> None:
        self.ranks, self.why = tuple(ranks), why
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        super().__init__(f"{named} of the run {'was' if len(ranks) == 1 else 'were'} lost: {why}")


@runtime_checkable
class WorkerGroup(Protocol):
    """The workers of all ranks, which do the same things at the same time."""

    world_size: int

    def call(self, name: str, *args: Any) -> list[Any]:
        """Call a method of every worker, and return the results by rank.

        What is the same on every rank is returned by rank 0 only; the others return None. Raises
        `WorkerLost` if a rank does not finish.
        """
        ...

    def untouched(self) -> bool:
        """Return whether no weight has moved since the last call ended: a run that stops now loses
        nothing."""
        ...

    def halt(self, step: int) -> bool:
        """Let no weight change from now on, and return True; `save` then writes the state after
        this step, although a call may be under way. Return False, and halt nothing, where the state
        is no longer, or not yet, that of this step."""
        ...

    def close(self) -> None:
        """End the threads and processes of the workers, in the middle of a call if one is under
        way."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a worker returns for one step."""

    progress: Progress | None
    """None once the stage has no more steps, and on every rank but rank 0."""
    notes: list[str]
    """Sentences about memory."""


class Worker:
    """One rank of a run. It holds the stage that has begun, and everything that changes from step
    to step."""

    def __init__(
        self, stages: Sequence[Stage], folder: Path, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.folder, self.process_group = folder, process_group
        self.random = GlobalRandom()
        self.stage_run: StageRun | None = None
        self._steps: Iterator[Progress] = iter(())
        self._state: Tree = None
        """The state after the last whole step. Its tensors are the live ones: the next step changes
        them."""
        self._optimizer_steps = 0
        """How many optimizer steps there had been then."""
        self._keeping = threading.RLock()
        """Held while a state is kept."""
        self._kept_step = 0
        """The step that it is the state of."""
        self._halted = False

    def begin(self, name: str, checkpoint: str | None) -> bool:
        """Load the models of a stage, and its state from a checkpoint if one is given. Return
        whether the stage has a state to save.

        A checkpoint of step 0 holds the random numbers only: the stage begins from its start.
        """
        with activity("loading"):
            return self._begin(name, checkpoint)

    def _begin(self, name: str, checkpoint: str | None) -> bool:
        loaded = None if checkpoint is None else read_checkpoint(Path(checkpoint))
        state = {} if loaded is None else loaded.state()
        if loaded is not None and "work" not in state:
            with _naming(loaded):
                self.random.load_state(state["random"])
        self.stage_run = self.stages[name].begin(self.folder)
        num_done = 0
        if loaded is not None and "work" in state:
            with _naming(loaded):
                self._load(state)
            num_done = loaded.facts["step"]
        self._continue(num_done)
        return bool(self.stage_run.stateful)

    def step(self) -> StepResult:
        """Take one step of the stage."""
        stage_run = self._begun()
        progress = next(self._steps, None)
        self._keep_state(self._kept_step if progress is None else progress.number)
        return StepResult(progress if self.process_group.is_rank_zero else None, stage_run.notes())

    def finish(self) -> Summary:
        """End the stage: rank 0 writes its results to the run folder. Return their summary."""
        return_freed_memory()  # of training: models are saved, and some are merged for that
        summary = self._begun().finish()
        self._forget_stage()
        return summary

    def save(self, folder: str) -> Tree:
        """Write the tensors of the state after the last whole step, and return the rest of it on
        rank 0, None on the others."""
        if self.stage_run is not None:
            self.stage_run.settle()
        state = {"random": self.random.state()} if self.stage_run is None else self._state
        rest = save_tensors(Path(folder), state, self.process_group)
        return rest if self.process_group.is_rank_zero else None

    def size(self) -> int:
        """Return the number of bytes of the tensors that `save` writes."""
        return sum(local_tensor(t).nbytes for t in split_tensors(self._state)[1].values())

    def go_back(self, checkpoint: str, scale: float) -> None:
        """Go back to a checkpoint of this stage, and multiply all learning rates by `scale`.

        The checkpoint of step 0 holds no weights; the stage then begins again.
        """
        loaded = read_checkpoint(Path(checkpoint))
        state = loaded.state()
        if "work" in state:
            with _naming(loaded):
                self._load(state)
        else:
            self._forget_stage()  # frees its models before they are loaded a second time
            self.begin(loaded.facts["stage"], checkpoint)
        stage_run = self._begun()
        for optimizer in stage_run.optimizers:
            optimizer.scale = scale
        self._continue(loaded.facts["step"])

    def scale(self) -> float:
        """Return the factor of the learning rates; 0 for a stage that trains nothing."""
        stage_run = self._begun()
        return stage_run.optimizers[0].scale if stage_run.optimizers else 0.0

    def untouched(self) -> bool:
        """Return whether no optimizer has stepped since the state was kept."""
        return self.stage_run is None or self.stage_run.optimizer_steps() == self._optimizer_steps

    def is_sharded(self) -> bool:
        """Return whether this rank has only a part of the state after the last whole step."""
        return any(map(is_sharded, split_tensors(self._state)[1].values()))

    def halt(self, step: int) -> bool:
        """See `WorkerGroup.halt`. Another thread calls it in the middle of a call."""
        optimizers = () if self.stage_run is None else self.stage_run.optimizers
        with contextlib.ExitStack() as held:
            for lock in (self._keeping, *(optimizer.counting for optimizer in optimizers)):
                held.enter_context(lock)
            if self._kept_step != step or not self.untouched():
                return False
            for optimizer in optimizers:
                optimizer.halted = True
            self._halted = True
        return True

    def _load(self, state: Tree) -> None:
        self._begun().load_state(state["work"])
        self.random.load_state(state["random"])

    def _continue(self, step: int) -> None:
        """Go on with the steps that follow this one."""
        self._steps = self._begun().steps(step)
        self._keep_state(step)

    def _keep_state(self, step: int) -> None:
        """Make the present state the one that `save` writes, as that of this step."""
        stage_run = self._begun()
        state = {"work": stage_run.state(), "random": self.random.state()}
        with self._keeping:
            if self._halted:
                raise Abandoned
            self._state, self._kept_step = state, step
            self._optimizer_steps = stage_run.optimizer_steps()

    def _forget_stage(self) -> None:
        self.stage_run, self._steps, self._state = None, iter(()), None

    def _begun(self) -> StageRun:
        assert self.stage_run is not None, "no stage has begun"
        return self.stage_run


@contextlib.contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn any error of a state that does not fit the stage into sentences about its checkpoint."""
    unfit = f"checkpoint {checkpoint.name} does not fit what this config trains"
    try:
        yield
    except StateMisfit as error:
        raise DamagedCheckpoint(
            f"{unfit} ({error.what}), and earlier ones do not either. To go on, {error.remedy}. Or "
            "start a new run."
        ) from error
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
        elif isinstance(error, KeyError):
            reason = f"there is no {error}"
        else:
            reason = str(error).partition("\n")[0].rstrip(".")
        raise DamagedCheckpoint(
            f"{unfit} ({reason}). Rename {checkpoint.path} to go on from an earlier one."
        ) from error


CLOSE_SECONDS = 1.5
"""How long the thread of a worker may take to end."""


class WorkerThread:
    """Calls the methods of a worker in a thread of its own.

    The main thread, which alone is told of signals, waits in Python meanwhile. So a run can be
    stopped at any time, however long a call into native code takes.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self._threads: list[BackgroundThread] = []
        self._is_busy = False
        """Whether a call is under way, or was when its caller was interrupted."""

    def call(self, name: str, *args: Any, watch: Callable[[], None] = lambda: None) -> Any:
        """Return what a method returns. While another call is under way, whose caller was
        interrupted, a further thread makes this one.

        `watch` is called again and again meanwhile, and may raise an error: the call, which may be
        in native code, is then left under way.
        """
        was_busy = self._is_busy
        if was_busy:
            self._threads.append(BackgroundThread("worker, after an interruption"))
        elif not self._threads:
            self._threads.append(BackgroundThread("worker"))
        # Before the call is handed over: an interruption in between must not leave it unnoticed.
        self._is_busy = True
        future = self._threads[-1].start(partial(getattr(self.worker, name), *args))
        try:
            result = result_of(future, watch)
        except Exception:
            self._is_busy = was_busy or not future.done()
            raise
        self._is_busy = was_busy
        return result

    def close(self) -> None:
        """End the thread, in the middle of a call if one is under way."""
        for thread in self._threads:
            if self._is_busy:
                thread.abandon(CLOSE_SECONDS)
            else:
                thread.finish()
        self._threads = []


class LocalWorkers:
    """The group of a run in a single process: one worker."""

    world_size = 1

    def __init__(self, worker: Any) -> None:
        self.worker, self.thread = worker, WorkerThread(worker)

    def call(self, name: str, *args: Any) -> list[Any]:
        return [self.thread.call(name, *args)]

    def untouched(self) -> bool:
        return bool(self.worker.untouched())

    def halt(self, step: int) -> bool:
        return bool(self.worker.halt(step))

    def close(self) -> None:
        self.thread.close()
