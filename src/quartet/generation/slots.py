"""The decoder for GPUs: fixed slots, few shapes, and a whole step as one CUDA graph.

A GPU computes a decoding step of a small model in less time than the host needs to ask for its
kernels. Here the host asks once: a step reads and writes tensors that stay where they are, its
shapes are the number of slots and of columns from a small set, and it is recorded as a CUDA graph
for each pair. Whether rows have ended is looked at every `LOOK_EVERY` tokens only.
"""

import contextlib
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quartet.generation.cache import MIN_ROWS, PREFILL_TOKENS, spans_within
from quartet.generation.fused import FusedDecoder
from quartet.models.attention import slot_attention
from quartet.models.packing import pack_rows
from quartet.models.protocols import CausalModel
from quartet.tensors import Bool, Float, Int, Tensor

LOOK_EVERY = 8
"""After how many tokens it is checked which rows have ended."""
COLUMNS = 256
"""A cache has a power of two times so many columns."""
SMALLEST = 8
"""The smallest number of slots that are computed."""
log = logging.getLogger(__name__)
_NOT_RECORDED: set[torch.device] = set()
"""Devices on which recording a step has failed."""
WARM_UPS = 2
"""Steps of so many slots before one is recorded: kernels are chosen, and workspaces allocated, at
first use. What ends sooner is not recorded at all."""
ROOM = 2**29
"""Free memory of a GPU, in bytes beside some copies of the logits, without which cached memory is
freed before a step is recorded: meanwhile torch's allocator cannot free any."""


def bucket(count: int, smallest: int, largest: int) -> int:
    """Return the smallest of `smallest`, 2 · `smallest`, 4 · `smallest`, …, `largest` that is not
    below `count`."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)


class SlotDecoder(FusedDecoder):
    """Decodes in slots of one cache.

    Each block's cache is one tensor [slots, columns, 2 · kv heads, D], the keys before the values.
    Row i is in slot i. When rows leave, the last rows move into their slots, and steps compute a
    smaller bucket of slots. Where columns run out, they are doubled.
    """

    look_every = LOOK_EVERY

    @torch.inference_mode()
    def __init__(self, model: CausalModel, width: int, max_rows: int | None = None) -> None:
        # a row that has ended grows until the next check
        super().__init__(model, width, max_rows, width + LOOK_EVERY)
        if max_rows is None:  # columns come in powers of two: count those that there will be
            share = self.width / bucket(self.width, COLUMNS, 2**30)
            self.max_rows = max(int(self.max_rows * share), MIN_ROWS)
        self.rows, self.longest = 0, 0
        """The rows there are, and the length of the longest. Both are known without the device."""
        shape = (0, 0, 2 * self.kv_heads, self.head_size)
        self.caches = [torch.zeros(shape, dtype=self.dtype, device=self.device)] * len(self.blocks)
        self.slots, self.columns = 0, 0
        self.lengths = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)
        self.starts = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.replays: dict[int, Callable[[], Tensor]] = {}
        """What replays a recorded step, by the number of slots that it computes."""
        self.computed: Counter[int] = Counter()
        """The steps that were computed without a graph, by their number of slots."""

    def free_rows(self) -> int:
        return self.max_rows - self.rows

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "B V"]:
        sizes = [len(prompt) for prompt in prompts]
        before, added = self.rows, len(prompts) * copies
        self._resize(before + added, max(self.longest, *sizes) + LOOK_EVERY)
        logits = []
        for start, stop in spans_within(sizes, PREFILL_TOKENS):
            packed = pack_rows(prompts[start:stop], self.device)
            slots = before + copies * torch.arange(start, stop)
            slots = slots.repeat_interleave(torch.tensor(packed.lengths)).to(self.device)
            logits.append(self._prefill_packed(packed, slots))
        if copies > 1:
            for cache in self.caches:
                rows = cache[before : before + added, : max(sizes)]
                rows = rows.unflatten(0, (len(prompts), copies))
                rows[:, 1:] = rows[:, :1]
        lengths = torch.tensor(sizes, dtype=torch.int32).repeat_interleave(copies)
        self.lengths[before : before + added] = lengths.to(self.device, non_blocking=True)
        self.rows, self.longest = before + added, max(self.longest, *sizes)
        return torch.cat(logits).repeat_interleave(copies, 0, output_size=added)

    def _store(
        self,
        cache: Tensor,
        slots: Int[Tensor, "N"],
        places: Int[Tensor, "N"],
        keys_and_values: Float[Tensor, "N kv2 D"],
    ) -> None:
        cache[slots, places] = keys_and_values

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        self._resize(self.rows, self.longest + 1)
        count = bucket(self.rows, SMALLEST, self.slots)
        self.tokens[: self.rows] = tokens
        logits = self._next_logits(count)
        self.longest += 1
        return logits[: self.rows]

    def _next_logits(self, count: int) -> Float[Tensor, "n V"]:
        """Compute a step of so many slots and return its logits: on a GPU by the replay of a graph,
        once some steps have been computed without one.

        Where a step cannot be recorded, its kernels are asked for one by one, and the log says so.
        """

        def eager() -> Tensor:
            logits = self._step(count)
            self.lengths[:count] += 1
            return logits

        if count in self.replays:
            return self.replays[count]()
        has_experts = any(block.up is None for block in self.blocks)
        if self.device in _NOT_RECORDED or not _can_record(self.device, has_experts):
            return eager()
        self.computed[count] += 1
        if self.computed[count] <= WARM_UPS:
            with self._beside():
                return eager()
        lengths, handled = self.lengths.clone(), sys.exception()
        try:
            self.replays[count] = self._recorded(count, eager)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = _first_error(error, handled)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            _NOT_RECORDED.add(self.device)
            log.warning(
                "a decoding step cannot be recorded as a CUDA graph (%s). Sampling goes on without "
                "graphs, which is slower.",
                cause,
            )
        finally:
            self.lengths.copy_(lengths)
        return self.replays.get(count, eager)()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Have what is asked for inside the block computed on the stream that steps are recorded
        on, in order with what is asked for before and after it."""
        with torch.cuda.device(self.device):  # a new thread's current device is the first one
            stream, current = _side_stream(self.device), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                yield
            current.wait_stream(stream)

    def _recorded(self, count: int, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the replay of a step that is recorded as a graph. Nothing is computed meanwhile.

        `torch.cuda.graph` would wait for the device and free all cached memory before each
        recording, of which there are several in a rollout.
        """
        graph = torch.cuda.CUDAGraph()
        with self._beside():
            logits_bytes = torch.float32.itemsize * count * len(self.embedding.table)
            if torch.cuda.mem_get_info(self.device)[0] < 8 * logits_bytes + ROOM:
                torch.cuda.empty_cache()
            # "thread_local": another thread may train meanwhile, and may ask for memory.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                logits = step()
            finally:
                graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _step(self, count: int) -> Float[Tensor, "B V"]:
        """Append the tokens to the first `count` slots and return the logits after them."""
        lengths, known = self.lengths[:count], self.lengths[:count] + 1
        starts = self.starts[: count + 1], self.starts[: count + 1] * self.columns
        places = (starts[1][:-1] + lengths).long()
        long = lengths.long()
        factors, x = self._factors_at(long), self.embedding(self.tokens[:count], long)
        for block, cache in zip(self.blocks, self.caches, strict=True):
            layer = block.layer
            heads = block.project_qkv(x, factors[layer.rotation])
            cache.flatten(0, 1).index_copy_(0, places, heads[:, self.heads :])
            attended = slot_attention(
                heads[:, : self.heads],
                cache[:count],
                known,
                starts,
                layer.scale,
                layer.window,
                layer.cap,
            )
            x = block.residuals(x, attended.flatten(1))
        return self._logits(x)

    @torch.inference_mode()
    def keep(self, unfinished: Bool[Tensor, "B"]) -> Int[Tensor, "n"]:
        kept = unfinished.cpu().nonzero()[:, 0]
        order = torch.arange(len(kept))
        # Slots 0 … len(kept) − 1 stay in use. Each finished row among them is a hole, and the kept
        # rows above fill the holes in turn.
        holes = (order[:, None] == kept).any(1).logical_not().nonzero()[:, 0]
        movers = kept[kept >= len(kept)]
        order[holes] = movers
        order, holes, movers = (x.to(self.device) for x in (order, holes, movers))
        for cache in self.caches:
            cache[holes, : self.longest] = cache[movers, : self.longest]
        self.lengths[: len(order)] = self.lengths[order]
        # What is left behind is never read, and must stay within the cache.
        self.lengths[len(order) :] = 0
        self.rows = len(order)
        self.longest = int(self.lengths.max()) if len(order) else 0
        return order

    def _resize(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns. Recorded steps are of the old cache."""
        if rows <= self.slots and columns <= self.columns:
            return
        # The samples of one prompt are decoded together, also where they are more than `max_rows`.
        slots = bucket(max(rows, self.slots), SMALLEST, max(self.max_rows, rows, SMALLEST))
        wide = bucket(max(columns, self.columns), COLUMNS, 2**30)
        self.replays.clear()  # a graph holds memory of its own
        self.computed.clear()
        shape = (slots, wide, 2 * self.kv_heads, self.head_size)
        live, until = min(self.rows, self.slots), self.longest
        for number, old in enumerate(self.caches):
            # Entries are 0 and not uninitialized: a kernel may multiply masked ones by 0.
            self.caches[number] = old.new_zeros(shape)
            self.caches[number][:live, :until] = old[:live, :until]
        lengths, tokens = self.lengths, self.tokens
        self.lengths, self.tokens = lengths.new_zeros(slots), tokens.new_zeros(slots)
        self.lengths[: len(lengths)], self.tokens[: len(tokens)] = lengths, tokens
        self.starts = torch.arange(slots + 1, dtype=torch.int32, device=self.device)
        self.slots, self.columns = slots, wide


def _first_error(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return what a recording failed of. The end of a recording that failed raises, too, and says
    of the first error only that there was one. `handled` was being handled when it began."""
    while error.__context__ not in {None, handled}:
        error = error.__context__
    return error


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """Return the stream that steps of a device are recorded on. It is always the same: cuBLAS keeps
    a workspace for every stream that has multiplied, 32 MiB each on Hopper."""
    return torch.cuda.Stream(device)


def _can_record(device: torch.device, has_experts: bool) -> bool:
    """Return whether steps can be CUDA graphs on a device. On GPUs before Hopper, torch's grouped
    product for experts may wait for the host, which a graph cannot."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return not has_experts or torch.cuda.get_device_capability(device) >= (9, 0)
