"""Products in bfloat16 at the speed of float32, on CPUs that have no instructions for bfloat16.

Such a CPU multiplies bfloat16 matrices ten to twenty times as slowly as float32 ones. Here their
numbers are multiplied and added in float32 and the result is rounded, which is what a GPU's tensor
cores do.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class FastBf16(TorchDispatchMode):
    """A context in which products of bfloat16 matrices are computed in float32 and rounded."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[-1].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        exact = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, args)
        return func(*exact, **kwargs).to(torch.bfloat16)
