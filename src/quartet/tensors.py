"""Torch at first use, and the vocabulary of shapes.

A part is both a piece of a config and a formula. Reading a config should not wait seconds for
torch, so the files that hold parts take `torch` from here: a stand-in that imports the real module
when a formula first runs. Annotations such as `Float[Tensor, "B T"]` (B sequences, T tokens, V
vocabulary) are for readers, type checkers and tests: the test suite sets QUARTET_CHECK_SHAPES and
has each one checked at every call.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or os.environ.get("QUARTET_CHECK_SHAPES"):
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
else:

    class _LazyTorch:
        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module("torch"), name)
            setattr(self, name, value)  # the next look-up is an ordinary attribute
            return value

    class _AnyShape:
        def __class_getitem__(cls, _: object) -> Any:
            return Any

    torch = _LazyTorch()
    Tensor = Any
    Bool = Float = Int = _AnyShape

FINITE_ELEMENTS = 2**22
"""Elements that `is_finite` looks at together: it needs temporary tensors of that size."""


def is_finite(tensor: "Tensor") -> bool:
    """Return whether no element is NaN or infinite. torch's own test of a whole embedding takes
    temporary memory of 1.25 times its size."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    return all(bool(piece.isfinite().all()) for piece in flat.split(FINITE_ELEMENTS))


__all__ = ["Bool", "Float", "Int", "Tensor", "is_finite", "torch"]
