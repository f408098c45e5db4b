"""CUDA graphs and streams for a device that is not there: a graph that repeats the operations that it has recorded.

As on a GPU, a replay reads and writes the tensors of then, and knows no Python number that has changed since; and what waits for the host
cannot be recorded.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from tests.support.pretended_device import Pretended

WAITS = frozenset({"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"})


class Stream:
    """A stream on which nothing is ordered. It keeps which streams it was told to wait for."""

    def __init__(self, device: Any = None) -> None:
        self.device = device
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


class Graph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    made: ClassVar["list[Graph]"] = []

    def __init__(self) -> None:
        super().__init__()
        self.repeats: list[Callable[[], Any]] = []
        self.replays, self.paused, self.failed = 0, False, False
        self.made.append(self)

    def capture_begin(self, capture_error_mode: str) -> None:
        self.mode, self.stream = capture_error_mode, torch.cuda.current_stream()
        self.__enter__()
        varlen = torch.nn.attention.varlen
        self.attention = varlen.varlen_attn
        varlen.varlen_attn = self.attend  # type: ignore[assignment]

    def capture_end(self) -> None:
        torch.nn.attention.varlen.varlen_attn = self.attention
        self.__exit__(None, None, None)
        if self.failed:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for repeat in self.repeats:
                repeat()

    def attend(self, *args: Any, **named: Any) -> Any:
        """Record attention as one kernel: its stand-in reads lengths on the host."""
        self.paused = True
        try:
            out = self.attention(*args, **named)
        except RuntimeError:
            self.failed = True
            raise
        self.paused = False
        self.repeats.append(lambda: _numbers(out).copy_(_numbers(self.attention(*args, **named))))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func.overloadpacket.__name__ in WAITS:
            self.failed = True
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        storages = {_numbers(x).untyped_storage().data_ptr() for x in given}
        made = [
            x
            for x in tree_flatten(out)[0]
            if isinstance(x, torch.Tensor)
            and _numbers(x).untyped_storage().data_ptr() not in storages
        ]
        is_new = bool(made) or any(x is y for x in tree_flatten(out)[0] for y in given)

        def repeat() -> None:
            found = [
                x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)
            ]
            for before, now in zip(made, found, strict=False):
                _numbers(before).copy_(_numbers(now))

        if is_new:  # a view of something follows it by itself
            self.repeats.append(repeat)
        return out


def _numbers(x: Any) -> torch.Tensor:
    return x.inner if isinstance(x, Pretended) else x


@contextlib.contextmanager
def graphs(patch: Callable[..., None], free: int = 60 * 10**9) -> Iterator[list[Graph]]:
    """Have the device record steps inside the context. `patch` is that of pytest's monkeypatch; the graphs are in the list."""
    from quartet.generation import slots

    Graph.made, streams = [], [Stream("main")]
    card: dict[str, Any] = {"Stream": Stream, "CUDAGraph": Graph}
    card["current_stream"] = lambda *_: streams[-1]
    card["mem_get_info"] = lambda *_: (free, 80 * 10**9)
    card["device"] = lambda _: contextlib.nullcontext()

    @contextlib.contextmanager
    def stream(other: Stream) -> Iterator[None]:
        streams.append(other)
        try:
            yield
        finally:
            streams.pop()

    patch(slots, "_can_record", lambda *_: True)
    patch(slots, "_NOT_RECORDED", set())
    for name, value in (card | {"stream": stream}).items():
        patch(torch.cuda, name, value)
    slots._side_stream.cache_clear()
    try:
        yield Graph.made
    finally:
        slots._side_stream.cache_clear()
        assert [each.device for each in streams] == ["main"], "a stream was not left"
