"""Causal attention, and which kernel computes it.

torch chooses a kernel by an order of its own: on a GPU it may take cuDNN's, which builds a plan for
every new shape, and for float32 with grouped heads one that keeps a T × T matrix for each head.
Here the kernel is named for each device and dtype (`backend`), and the same table is tested.

| device | dtype             | back end  | what it takes                                          |
|--------|-------------------|-----------|--------------------------------------------------------|
| CPU    | any               | rectangle | rows padded to one width; torch's CPU flash kernel     |
| CUDA   | bfloat16, float16 | varlen    | rows end to end, flash attention with their starts     |
| CUDA   | float32, float64  | efficient | rectangles, grouped keys and values repeated           |
| others | any               | repeated  | rectangles, grouped keys and values repeated           |

torch before 2.12 has no grouped heads in `varlen_attn`; there half precision on CUDA takes flash
attention on rectangles ("flash").
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.functional import scaled_dot_product_attention

from quartet.models.packing import Packed, repacked, unpacked
from quartet.tensors import Float, Int, Tensor

Backend = Literal["rectangle", "varlen", "flash", "efficient", "repeated"]
HAS_VARLEN = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Return what computes attention on a device in a dtype."""
    if device.type == "cpu":
        return "rectangle"
    if device.type != "cuda":
        return "repeated"
    if dtype not in {torch.bfloat16, torch.float16}:
        return "efficient"
    return "varlen" if HAS_VARLEN else "flash"


def causal_attention(
    queries: Float[Tensor, "N heads D"],
    keys: Float[Tensor, "N kv D"],
    values: Float[Tensor, "N kv D"],
    packed: Packed,
    scale: float,
) -> Float[Tensor, "N heads D"]:
    """Return softmax(q kᵀ · scale) v of each packed sequence. A token attends to itself and to
    those before it in its own sequence, so no real token attends to padding behind it."""
    kind = backend(queries.device, queries.dtype)
    grouped = queries.shape[1] != keys.shape[1]
    if kind == "varlen":
        flash = varlen.varlen_attn(
            queries,
            keys,
            values,
            packed.starts,
            packed.starts,
            packed.width,
            packed.width,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=grouped,
        )
        assert isinstance(flash, torch.Tensor)
        return flash
    if grouped and kind in {"efficient", "repeated"}:
        times = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
        grouped = False
    q, k, v = (unpacked(x, packed).transpose(1, 2) for x in (queries, keys, values))
    with kernel(kind):
        attended = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    return repacked(attended.transpose(1, 2), packed)


def slot_attention(
    queries: Float[Tensor, "B heads D"],
    cache: Float[Tensor, "B columns kv2 D"],
    lengths: Int[Tensor, "B"],
    starts: tuple[Int[Tensor, "B1"], Int[Tensor, "B1"]],
    scale: float,
) -> Float[Tensor, "B heads D"]:
    """Return the attention of one query per row over the first `lengths` columns of its slot.

    `cache` holds the keys of each column before its values. `starts`, in int32, says where each
    row begins: among the queries, which is 0, 1, …, B, and in the cache, that times the columns. No
    shape depends on the lengths, so that a CUDA graph can hold the call.
    """
    kv, columns = cache.shape[2] // 2, cache.shape[1]
    keys, values = cache[:, :, :kv], cache[:, :, kv:]
    grouped = queries.shape[1] != kv
    if backend(queries.device, queries.dtype) == "varlen":
        attended = varlen.varlen_attn(
            queries,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            *starts,
            1,
            columns,
            scale=scale,
            enable_gqa=grouped,
            seqused_k=lengths,
        )
        assert isinstance(attended, torch.Tensor)
        return attended
    behind = torch.arange(columns, device=queries.device) >= lengths[:, None]
    mask = torch.where(behind, -torch.inf, 0.0).to(queries.dtype)[:, None, None]
    rows = scaled_dot_product_attention(
        queries[:, :, None],
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=grouped,
    )
    return rows[:, :, 0]


def kernel(kind: Backend) -> AbstractContextManager[None]:
    """Return a context in which `scaled_dot_product_attention` takes the kernel of a back end, and
    raises where it cannot."""
    if kind == "flash":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION])
    if kind == "efficient":
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION])
    return nullcontext()
