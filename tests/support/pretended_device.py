"""A CUDA device that is not there: tensors that hold their numbers on the CPU and say that they are on cuda:0.

To mix devices raises, as CUDA would. Kernels, copies, and everything that the host must wait for are counted, with the place in
Quartet that asked; so are the bytes of what is alive. `Counts` after a call are what a profiler would show of the host's side:
how many kernels the host asks for, not how long they take.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from tests.support.fast_bf16 import PRODUCTS, FastBf16

CUDA = torch.device("cuda", 0)
VIEWS = frozenset(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias as_strided split unbind lift_fresh"
    " split_with_sizes view_as_real view_as_complex _reshape_alias unflatten narrow diagonal unfold chunk real imag lift".split()
)
ALLOCATIONS = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided resize_ set_".split()
)
WAITS = frozenset(
    "nonzero masked_select is_nonzero equal repeat_interleave unique_dim _unique2 unique_consecutive bincount".split()
)
"""Operations whose result has a shape, or is a number, that only the device knows."""
MORE_KERNELS = {
    "index_put_": 1,
    "cumsum": 1,
    "sort": 3,
    "topk": 3,
    "cummax": 1,
    "nonzero": 3,
    "isin": 1,
    "_softmax": 1,
}
"""Kernels of an operation beyond the first, roughly."""
MIXES = frozenset(
    "copy_ index index_put_ index_put _index_put_impl_ _to_copy _foreach_copy_".split()
)
"""Operations that take tensors of two devices."""
FACTORIES = "zeros ones full empty empty_like arange tensor rand randn as_tensor eye linspace randint randperm".split()


class Counts:
    """What was asked of the device since `reset`, by (what, place)."""

    def __init__(self) -> None:
        self.alive, self.peak = 0, 0
        self.storages: set[int] = set()
        """What is alive. A view has its tensor's storage, which is counted once."""
        self.forbid_float64 = False
        self.reset()

    def reset(self) -> None:
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()

    def holds(self, storage: Any) -> None:
        """Count a storage until it is freed."""
        key, number = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.alive += number
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, number)

    def _freed(self, key: int, number: int) -> None:
        self.storages.discard(key)
        self.alive -= number

    def reset_peak(self) -> None:
        self.peak = self.alive


COUNTS = Counts()


def place() -> str:
    """Return the innermost line of Quartet on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/quartet/" in name and "/tests/" not in name:
            return f"{name.rpartition('/quartet/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Pretended(torch.Tensor):
    """A tensor on the device. `inner` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor, requires_grad: bool = False) -> "Pretended":
        # A parameter's view could not be made in inference mode if the wrapper were of that mode, too.
        with torch.inference_mode(False):
            made: Pretended = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                layout=inner.layout, device=inner.device, requires_grad=requires_grad,
            )  # fmt: skip
        made.inner = inner
        COUNTS.holds(inner.untyped_storage())
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def tolist(self) -> Any:
        COUNTS.waits["tolist", place()] += 1
        return self.inner.detach().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.to("cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made: Any = Pretended(self.inner.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        _refuse_strangers(func, name, args, tensors)
        inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
        if kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        out = _computed(func, name, inner_args, inner_kwargs)
        if name == "_local_scalar_dense":
            COUNTS.waits["item", place()] += 1
            return out
        if name == "copy_" and isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
            if isinstance(args[0], Pretended):
                COUNTS.copies["copy_", place()] += 1
            elif kwargs.get("non_blocking") or args[2:] == (True,):
                COUNTS.copies["copy_ to the host", place()] += 1
                return args[0]
            else:
                COUNTS.waits["copy_ to the host", place()] += 1
                return args[0]
        if name in WAITS or _reads_a_mask(name, args):
            COUNTS.waits[name, place()] += 1
        results = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        if COUNTS.forbid_float64 and any(x.dtype == torch.float64 for x in results):
            raise TypeError(f"MPS has no float64: {func}, at {place()}")
        pointers = {x.data_ptr() for x in results}
        is_view = name in {"flatten", "reshape", "contiguous", "to"} and pointers <= {
            _inner(x).data_ptr() for x in tensors
        }
        if name not in VIEWS and name not in ALLOCATIONS and not is_view:
            number = 1 + MORE_KERNELS.get(name, 0)
            if name.startswith("_foreach"):
                number = max(1, len(args[0]) // 100)
            COUNTS.kernels[name, place()] += number
        known = {id(_inner(x)): x for x in tensors}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            # A wrapper does not carry the flag by which torch conjugates and negates lazily.
            return known[id(x)] if id(x) in known else Pretended(x.resolve_conj().resolve_neg())

        return tree_map(wrapped, out)


def _computed(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Return the result of an operation on the CPU."""
    if name == "mm" and "dtype" in func._overloadname:  # bfloat16 that is kept in float32
        return args[0].float() @ args[1].float()
    if name == "histc" and not args[0].is_floating_point():  # a GPU counts integers
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    with FastBf16() if func in PRODUCTS else contextlib.nullcontext():
        return func(*args, **kwargs)


def _refuse_strangers(func: Any, name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise where an operation is given tensors of the CPU that it cannot take."""
    strangers = [x for x in tensors if not isinstance(x, Pretended) and x.dim() > 0]
    if strangers and (
        name not in MIXES or ("index" in name and not isinstance(args[0], Pretended))
    ):
        raise RuntimeError(
            f"all tensors must be on one device: {func} got cuda:0 and cpu, at {place()}"
        )
    if strangers and "index" in name:
        COUNTS.copies["index from the host", place()] += len(strangers)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


def _reads_a_mask(name: str, args: Any) -> bool:
    """Return whether an index is a mask: how many places it has only the device knows."""
    return name in {"index", "index_put_", "index_put", "_index_put_impl_"} and any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
    )


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _factory(name: str, real: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        if not _is_there(kwargs.get("device")):
            return real(*args, **kwargs)
        data = real(*args, **{**kwargs, "device": "cpu"})
        if isinstance(data, Pretended):
            return data
        if COUNTS.forbid_float64 and data.dtype == torch.float64:
            raise TypeError(f"MPS has no float64: torch.{name}, at {place()}")
        if name in {"tensor", "as_tensor"}:
            COUNTS.copies["torch.tensor", place()] += 1
        elif not name.startswith("empty"):
            COUNTS.kernels[name, place()] += 1
        return Pretended(data.detach(), data.requires_grad)

    return made


def _to(real: Any) -> Any:
    def to(tensor: Any, *rest: Any, **kwargs: Any) -> Any:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for each in rest:
            if isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, torch.Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, str | torch.device):
                device = each
        if device is None:
            return real(tensor, *rest, **kwargs)
        if _is_there(device):
            if isinstance(tensor, Pretended):
                return tensor if dtype in {None, tensor.dtype} else real(tensor, dtype)
            COUNTS.copies["to the device", place()] += 1
            data = tensor.detach()
            return Pretended(
                data.clone() if dtype in {None, data.dtype} else real(data, dtype),
                tensor.requires_grad,
            )
        if isinstance(tensor, Pretended):
            COUNTS.waits["to the host", place()] += 1
            data = tensor.inner.detach().clone()
            return data if dtype is None else real(data, dtype)
        return real(tensor, *rest, **kwargs)

    return to


class _OneKernel(torch.autograd.Function):
    """A function that is one kernel on CUDA, and two for its gradients."""

    @staticmethod
    def forward(ctx: Any, name: str, function: Any, *tensors: Any) -> Any:
        ctx.name, ctx.function = name, function
        ctx.save_for_backward(*tensors)
        COUNTS.kernels[name, place()] += 1
        with torch.no_grad():
            return Pretended(function(*(t.inner.detach() for t in tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        COUNTS.kernels[ctx.name + " backward", "autograd"] += 2
        inner = [t.inner.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            found = torch.autograd.grad(ctx.function(*inner), inner, grads[0].inner)
        return None, None, *map(Pretended, found)


def _rms_norm(real: Any) -> Any:
    def rms_norm(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
        if not isinstance(x, Pretended):
            return real(x, shape, weight, eps)
        if weight is None:
            return _OneKernel.apply("rms_norm", lambda a: real(a, shape, None, eps), x)  # type: ignore[no-untyped-call]
        return _OneKernel.apply("rms_norm", lambda a, w: real(a, shape, w, eps), x, weight)  # type: ignore[no-untyped-call]

    return rms_norm


def plain_varlen(
    q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, *_: Any, **named: Any
) -> Any:
    """What `torch.nn.attention.varlen.varlen_attn` computes, one sequence at a time, on the CPU."""
    used = named.get("seqused_k")
    ends, outputs = starts_k[1:] if used is None else starts_k[:-1] + used, []
    for row in range(len(starts_q) - 1):
        mine = q[starts_q[row] : starts_q[row + 1]].transpose(0, 1)
        keys, values = (x[starts_k[row] : ends[row]].transpose(0, 1) for x in (k, v))
        # As flash attention counts: the last query is at the last key, and sees `left` keys before it.
        behind = keys.shape[1] - mine.shape[1] + torch.arange(mine.shape[1])[:, None]
        behind = behind - torch.arange(keys.shape[1])
        left, right = named.get("window_size", (-1, -1))
        seen = (left < 0) | (behind <= left)
        seen = seen & ((right < 0) | (-behind <= right))
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                mine[None], keys[None], values[None], attn_mask=seen,
                scale=named["scale"], enable_gqa=named["enable_gqa"],
            )[0].transpose(0, 1)
        )  # fmt: skip
    return torch.cat(outputs)


def _varlen(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, *rest: Any, **named: Any) -> Any:
    if q.dtype not in {torch.bfloat16, torch.float16}:
        raise RuntimeError("varlen_attn takes half precision only")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        raise RuntimeError(f"varlen_attn takes no heads of {q.shape[-1]} coordinates")
    inner = {name: _inner(value) for name, value in named.items()}

    def attend(a: Any, b: Any, c: Any) -> Any:
        return plain_varlen(a, b, c, _inner(starts_q), _inner(starts_k), **inner)

    return _OneKernel.apply("varlen_attn", attend, q, k, v)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def pretended(forbid_float64: bool = False) -> Iterator[Counts]:
    """Have `device="cuda"` make pretended tensors inside the context. `forbid_float64`: as on MPS."""
    from quartet.generation import fused
    from quartet.models import attention, elementwise

    varlen = torch.nn.attention.varlen
    places: list[tuple[Any, str, Any]] = [
        (torch, name, _factory(name, getattr(torch, name))) for name in FACTORIES
    ]
    places += [(torch.Tensor, "to", _to(torch.Tensor.to))]
    places += [(varlen, "varlen_attn", _varlen), (attention, "HAS_VARLEN", True)]
    places += [
        (module, "rms_norm", _rms_norm(torch.nn.functional.rms_norm))
        for module in (elementwise, fused)
    ]
    # torch has no kernel here for what it takes for tensors of the CPU
    places += [(attention, "kernel", lambda kind: contextlib.nullcontext())]
    card = {"mem_get_info": (60 * 10**9, 80 * 10**9), "memory_reserved": 0, "memory_allocated": 0}
    card["get_device_capability"] = (9, 0)
    places += [(torch.cuda, name, lambda *_, value=value: value) for name, value in card.items()]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    COUNTS.forbid_float64 = forbid_float64
    COUNTS.reset()
    _forget_levels()
    for owner, name, new in places:
        setattr(owner, name, new)
    try:
        yield COUNTS
    finally:
        COUNTS.forbid_float64 = False
        for owner, name, old in before:
            setattr(owner, name, old)
        _forget_levels()


def _forget_levels() -> None:
    """Have bitsandbytes make its table of 8-bit levels anew: it keeps one for all, on the first device that asks."""
    if functional := sys.modules.get("bitsandbytes.functional"):
        functional.name2qmap.clear()


def on_device(module: Any) -> Any:
    """Move the parameters and buffers of a module to the device, and the scales of its weights in 4 bits, and return it. `Module.to`
    puts other data into the same parameters, which a pretended tensor cannot take: so a skeleton is filled on the CPU first."""
    memo: dict[int, Any] = {}
    for each in module.modules():
        if (scales := getattr(each, "quant_state", None)) is not None:
            scales.to(CUDA)
        for name, p in list(each._parameters.items()):
            if p is not None and not isinstance(p, Pretended):
                if id(p) not in memo:
                    data = Pretended(p.detach().clone())
                    memo[id(p)] = torch.nn.Parameter(data, requires_grad=p.requires_grad)
                each._parameters[name] = memo[id(p)]
        for name, buffer in list(each._buffers.items()):
            if buffer is not None and not isinstance(buffer, Pretended):
                each._buffers[name] = Pretended(buffer.detach().clone())
    return module
