"""Workers in several processes: rank 0 is the run's process and works too; the others follow it.

Rank 0 writes each call into a store, a small table that every rank can read: the name of a method
and its arguments, as JSON. Each follower calls the method and writes its result, or its error, into
the store. The work itself needs all ranks, which meet in the collectives of the process group.

Every follower also counts up in the store once a second. A rank that is frozen, or on a machine
that is gone, is thereby known by its number while others still wait for it in a collective. Of
processes that rank 0 has started, it sees at once that they have ended.
"""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from quartet.distributed.process_group import RankZeroFailed, TorchProcessGroup
from quartet.errors import NonFinite, QuartetError, error_in_words
from quartet.io.threads import map_concurrently
from quartet.launch.processes import Follower, how_it_ended
from quartet.launch.store import BEAT, beat_key
from quartet.runtime.worker import WorkerLost, WorkerThread

log = logging.getLogger(__name__)

SILENCE = 15.0
"""Seconds without a heartbeat after which a rank is lost. A call that holds the interpreter, or a
machine that is overloaded, may keep the thread that beats waiting for some seconds."""
GRACE = 5.0
"""Seconds that rank 0 has to notice by itself that another rank has failed. In a collective of gloo
it does so at once; in one of NCCL it would wait for that rank until the deadline, and then torch
would end the process."""


class ProcessWorkers:
    """The worker group as rank 0 sees it."""

    def __init__(
        self,
        worker: Any,
        store: "dist.Store",
        world_size: int,
        deadline: float,
        followers: "Sequence[Follower]" = (),
        process_group: TorchProcessGroup | None = None,
    ) -> None:
        """`worker` is rank 0's. `deadline` is the number of seconds that the other ranks have to
        finish a call after rank 0 has. `followers` are the processes that `close` ends,
        `process_group` is the group that it leaves."""
        self.worker, self.store, self.world_size = worker, store, world_size
        self.deadline, self.followers = deadline, followers
        self.process_group = process_group
        self.thread = WorkerThread(worker)
        self._number = 0
        """The number of the last call."""
        self._busy = False
        self._in_step = True
        """Whether all ranks have ended the last call, and wait for the next."""
        self._given_up = False
        """Whether rank 0 was interrupted in the middle of a call."""
        self._beats: dict[int, tuple[int, float]] = {}
        """For each other rank: its count of heartbeats, and when that was last seen to change."""
        self._looked = 0.0
        """When rank 0 last looked whether another rank has failed."""
        self._failed_since: float | None = None
        """When another rank was first seen to have failed in this call."""

    def call(self, name: str, *args: Any) -> list[Any]:
        if self._given_up:  # the others are in the middle of another call
            return [self.thread.call(name, *args)]
        try:
            return self._call(name, *args)
        except Exception:
            raise
        except BaseException:
            self._given_up = True
            raise

    def _call(self, name: str, *args: Any) -> list[Any]:
        self._tell({"name": name, "args": list(args)})
        self._in_step, self._failed_since = False, None
        try:
            results = [self.thread.call(name, *args, watch=self._watch)]
        except _Watched as watched:
            raise watched.failure from None
        except NonFinite:
            self._in_step = True  # every rank raises it at the same place
            raise
        except RuntimeError as error:
            cause = self._cause(error)
            if cause is error:
                raise
            raise cause from error
        until = time.monotonic() + self.deadline
        results += [self._result(rank, until) for rank in range(1, self.world_size)]
        self._busy, self._in_step = False, True
        return results

    def untouched(self) -> bool:
        """Return whether no call is under way: the weights of other ranks cannot be asked for."""
        return not self._busy

    def halt(self, step: int) -> bool:
        """In the middle of a call, rank 0 saves without the others, which may be anywhere in it.
        That takes weights that are not sharded."""
        return not (self._busy and self.worker.is_sharded()) and bool(self.worker.halt(step))

    def close(self) -> None:
        in_step = self._in_step and not self._given_up and self._all_there()
        if self._given_up:  # no rank will finish the call
            for follower in self.followers:
                follower.kill()
        else:
            with contextlib.suppress(Exception):
                self._tell({"name": None})
        if self.process_group is not None:  # the others leave now, and may wait for rank 0 in it
            self.process_group.leave(in_step)
        map_concurrently(lambda follower: follower.end(), self.followers, len(self.followers))
        self.thread.close()

    def _all_there(self) -> bool:
        """Return whether no rank is known to be lost; False where the store is."""
        try:
            return self.lost() is None
        except dist.DistError:
            return False

    def lost(self) -> WorkerLost | None:
        """Return which ranks are lost, and why; None if there are none."""
        if ended := self._ended():
            return ended
        if silent := self.silent():
            return WorkerLost(silent, f"no sign of life for {SILENCE:g} s.")
        return None

    def _ended(self) -> WorkerLost | None:
        """Return which processes have ended that should not; None if there are none."""
        codes = {f.rank: code for f in self.followers if (code := f.process.poll()) is not None}
        return WorkerLost(list(codes), how_it_ended(next(iter(codes.values())))) if codes else None

    def silent(self) -> list[int]:
        """Return the ranks whose count of heartbeats has not changed for `SILENCE` seconds."""
        now = time.monotonic()
        for rank in range(1, self.world_size):
            beats = int(self.store.add(beat_key(rank), 0))  # reads it: a key may not exist yet
            if beats != self._beats.get(rank, (-1, now))[0]:
                self._beats[rank] = (beats, now)
        return [rank for rank, (_, since) in self._beats.items() if now - since > SILENCE]

    def _tell(self, call: dict[str, Any]) -> None:
        """Write the next call into the store."""
        self._number += 1
        self._busy = True
        self.store.set(f"call/{self._number}", json.dumps(call))

    def _result(self, rank: int, until: float) -> Any:
        """Wait for the result of another rank. Raises `WorkerLost`, or the error of that rank."""
        pause = 0.0005
        while (answer := self._answer(rank)) is None:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.005)
            if self.lost() and (failure := self._failure()):
                raise failure
            if time.monotonic() > until:
                raise WorkerLost(
                    [rank], f"it did not finish within launch.deadline = {self.deadline:g} s."
                )
        if "error" in answer:
            raise RuntimeError(f"rank {rank}: {answer['error']}")
        return answer["result"]

    def _cause(self, error: Exception) -> Exception:
        """Return why rank 0 could not finish a call.

        Where its own error only says that a collective has failed, the cause is an error that
        another rank has reported, a rank that is lost, or one that waits elsewhere.
        """
        if not by_another(error):
            return error
        # Long enough for the others to report, and for a dead rank to be silent.
        until = time.monotonic() + SILENCE + 2 * BEAT
        while time.monotonic() < until:
            if failure := self._failure():
                return failure
            time.sleep(0.1)
        stuck = [rank for rank in range(1, self.world_size) if self._answer(rank) is None]
        return stuck_ranks(stuck, error, self.deadline) if stuck else error

    def _failure(self) -> Exception | None:
        """Return the error that a rank has reported and that is its own, or the loss of ranks; None
        if there is neither. A rank that fails reports its error and then ends."""
        lost = self.lost()
        return self._reported() or lost

    def _reported(self, shared: bool = True) -> Exception | None:
        """Return the error that a rank has reported and that is its own; `shared` says whether one
        counts that every rank raises."""
        for rank in range(1, self.world_size):
            answer = self._answer(rank)
            if answer is None or "error" not in answer or answer["by_another"]:
                continue
            if shared or not answer.get("shared"):
                return RuntimeError(f"rank {rank}: {answer['error']}")
        return None

    def _watch(self) -> None:
        """Raise `_Watched` once another rank has failed and rank 0 has not noticed it for `GRACE`
        seconds. That a rank is silent is no failure here: it may load a large model."""
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked = now
        ended = self._ended()  # before the reports: a rank that fails reports its error and ends
        failure = self._reported(shared=False) or ended
        if failure is None:
            return
        if self._failed_since is None:
            self._failed_since = now
        elif now - self._failed_since > GRACE:
            raise _Watched(failure)

    def _answer(self, rank: int) -> dict[str, Any] | None:
        """Return what a rank has answered to the last call, or None if it has not yet."""
        key = f"done/{self._number}/{rank}"
        answer: dict[str, Any] | None = (
            json.loads(self.store.get(key)) if self.store.check([key]) else None
        )
        return answer


class _Watched(QuartetError):
    """Rank 0 is given up in the middle of a call, because another rank has failed."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.failure = failure


def follow(worker: Any, store: "dist.Store", rank: int) -> bool:
    """Do every call of rank 0, until it sends the last one or a call fails. Return whether it has
    sent the last one.

    After a failure this process ends, which closes its connections and so frees the ranks that wait
    for it in a collective. `NonFinite` is no such failure: every rank raises it at the same place,
    and rank 0 may go back to a checkpoint.
    """
    number = 0
    while True:
        number += 1
        call = json.loads(_wait_for(store, f"call/{number}"))
        if call["name"] is None:
            return True
        failure: Exception | None = None
        try:
            answer = {"result": json_or_none(getattr(worker, call["name"])(*call["args"]))}
        except Exception as error:
            failure = error
            answer = {
                "error": error_in_words(error),
                "by_another": by_another(error),
                "shared": isinstance(error, NonFinite),
            }
            if not answer["by_another"] and not answer["shared"]:
                log.exception("rank %d failed", rank)  # rank 0 has the words, not the traceback
        store.set(f"done/{number}/{rank}", json.dumps(answer))
        if failure is not None and not isinstance(failure, NonFinite):
            return False


def stuck_ranks(ranks: Sequence[int], error: Exception, deadline: float) -> WorkerLost:
    """Return the loss of ranks that are alive and did not come to a collective, whose error the
    others have."""
    return WorkerLost(
        ranks,
        f"alive, but not where the others waited for it ({error}). If its work takes longer than "
        f"launch.deadline = {deadline:g} s, resume with a longer one.",
    )


def by_another(error: Exception) -> bool:
    """Return whether the error is that of a collective in which another rank is missing: then that
    rank is the cause."""
    return isinstance(error, dist.DistError | RankZeroFailed) or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection closed")
    )


def json_or_none(value: Any) -> Any:
    """Return the value if JSON can hold it, else None: such results are read on rank 0 only."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


def _wait_for(store: "dist.Store", key: str) -> bytes:
    """Return what rank 0 writes, however long the run pauses between two calls. If rank 0 ends, the
    store is gone and this raises an error."""
    store.wait([key], timedelta(days=365))
    return bytes(store.get(key))
