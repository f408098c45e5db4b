"""Ranks that are processes of their own: rank 0 is the run's process, and works too; the others
follow it.

What rank 0 says goes through a store, a small table that all can read, as JSON: the name of a
method and what it is given. Each follower does it and says that it is done, or what went wrong.
Every rank also counts up in the store once a second, so that a rank that is dead or frozen is known
by name while others wait for it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from quartet.distributed.process_group import HERE
from quartet.errors import NonFinite
from quartet.runtime.worker import Handle, WorkerLost, mapped

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 4.0
"""Seconds without one after which a rank is not alive."""
LOOPBACK = "127.0.0.1"


class Spmd:
    """The group as rank 0 sees it."""

    def __init__(
        self,
        worker: Any,
        store: "dist.Store",
        world: int,
        deadline: float,
        started: "Sequence[Process]" = (),
    ) -> None:
        self.worker, self.store, self.world, self.deadline, self.started = (
            worker,
            store,
            world,
            deadline,
            started,
        )
        self._number = 0
        self._busy = False
        self._alive: dict[int, tuple[int, float]] = {}
        """How often each other rank has given a sign of life, and when that was last seen to
        change."""

    def call(self, name: str, *args: Any) -> list[Any]:
        self._say({"name": name, "args": list(args)})
        return self._done(getattr(self.worker, name), args)

    def map(self, name: str, rows: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        def call(dealt: list[list[Any]]) -> list[list[Any]]:
            self._say({"name": name, "dealt": dealt})
            return self._done(getattr(self.worker, name), (dealt[0],))

        return mapped(rows, lengths, self.world, call)

    def start(self, name: str, *args: Any) -> Handle:
        """Rank 0's share is done when it is asked for."""
        self._say({"name": name, "args": list(args)})
        return _Later(self, name, args)

    def untouched(self) -> bool:
        return not self._busy

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._say({"name": None})
        for process in self.started:
            process.end()

    def _say(self, words: dict[str, Any]) -> None:
        self._number += 1
        self._busy = True
        self.store.set(f"call/{self._number}", json.dumps(words))

    def _done(self, method: Any, args: Sequence[Any]) -> list[Any]:
        """What this rank returned, and then the others."""
        try:
            results = [method(*args)]
        except RuntimeError as error:
            cause = self._cause(error)
            if cause is error:
                raise
            raise cause from error
        until = time.monotonic() + self.deadline
        results += [self._heard(rank, until) for rank in range(1, self.world)]
        self._busy = False
        return results

    def _heard(self, rank: int, until: float) -> Any:
        pause = 0.0005
        while (said := self._said(rank)) is None:
            time.sleep(pause)
            pause = min(1.5 * pause, 0.005)
            if lost := self.silent():
                raise WorkerLost(lost, f"no sign of life for {SILENCE:g} s.")
            if time.monotonic() > until:
                raise WorkerLost(
                    [rank], f"it did not finish within launch.deadline = {self.deadline:g} s."
                )
        if "error" in said:
            raise RuntimeError(f"rank {rank}: {said['error']}")
        return said["result"]

    def _cause(self, error: Exception) -> Exception:
        """Why this rank could not go on: another that failed, one that is lost, or itself."""
        if not by_another(error):
            return error
        until = time.monotonic() + SILENCE + 2 * BEAT
        while time.monotonic() < until:
            said = {rank: self._said(rank) for rank in range(1, self.world)}
            for rank, words in said.items():
                if words is not None and "error" in words and not words["by_another"]:
                    return RuntimeError(f"rank {rank}: {words['error']}")
            if lost := self.silent():
                return WorkerLost(lost, f"no sign of life for {SILENCE:g} s.")
            time.sleep(0.1)
        stuck = [rank for rank, words in said.items() if words is None]
        return (
            WorkerLost(stuck, f"alive, but not where the others waited for it ({error}).")
            if stuck
            else error
        )

    def _said(self, rank: int) -> dict[str, Any] | None:
        """Of the call that is under way; None: nothing yet."""
        key = f"done/{self._number}/{rank}"
        said: dict[str, Any] | None = (
            json.loads(self.store.get(key)) if self.store.check([key]) else None
        )
        return said

    def silent(self) -> list[int]:
        """The ranks that have given no sign of life for so long, as far as this was asked."""
        now = time.monotonic()
        for rank in range(1, self.world):
            beats = int(self.store.add(f"beat/{rank}", 0))
            if beats != self._alive.get(rank, (-1, now))[0]:
                self._alive[rank] = (beats, now)
        return [rank for rank, (_, since) in self._alive.items() if now - since > SILENCE]


@dataclass
class _Later:
    group: Spmd
    name: str
    args: Sequence[Any]

    def result(self) -> list[Any]:
        return self.group._done(getattr(self.group.worker, self.name), self.args)


# --- a rank that follows
# ---------------------------------------------------------------------------------------------------


def follow(worker: Any, store: "dist.Store", rank: int) -> None:
    """Do what rank 0 says until it says no more, or something fails: the connections of a process
    that ends then tell those who wait for it. (Numbers that are not finite all ranks see alike, and
    rank 0 may go back to a checkpoint.)"""
    number = 0
    while True:
        number += 1
        words = json.loads(_waited(store, f"call/{number}"))
        if words["name"] is None:
            return
        args, failed = [words["dealt"][rank]] if "dealt" in words else words["args"], None
        try:
            said = {"result": plain(getattr(worker, words["name"])(*args))}
        except Exception as error:
            failed = error
            said = {"error": str(error), "by_another": by_another(error)}
        store.set(f"done/{number}/{rank}", json.dumps(said))
        if failed is not None and not isinstance(failed, NonFinite):
            return


def by_another(error: Exception) -> bool:
    """Whether it is what a collective says when another rank is gone: that one is to be named, not
    this."""
    return isinstance(error, dist.DistError) or any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection closed")
    )


def plain(value: Any) -> Any:
    """A result as JSON takes it; what a lead alone has to say is None here."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


def _waited(store: "dist.Store", key: str) -> bytes:
    """Between two calls a run may do anything for as long as it likes; the store goes when rank 0
    does."""
    store.wait([key], timedelta(days=365))
    return bytes(store.get(key))


class Beating:
    """A thread that counts up in the store, by a connection of its own."""

    def __init__(self, host: str, port: int, rank: int) -> None:
        self.store = store_at(host, port, timeout=60.0)
        self.rank, self.stopped = rank, threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
            except Exception:  # rank 0 is gone, and with it whoever would look
                os._exit(1)


# --- processes that rank 0 starts itself
# -------------------------------------------------------------------------------------


@dataclass
class Process:
    """One that follows."""

    rank: int
    process: "subprocess.Popen[bytes]"

    def end(self) -> None:
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


def threads_of(world: int) -> int:
    """Of each process, where all are on this machine: more than there are cores make every one
    wait."""
    return max(min(torch.get_num_threads(), (os.cpu_count() or 1) // world), 1)


def wait_for(started: Sequence[Process], store: "dist.Store", patience: float) -> None:
    """Until all have begun. One that ends before, or does not come within `patience` seconds, is
    lost."""
    until = time.monotonic() + patience
    for one in started:
        while not store.check([HERE.format(one.rank)]):
            if one.process.poll() is not None:
                raise WorkerLost(
                    [one.rank],
                    f"it ended with code {one.process.returncode} before it began; see run.log.",
                )
            if time.monotonic() > until:
                raise WorkerLost(
                    [one.rank], f"it did not begin within {patience:g} s; see run.log."
                )
            time.sleep(0.02)


def own_store() -> "tuple[dist.Store, int]":
    """A store that only this machine can reach, and its port."""
    listening = socket.socket()
    listening.bind((LOOPBACK, 0))
    listening.listen()
    port = listening.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
        multi_tenant=False,
    )
    return _of_this_attempt(store), port


def store_at(host: str, port: int, keeps: bool = False, timeout: float = 300.0) -> "dist.Store":
    """The store there; `keeps`: this process is the one that keeps it."""
    wait = timedelta(seconds=timeout)
    return _of_this_attempt(
        dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=wait)
    )


def _of_this_attempt(store: "dist.Store") -> "dist.Store":
    """Torchrun may keep its store when it starts its ranks again: what they said before is not to
    be heard."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    return dist.PrefixStore(f"attempt {attempt}", store)


def start_followers(world: int, port: int, words: Sequence[str], log: Any) -> list[Process]:
    """`python -m quartet.launch.follower RANK WORLD PORT …` for each other rank; they hear each
    other on loopback only. They get this process's environment, being this machine's; what they
    print goes to the log."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads_of(world)),
    }
    command = [sys.executable, "-m", "quartet.launch.follower"]
    return [
        Process(
            rank,
            subprocess.Popen(
                [*command, str(rank), str(world), str(port), *words],
                env=environment,
                stdout=log,
                stderr=log,
            ),
        )
        for rank in range(1, world)
    ]
