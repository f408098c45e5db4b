"""Causal attention, and which kernel computes it.

torch chooses a kernel by an order of its own: on a GPU it may take cuDNN's, which builds a plan for
every new shape, and for float32 with grouped heads one that keeps a T × T matrix for each head.
Here the kernel is named for each device and dtype (`backend`), and the same table is tested.

| device | dtype             | back end  | what it takes                                          |
|--------|-------------------|-----------|--------------------------------------------------------|
| CPU    | any               | rectangle | rows padded to one width; torch's CPU flash kernel     |
| CUDA   | bfloat16, float16 | varlen    | rows end to end, flash attention with their starts     |
| CUDA   | float32           | efficient | rectangles, grouped keys and values repeated           |
| others | any               | repeated  | rectangles, grouped keys and values repeated           |

torch before 2.12 has no grouped heads in `varlen_attn`; there half precision on CUDA takes flash
attention on rectangles ("flash"). Flash attention takes heads of a multiple of 8 coordinates, at
most `FLASH_HEAD_SIZE`; other heads are computed as in float32.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.functional import scaled_dot_product_attention

from quartet.models.packing import Packed, repacked, repeated, unpacked
from quartet.tensors import Bool, Float, Int, Tensor

Backend = Literal["rectangle", "varlen", "flash", "efficient", "repeated"]
HAS_VARLEN = {"enable_gqa", "seqused_k"} <= {*inspect.signature(varlen.varlen_attn).parameters}
FLASH_HEAD_SIZE = 256
"""The most coordinates of a head that torch's flash attention takes."""


def backend(device: torch.device, dtype: torch.dtype, head_size: int) -> Backend:
    """Return what computes attention on a device in a dtype, for heads of `head_size`
    coordinates."""
    if device.type == "cpu":
        return "rectangle"
    if device.type != "cuda":
        return "repeated"
    if dtype not in {torch.bfloat16, torch.float16}:
        return "efficient"
    if head_size % 8 or head_size > FLASH_HEAD_SIZE:
        return "efficient"
    return "varlen" if HAS_VARLEN else "flash"


def why_padded(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return a sentence where torch is too old for the attention that this device has in newer
    ones; None where it has it."""
    if HAS_VARLEN or backend(device, dtype, 8) != "flash":
        return None
    return (
        f"torch {torch.__version__} has no attention over rows end to end with grouped heads: rows "
        "are padded, and sampling records no CUDA graphs, which is slower. torch 2.12 has it."
    )


def causal_attention(
    queries: Float[Tensor, "N heads D"],
    keys: Float[Tensor, "N kv D"],
    values: Float[Tensor, "N kv D"],
    packed: Packed,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Tensor, "N heads D"]:
    """Return softmax(q kᵀ · scale) v of each packed sequence. A token attends to itself and to
    those before it in its own sequence, so no real token attends to padding behind it; with a
    `window`, to that many tokens at most, itself included. `cap` is that of `capped_attention`."""
    if window is not None and packed.width <= window:
        window = None
    kind = backend(queries.device, queries.dtype, queries.shape[-1])
    grouped = queries.shape[1] != keys.shape[1]
    repeats = packed.repeats
    if kind == "varlen" and cap is None:
        key_starts = packed.starts
        if repeats is not None:  # the queries of a row are its last tokens, its keys all of them
            keys, values = (repeated(x, repeats.keys) for x in (keys, values))
            key_starts = repeats.key_starts
        flash = varlen.varlen_attn(
            queries,
            keys,
            values,
            packed.starts,
            key_starts,
            packed.width,
            packed.width,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=grouped,
        )
        assert isinstance(flash, torch.Tensor)
        return flash
    if grouped and kind in {"efficient", "repeated"} and cap is None:
        times = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
        grouped = False
    q = unpacked(queries, packed).transpose(1, 2)
    k, v = (unpacked(x, packed, repeats).transpose(1, 2) for x in (keys, values))
    mask = None
    if window is not None or cap is not None:
        mask = _causal_mask(packed.width, window, queries.device)
    if cap is not None:
        assert mask is not None
        attended = capped_attention(q, k, v, mask, scale, cap)
    else:
        # flash attention on rectangles takes no mask
        with kernel("efficient" if kind == "flash" and mask is not None else kind):
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
    return repacked(attended.transpose(1, 2), packed)


def _causal_mask(width: int, window: int | None, device: torch.device) -> Bool[Tensor, "T T"]:
    """Return which tokens (columns) each token attends to."""
    places = torch.arange(width, device=device)
    distance = places[:, None] - places
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def capped_attention(
    queries: Float[Tensor, "B heads T D"],
    keys: Float[Tensor, "B kv S D"],
    values: Float[Tensor, "B kv S D"],
    mask: Bool[Tensor, "*n T S"],
    scale: float,
    cap: float,
) -> Float[Tensor, "B heads T D"]:
    """Return softmax(cap · tanh(q kᵀ · scale / cap)) v where the mask is True (Gemma 2, Riviere et
    al. 2024).

    No kernel of torch caps scores, so the [T, S] scores of each head are kept for the gradient.
    """
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # heads that share keys and values
    scores = (grouped @ keys[:, :, None].transpose(-1, -2)).to(
        torch.promote_types(queries.dtype, torch.float32)
    )
    scores = (scores * (scale / cap)).tanh() * cap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(values.dtype)
    attended: Tensor = (weights @ values[:, :, None]).flatten(1, 2)
    return attended


def slot_attention(
    queries: Float[Tensor, "B heads D"],
    cache: Float[Tensor, "B columns kv2 D"],
    lengths: Int[Tensor, "B"],
    starts: tuple[Int[Tensor, "B1"], Int[Tensor, "B1"]],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Tensor, "B heads D"]:
    """Return the attention of one query per row over the first `lengths` columns of its slot, with
    a `window` the last `window` of them. `cap` is that of `capped_attention`.

    `cache` holds the keys of each column before its values. `starts`, in int32, says where each
    row begins: among the queries, which is 0, 1, …, B, and in the cache, that times the columns. No
    shape depends on the lengths, so that a CUDA graph can hold the call.
    """
    kv, columns = cache.shape[2] // 2, cache.shape[1]
    keys, values = cache[:, :, :kv], cache[:, :, kv:]
    grouped = queries.shape[1] != kv
    kind = backend(queries.device, queries.dtype, queries.shape[-1])
    if kind == "varlen" and cap is None:
        attended = varlen.varlen_attn(
            queries,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            *starts,
            1,
            columns,
            scale=scale,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            enable_gqa=grouped,
            seqused_k=lengths,
        )
        assert isinstance(attended, torch.Tensor)
        return attended
    places = torch.arange(columns, device=queries.device)
    outside = places >= lengths[:, None]
    if window is not None:
        outside |= places < lengths[:, None] - window
    return step_attention(
        queries, keys.transpose(1, 2), values.transpose(1, 2), outside, scale, cap
    )


def step_attention(
    queries: Float[Tensor, "B heads D"],
    keys: Float[Tensor, "B kv S D"],
    values: Float[Tensor, "B kv S D"],
    outside: Bool[Tensor, "B S"],
    scale: float,
    cap: float | None,
) -> Float[Tensor, "B heads D"]:
    """Return the attention of one query per row to the columns that are not `outside`."""
    if cap is not None:
        seen = ~outside[:, None, None, None]
        return capped_attention(queries[:, :, None], keys, values, seen, scale, cap)[:, :, 0]
    mask = torch.where(outside, -torch.inf, 0.0).to(queries.dtype)[:, None, None]
    rows = scaled_dot_product_attention(
        queries[:, :, None],
        keys,
        values,
        attn_mask=mask,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return rows[:, :, 0]


def kernel(kind: Backend) -> AbstractContextManager[None]:
    """Return a context in which `scaled_dot_product_attention` takes the kernel of a back end.

    Where the efficient one cannot (float64, heads of an odd size), torch's plain kernel computes. A
    kernel that the caller has excluded stays excluded: trust regions need second derivatives, which
    only the plain one has.
    """
    if kind == "flash" and torch.backends.cuda.flash_sdp_enabled():
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION])
    if kind == "efficient" and torch.backends.cuda.mem_efficient_sdp_enabled():
        return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return nullcontext()
