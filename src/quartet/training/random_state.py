"""The state of random number generators, as a checkpoint holds it."""

import random
from typing import Any

import numpy as np
import torch

from quartet.training.state_tree import Tree


class GlobalRandom:
    """The global generators of torch, Python and numpy. Quartet has generators of its own; a user's
    environment or reward may draw from these."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def state(self) -> Tree:
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
            "numpy": [
                kind,
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                position,
                has_gauss,
                gauss,
            ],
        }

    def load_state(self, state: Tree) -> None:
        torch.set_rng_state(state["torch"])
        # A run may go on with another number of GPUs; their generators then start anew.
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(python_random(state["python"]))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def python_random(state: Tree) -> tuple[Any, ...]:
    """Return the argument of `random.setstate` from the lists that JSON made of its tuples."""
    version, keys, gauss = state
    return version, tuple(keys), gauss
