"""The one shift between positions and tokens, and log-probs and entropies from the output head.

The output of a causal model at position t is the distribution of token t + 1.
`predicting_positions` is the only place in Quartet that shifts; everywhere else entry t of a tensor
is about token t.

The head is the largest product of a small model, and its output [positions, vocabulary] the largest
tensor. It is computed only at the N positions that predict a masked token, and where the output
would be large, a chunk of the vocabulary at a time: `head_statistics` keeps log-probs and
entropies, and computes the logits of a chunk again for the gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quartet.tensors import Bool, Float, Int, Tensor

CHUNK_ELEMENTS, CHUNK_COLUMNS = 2**21, 2048
"""The most logits in memory at once on a CPU, 8 MB in float32, and the most tokens of a chunk. With
144 positions and 262,144 tokens, chunks of 2,048 were 1.4 times as fast as chunks of 2²¹ / 144."""
ALIGNMENT = 64
"""Chunks hold a multiple of so many tokens: the rows of a product are then whole cache lines."""
GPU_CHUNKS = 8
"""The most chunks on other devices. Each is about 40 kernels, and a GPU reads its memory so fast
that a smaller chunk gains nothing."""


@dataclass(frozen=True)
class LogitShape:
    """What a model does to the outputs of its head: z = scale · (h Wᵀ + b), and with a cap c,
    c · tanh(z / c) (Gemma 2, Riviere et al. 2024)."""

    scale: float = 1.0
    cap: float | None = None

    def applied_to(self, logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """Return the model's logits from the outputs of its head, which may be overwritten where no
        gradient is recorded."""
        keep = torch.is_grad_enabled()
        if self.scale != 1:
            logits = logits * self.scale if keep else logits.mul_(self.scale)
        if self.cap is None:
            return logits
        if keep:
            return (logits / self.cap).tanh() * self.cap
        return logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, z: Float[Tensor, "N n"], temperature: float) -> Float[Tensor, "N n"] | None:
        """Return the derivative of the cap at logits z / temperature; None without one."""
        return None if self.cap is None else 1 - (z * (temperature / self.cap)).square_()


PLAIN = LogitShape()
EXCLUDED = -1e15
"""The logit of an id that a filter excludes: its probability is exactly 0, and no sum over the
vocabulary becomes 0 · ∞."""


@dataclass(frozen=True)
class Filter:
    """The ids that a sampler's filter left at some of N positions. Where none is given, nothing is
    excluded."""

    positions: Int[Tensor, "_"]
    """The position, from 0 to N − 1, that each of the ids was left at."""
    ids: Int[Tensor, "_"]

    def applied_to(self, logits: Float[Tensor, "N n"], first: int = 0) -> Float[Tensor, "N n"]:
        """Return logits of the ids from `first` on, `EXCLUDED` where the filter left others."""
        size = logits.shape[1]
        filtered = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        filtered[self.positions] = True
        # Ids of other chunks go to a column more: to look for them would wait for the device.
        here = self.ids - first
        here = torch.where((here >= 0) & (here < size), here, size)
        excluded = filtered[:, None].repeat(1, size + 1)
        excluded[self.positions, here] = False
        return logits.masked_fill(excluded[:, :size], EXCLUDED)


def predicting_positions(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Return the positions whose outputs predict the masked tokens, in the same order: each is one
    before its token. No position predicts the first token of a row, so the mask must not have
    it."""
    return torch.nn.functional.pad(mask[:, 1:], (0, 1))


def scatter_to_tokens(
    values: Float[Tensor, "N"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return numbers, one per masked token, at the places of their tokens; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask.to(values.device, non_blocking=True), values
    )


def token_logprobs(
    logits: Float[Tensor, "*n V"], tokens: Int[Tensor, "*n"], temperature: float
) -> Float[Tensor, "*n"]:
    """Return log softmax(logits / temperature) at the given tokens, in float32. The temperature is
    part of the policy: the distribution that is trained is the one that was sampled from."""
    scaled = at_least_float32(logits) / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def token_entropy(logits: Float[Tensor, "*n V"], temperature: float) -> Float[Tensor, "*n"]:
    """Return −Σ p log p of softmax(logits / temperature), in nats: log V when all are equal, 0 when
    one is certain."""
    logprobs = (at_least_float32(logits) / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def logits_statistics(
    logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, "N"],
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Return log-probs and entropies. Entropies have a gradient only with `entropy_gradient`."""
    logprobs = token_logprobs(logits, tokens, temperature)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        return logprobs, token_entropy(logits, temperature)


# --- log-probs and entropy from hidden states ---


def add_product(
    total: Float[Tensor, "N H"], x: Float[Tensor, "N V"], weight: Float[Tensor, "V H"]
) -> None:
    """Add x W to `total` in place."""
    if x.dtype == total.dtype:
        total.addmm_(x, weight)
    else:
        total.add_(x @ weight)


class HeadGradients:
    """The gradients of a head's inputs, weight and bias, from those of its outputs, a chunk of the
    vocabulary at a time. `needed` says, for each of the three, whether it is computed."""

    def __init__(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, "V"] | None,
        needed: Sequence[bool],
    ) -> None:
        self.hidden, self.weight = hidden, weight
        on_hidden, on_weight, on_bias, *_ = needed
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self.d_hidden = torch.zeros_like(hidden, dtype=exact) if on_hidden else None
        self.d_weight = torch.empty_like(weight) if on_weight else None
        self.d_bias = torch.empty_like(bias) if bias is not None and on_bias else None

    def add(self, first: int, d: Float[Tensor, "N n"]) -> None:
        """Add what the outputs of the tokens from `first` on contribute, given their gradient. It
        has the dtype of the weight: converted here, it would be in memory twice."""
        chunk = slice(first, first + d.shape[1])
        if self.d_hidden is not None:
            add_product(self.d_hidden, d, self.weight[chunk])
        if self.d_weight is not None:
            torch.mm(d.t(), self.hidden, out=self.d_weight[chunk])
        if self.d_bias is not None:
            self.d_bias[chunk] = d.sum(0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three, None for those that are not needed."""
        d_hidden = None if self.d_hidden is None else self.d_hidden.to(self.hidden.dtype)
        return d_hidden, self.d_weight, self.d_bias


class _Sums:
    """The sums over the vocabulary of N rows of logits z, given a chunk at a time. They are kept
    relative to the largest logit so far (Milakov & Gimelshein 2018)."""

    def __init__(self, hidden: Float[Tensor, "N H"], tokens: Int[Tensor, "N"]) -> None:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        zeros = torch.zeros(len(hidden), 1, dtype=exact, device=hidden.device)
        self.tokens, self.own, self.top, self.total = tokens, zeros, zeros - torch.inf, zeros
        self.along = zeros
        """Σ e^(z − top) (z − top)"""

    def add(self, first: int, z: Float[Tensor, "N n"]) -> tuple[Tensor, Tensor]:
        """Add the chunk that begins with the token `first`, whose logits are overwritten. Return
        e^(z − top), and by what the sums before it were multiplied."""
        # Tokens of this chunk take their own logit from it.
        here = (self.tokens - first)[:, None]
        inside = (here >= 0) & (here < z.shape[1])
        self.own = torch.where(inside, z.gather(1, here.clamp(0, z.shape[1] - 1)), self.own)
        # Sums so far are relative to the old maximum: scale them to the new one.
        top = torch.maximum(self.top, z.amax(-1, keepdim=True))
        z.sub_(top)
        p, shrunk = z.exp(), (self.top - top).exp()
        if first:
            self.along = shrunk * (self.along + self.total * (self.top - top))
        self.along = self.along + torch.linalg.vecdot(p, z)[:, None]
        self.total = shrunk * self.total + p.sum(-1, keepdim=True)
        self.top = top
        return p, shrunk

    @property
    def normalizer(self) -> Float[Tensor, "N 1"]:
        """log Σ e^z"""
        return self.top + self.total.log()

    @property
    def entropy(self) -> Float[Tensor, "N 1"]:
        return self.total.log() - self.along / self.total


class _HeadStatistics(torch.autograd.Function):
    """log p(token) and H(p) of p = softmax(z), with

        ∂ log p_y / ∂z = onehot(y) − p    ∂H / ∂z = −p (log p + H)    z = f(h Wᵀ + b) / T

    where f is the shape of the logits, f(l) = c tanh(s l / c) with f′(l) = s (1 − (f(l) / c)²).

    A chunk of the vocabulary at a time, forwards and, from logits computed again, backwards. Each
    chunk of W is read once and its gradient written once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        columns: int,
        entropy_gradient: bool,
        shape: LogitShape,
        kept: Filter | None,
    ) -> tuple[Tensor, Tensor]:
        sums = _Sums(hidden, tokens)
        for first, z in logits_by_chunk(hidden, weight, bias, temperature, columns, shape, kept):
            sums.add(first, z)
        normalizer, entropy = sums.normalizer, sums.entropy
        ctx.temperature, ctx.columns, ctx.entropy_gradient = temperature, columns, entropy_gradient
        ctx.shape, ctx.kept = shape, kept
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizer, entropy)
        return (sums.own - normalizer)[:, 0], entropy[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normalizer, entropy = ctx.saved_tensors
        on_logprob, on_entropy = (g[:, None] for g in grads)
        found = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        factor = ctx.shape.scale / ctx.temperature
        for first, z in logits_by_chunk(
            hidden, weight, bias, ctx.temperature, ctx.columns, ctx.shape, ctx.kept
        ):
            slope = ctx.shape.slope(z, ctx.temperature)
            p = z.sub_(normalizer).exp()  # z is log p from here on
            d = (
                p.mul_(-on_logprob - on_entropy * (z + entropy))
                if ctx.entropy_gradient
                else p.mul_(-on_logprob)
            )
            # The onehot(y) of tokens in this chunk. Tokens of other chunks add 0 somewhere: to look
            # for them would have the host wait for the device.
            here = (tokens - first)[:, None]
            inside = (here >= 0) & (here < z.shape[1])
            d.scatter_add_(1, here.clamp(0, z.shape[1] - 1), torch.where(inside, on_logprob, 0.0))
            # From the gradient of z to that of the head's outputs.
            if slope is not None:
                d.mul_(slope)
            if ctx.shape.scale != 1:
                d.mul_(factor)
            elif ctx.temperature != 1:
                d.div_(ctx.temperature)
            d = d.to(weight.dtype)
            found.add(first, d)
        return (*found.gradients(), *(None,) * 6)


class _FrozenHeadStatistics(torch.autograd.Function):
    """What `_HeadStatistics` computes, for a head that is not trained, without a gradient of the
    entropy. The gradient of log p_y for h needs no other gradient to be known,

        ∂ log p_y / ∂h = Σ_v (onehot(y) − p)_v f′(l_v) / T · W_v

    so the forward pass computes it with the same logits, and none are computed again: two products
    with W instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        columns: int,
        shape: LogitShape,
        kept: Filter | None,
    ) -> tuple[Tensor, Tensor]:
        sums = _Sums(hidden, tokens)
        mean = torch.zeros(hidden.shape, dtype=sums.total.dtype, device=hidden.device)
        for first, z in logits_by_chunk(hidden, weight, bias, temperature, columns, shape, kept):
            slope = shape.slope(z, temperature)
            p, shrunk = sums.add(first, z)
            p = (p if slope is None else p.mul_(slope)).to(weight.dtype)
            if first:
                mean.mul_(shrunk)
            chunk = weight[first : first + p.shape[1]]
            add_product(mean, p, chunk)
            del p, slope  # before the next chunk's are made
        own = weight[tokens].to(mean.dtype)
        slope = shape.slope(sums.own, temperature)
        own = own if slope is None else own * slope
        gradient = (own - mean / sums.total) * (shape.scale / temperature)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return (sums.own - sums.normalizer)[:, 0], sums.entropy[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None].to(gradient.dtype), *(None,) * 7)


def head_statistics(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"] | None,
    tokens: Int[Tensor, "N"],
    temperature: float,
    entropy_gradient: bool = False,
    chunk_elements: int | None = None,
    shape: LogitShape = PLAIN,
    kept: Filter | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Return log-probs of `tokens` and the entropies of their distributions, in float32, without an
    [N, V] tensor on a CPU, and in at most `GPU_CHUNKS` parts of it elsewhere. Entropies have a
    gradient only with `entropy_gradient`. `chunk_elements` overrides the size of a chunk; `shape`
    is what the model does to the outputs of its head, and `kept` limits the distributions to the
    ids that a filter left."""
    if not len(hidden):
        return logits_statistics(
            head_logits(hidden, weight, bias, shape), tokens, temperature, entropy_gradient
        )
    columns = chunk_columns(len(hidden), weight)
    if chunk_elements is not None:
        columns = max(chunk_elements // len(hidden), 1)
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and not is_trained and not entropy_gradient:
        logprobs, entropy = _FrozenHeadStatistics.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, tokens, temperature, columns, shape, kept
        )
        return logprobs, entropy.detach()
    logprobs, entropy = _HeadStatistics.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, tokens, temperature, columns, entropy_gradient, shape, kept
    )
    return logprobs, entropy if entropy_gradient else entropy.detach()


def chunk_columns(rows: int, weight: Float[Tensor, "V H"]) -> int:
    """Return the tokens of a chunk for so many positions."""
    if weight.device.type == "cpu":
        fitting = CHUNK_ELEMENTS // rows // ALIGNMENT * ALIGNMENT
        return max(min(fitting, CHUNK_COLUMNS), ALIGNMENT)
    columns = max(CHUNK_ELEMENTS // rows, -(-len(weight) // GPU_CHUNKS))
    return -(-columns // ALIGNMENT) * ALIGNMENT


def logits_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    columns: int,
    shape: LogitShape,
    kept: Filter | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token of each chunk and its logits / temperature, which may be changed in
    place."""
    for first in range(0, len(weight), columns):
        chunk = slice(first, first + columns)
        logits = head_logits(hidden, weight[chunk], None if bias is None else bias[chunk], shape)
        logits = logits if temperature == 1 else logits.div_(temperature)
        yield first, logits if kept is None else kept.applied_to(logits, first)


class _Float32Product(torch.autograd.Function):
    """h Wᵀ in float32, of numbers in half precision. Its gradients are products in half precision,
    as in `_HeadStatistics`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return _float32_product(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        d = grads[0].to(weight.dtype)
        on_hidden, on_weight = ctx.needs_input_grad
        return d @ weight if on_hidden else None, d.t() @ hidden if on_weight else None


def _float32_product(hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"]) -> Tensor:
    """Return h Wᵀ in float32 [N, V]. A GPU adds up in float32 anyway, and need only keep the sums.
    No other product of torch does that, so a chunk of W is converted at a time: a copy of the whole
    head of a large vocabulary takes longer to write than the product, and more memory than W."""
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    exact, chunks = hidden.float(), weight.split(CHUNK_COLUMNS)
    if len(chunks) == 1:
        return exact @ weight.float().t()
    logits = exact.new_empty(len(hidden), len(weight))
    for chunk, place in zip(chunks, logits.split(CHUNK_COLUMNS, dim=1), strict=True):
        torch.mm(exact, chunk.float().t(), out=place)
    return logits


def head_logits(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, "V"] | None,
    shape: LogitShape = PLAIN,
) -> Float[Tensor, "N V"]:
    """Return f(h Wᵀ + b) in float32, also of bfloat16 numbers: a logit of 20 rounded to bfloat16 is
    off by up to 0.06. f is the `shape` of the logits. Sampler and learner both use this
    function."""
    if hidden.dtype not in {torch.bfloat16, torch.float16}:
        return shape.applied_to(torch.nn.functional.linear(hidden, weight, bias))
    logits: Tensor = _Float32Product.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return shape.applied_to(logits if bias is None else logits.add_(bias))


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or as it is where it is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
