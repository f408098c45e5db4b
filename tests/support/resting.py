"""Main memory for a machine that has no other: what rests there is absurd until it comes back, and what is on its way is absurd
until it is waited for."""

import functools
import threading

import torch

from quartet.distributed import offload as placement
from quartet.distributed.sharding import local_tensor
from quartet.training import checksum
from quartet.training.optim import Optimizer

ABSURD = 2.0**100


def in_turn(method):
    @functools.wraps(method)
    def called(bed, *args):
        with bed.turn:
            return method(bed, *args)

    return called


class Bed:
    """A `Transfer` that keeps tensors that rest by the number that stands in place of theirs.

    Threads take turns: with a staleness, one samples and scores while another learns.
    """

    def __init__(self):
        self.turn = threading.RLock()
        self.there, self.count = {}, 0
        self.waited = 0  # copies that have arrived
        self.coming = []
        """(copy, true tensor) of what is on its way to the device; it arrives when it is waited for."""

    @in_turn
    def store(self, tensor, buffer=None):
        self.wait(self.mark())
        if buffer is not None:
            self.there.pop(name_of(buffer), None)
        if name_of(tensor) is None or name_of(tensor) in self.there:
            return tensor
        self.count += 1
        dreaming = torch.full_like(tensor, ABSURD * (1 + self.count / 2**20))
        self.there[name_of(dreaming)] = tensor.detach()
        return dreaming

    @in_turn
    def load(self, tensor):
        if name_of(tensor) not in self.there:
            return tensor
        true = self.there[name_of(tensor)]
        copy = torch.full_like(true, ABSURD)
        self.coming.append((copy, true))
        return copy

    @in_turn
    def mark(self):
        return self.waited + len(self.coming)

    @in_turn
    def wait(self, mark):
        while self.coming and self.waited < mark:
            copy, true = self.coming.pop(0)
            local_tensor(copy).copy_(local_tensor(true))
            self.waited += 1

    def settle(self):
        pass

    @in_turn
    def truth(self, tensor):
        """What is read where it rests."""
        return self.there.get(name_of(tensor), tensor)

    @property
    @in_turn
    def bytes(self):
        return sum(local_tensor(tensor).nbytes for tensor in self.there.values())


def name_of(tensor):
    part = local_tensor(tensor)
    return float(part.flatten()[0]) if part.is_floating_point() and part.numel() else None


def made(patch):
    """A bed that all rest in. `patch(module, name, value)` puts it there. What rests may be read as it is, to be compared and
    to be saved; not worked with."""
    bed, bits, state = Bed(), checksum._bits, Optimizer.state

    def saved(optimizer):
        made = state(optimizer)
        return made | {
            "moments": [
                {name: bed.truth(t) for name, t in moments.items()} for moments in made["moments"]
            ]
        }

    patch(checksum, "_bits", lambda parameter: bits(bed.truth(parameter)))
    patch(Optimizer, "state", saved)
    patch(placement, "Transfer", lambda device: bed)
    return bed
