"""Main memory for a machine that has no other: what rests there is absurd until it comes back."""

import torch

from quartet.distributed import offload as placement
from quartet.distributed.sharding import local_tensor
from quartet.training import checksum
from quartet.training.optim import Optimizer

ABSURD = 2.0**100


class Bed:
    """Tensors that rest, by the number that stands in place of theirs."""

    def __init__(self):
        self.there, self.count = {}, 0

    def moved(self, tensor, device):
        if device != torch.device("meta"):
            return self.there.pop(name_of(tensor), tensor)
        if name_of(tensor) is None or name_of(tensor) in self.there:
            return tensor
        self.count += 1
        dreaming = torch.full_like(tensor, ABSURD * (1 + self.count / 2**20))
        self.there[name_of(dreaming)] = tensor.detach()
        return dreaming

    def truth(self, tensor):
        """What is read where it rests."""
        return self.there.get(name_of(tensor), tensor)

    @property
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
    patch(placement, "MAIN_MEMORY", torch.device("meta"))
    patch(placement, "moved", bed.moved)
    return bed
