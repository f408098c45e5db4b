"""The store: a small table in rank 0's process, or in torchrun's, that every rank reads and writes
by TCP."""

import os
import socket
import threading
from datetime import timedelta

import torch.distributed as dist

BEAT = 1.0
"""Seconds between two heartbeats."""
LOOPBACK = "127.0.0.1"


def own_store() -> "tuple[dist.Store, int]":
    """Start a store that only this machine can reach, and return it with its port."""
    # torch would listen on all interfaces; it takes over a socket that is bound to loopback.
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


def store_at(host: str, port: int, is_server: bool = False, timeout: float = 300.0) -> "dist.Store":
    """Connect to the store at an address. With `is_server` this process holds the store."""
    wait = timedelta(seconds=timeout)
    return _of_this_attempt(
        dist.TCPStore(host, port, is_master=is_server, wait_for_workers=False, timeout=wait)
    )


def _of_this_attempt(store: "dist.Store") -> "dist.Store":
    """Return the part of the store that belongs to this start of the ranks. torchrun may keep its
    store when it starts them again, with what they wrote before."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    return dist.PrefixStore(f"attempt {attempt}", store)


def beat_key(rank: int) -> str:
    """Return the key under which a rank counts its heartbeats."""
    return f"beat/{rank}"


class Heartbeat:
    """A thread that counts up in the store every `BEAT` seconds. It has a connection of its own,
    since a connection serves one waiting thread at a time."""

    def __init__(self, host: str, port: int, rank: int) -> None:
        self.store = store_at(host, port, timeout=60.0)
        self.rank, self.stopped = rank, threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT):
            try:
                self.store.add(beat_key(self.rank), 1)
            except Exception:  # rank 0 has ended, and nothing is left to do
                os._exit(1)
