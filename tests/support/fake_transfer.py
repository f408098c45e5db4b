"""vLLM's weight transfer on one machine without GPUs: gloo stands in for NCCL."""

import base64
import math
import os
import threading
from datetime import timedelta

import torch
from torch.distributed import HashStore, ProcessGroupGloo

STORES = {}
"""The store in which the ranks of a group meet, by the group's id."""
SECONDS = 5
"""How long gloo waits for another rank; NCCL waits until its group is aborted."""


class LazyGroup:
    """A group that its ranks make in its first collective, as NCCL's do."""

    def __init__(self, store, rank, size):
        self.joining, self.group, self.aborted = (store, rank, size), None, threading.Event()

    def _joined(self):
        if self.group is None:
            self.group = ProcessGroupGloo(*self.joining, timedelta(seconds=SECONDS))
        return self.group

    def allreduce(self, tensors):
        return self._joined().allreduce(tensors)

    def broadcast(self, tensor, root):
        return self._joined().broadcast(tensor, root)

    def abort(self):
        self.aborted.set()
        if self.group is not None:
            self.group.abort()


def open_gloo(size):
    """What `open_nccl` returns, for a CPU."""
    store, name = HashStore(), os.urandom(128)
    STORES[name] = store
    return LazyGroup(store, 0, size), lambda: name


class Refused(Exception):
    def __init__(self, sentence, code=400):
        super().__init__(sentence)
        self.code = code


class Receiver:
    """The workers of one server."""

    def __init__(self, workers=1):
        self.workers, self.groups, self.updating, self.received = workers, [], False, {}
        self.chunks = 0

    def init(self, asked, _):
        info = asked["init_info"]
        assert info["rank_offset"] == 1 and info["world_size"] == 1 + self.workers
        assert info["packed"] and info["packed_num_buffers"] == 2
        self.limit = info["packed_buffer_size_bytes"]
        store = STORES[base64.b64decode(info["nccl_unique_id_b64"], validate=True)]
        self.groups = [LazyGroup(store, 1 + n, 1 + self.workers) for n in range(self.workers)]
        self._each(lambda group: group.allreduce([torch.zeros(1)]).wait())
        return {"message": "Weight transfer initialized"}

    def start(self, *_):
        if self.updating:
            raise Refused("start_weight_update called while a weight update is active", 500)
        self.updating, self.received, self.chunks = True, {}, 0
        return {"message": "Weight update started"}

    def update(self, asked, _):
        assert self.updating
        info = asked["update_info"]
        rows = list(zip(info["names"], info["dtype_names"], info["shapes"], strict=True))
        while rows:
            chunk, size = [], 0
            while rows and size <= self.limit:
                name, dtype, shape = rows.pop(0)
                chunk.append((name, getattr(torch, dtype), shape))
                size += math.prod(shape) * chunk[-1][1].itemsize
            packed = [torch.empty(size, dtype=torch.uint8) for _ in self.groups]
            self._each(
                lambda group, mine=packed: group.broadcast(mine[self.groups.index(group)], 0).wait()
            )
            assert all(torch.equal(packed[0], other) for other in packed)
            self.chunks += 1
            start = 0
            for name, dtype, shape in chunk:
                end = start + math.prod(shape) * dtype.itemsize
                self.received[name] = packed[0][start:end].clone().view(dtype).view(shape)
                start = end
        return {"message": "Weights updated"}

    def finish(self, *_):
        assert self.updating
        self.updating = False
        return {"message": "Weight update finished"}

    def _each(self, collective):
        threads = [threading.Thread(target=collective, args=(group,)) for group in self.groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
