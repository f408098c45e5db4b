"""The sampling distribution, and drawing one token per row from it."""

from dataclasses import dataclass
from typing import Annotated

from quartet.parts import Field, part
from quartet.tensors import Bool, Float, Int, Tensor, torch


@part
class Sampling:
    """The distribution that responses are sampled from, and their largest length."""

    max_new_tokens: int = Field(
        default=64,
        ge=1,
        description="The largest number of tokens in a response; one that has not ended by "
        "then is cut off. Typical: 64 to 1024.",
    )
    min_new_tokens: int = Field(
        default=0,
        ge=0,
        description="The smallest number of tokens in a response: tokens that end it cannot be "
        "sampled earlier. In an RL stage it needs keep_mask = true.",
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description='Strings that end a response, such as ["\\n\\n"]: its last token is the one '
        "that completes the first of them. Rewards get the text before it.",
    )
    temperature: float = Field(
        default=1.0, gt=0, description="Logits are divided by it. PPO samples, so it is never 0."
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Keep the k most probable tokens; 0 keeps all. Prefer 0: without keep_mask "
        "the learner does not filter.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Keep the most probable tokens of this mass. Prefer 1, as above.",
    )
    keep_mask: bool = Field(
        default=False,
        description="Record which tokens top_k, top_p and min_new_tokens keep, and train the "
        "distribution over them. It takes five bytes for each kept token, at every token of a "
        "response.",
    )

    @property
    def filters(self) -> bool:
        """Whether top-k, top-p or min_new_tokens excludes tokens. Without `keep_mask` the learner's
        log-probs are those of the unfiltered distribution, so the ratio is not 1 on the first
        minibatch and KL estimates can be negative."""
        return self.keeps_probable or self.min_new_tokens > 0

    @property
    def keeps_probable(self) -> bool:
        """Whether top-k or top-p keeps only the most probable tokens."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def filter_setting(self) -> str:
        """The first setting that makes it filter, such as "top_k = 40"."""
        if not self.keeps_probable:
            return f"min_new_tokens = {self.min_new_tokens}"
        return f"top_k = {self.top_k}" if self.top_k else f"top_p = {self.top_p}"


@dataclass(frozen=True)
class Drawn:
    """A sampled token for each row."""

    tokens: Int[Tensor, "B"]
    logprobs: Float[Tensor, "B"]
    """Log-probs of the tokens under the distribution they were drawn from."""
    entropies: Float[Tensor, "B"]
    """Entropies of that distribution, in nats."""
    kept: Bool[Tensor, "B V"] | None = None
    """Which tokens it does not exclude; only with `keep_mask`."""


WIDE, WIDE_ON_GPU = 200_000, 2**16
"""The vocabulary from which tokens are drawn in two steps, a block of them first, on a CPU and on
other devices."""
WIDE_BLOCK = 512
WIDE_LOGITS, WIDE_LOGITS_ON_GPU = 2**21, 2**28
"""Logits of so many numbers are drawn from at once then: on a CPU they stay in its cache, on a GPU
they are a gigabyte."""


def scaled(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Return the logits of the sampling distribution in float32: divided by the temperature, with
    −∞ for tokens that top-k or top-p excludes."""
    z = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    if not sampling.keeps_probable:
        return z
    probs, order = z.softmax(-1).sort(-1, descending=True)
    keep = probs.cumsum(-1) - probs < sampling.top_p
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    return z.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)


def draw(logits: Float[Tensor, "B V"], sampling: Sampling, noise: Float[Tensor, "B"]) -> Drawn:
    """Draw one token per row by inverting the cumulative distribution at a uniform number in [0,
    1).

    The caller supplies the uniform numbers, one per row and token, so that a row's response does
    not depend on which other rows are sampled with it. With P(k) = Σ_{j≤k} e^{z_j − max z} the
    token is the first k with P(k) > noise · P(V); its log-prob is z_k − max z − log P(V), the
    entropy log P(V) − Σ_j e^{z_j − max z} (z_j − max z) / P(V).

    Logits of −∞ are of tokens that cannot be drawn; then the sampling has a filter.
    Where the logits of a row hold NaN or +∞, its token is any token and its log-prob is NaN.
    """
    if logits.shape[-1] >= (WIDE if logits.device.type == "cpu" else WIDE_ON_GPU):
        return _draw_wide(logits, sampling, noise)
    z = scaled(logits, sampling)
    z = z - z.amax(-1, keepdim=True)
    weights = z.exp()
    cumulative = _rising_sums(weights)
    total = cumulative[:, -1:]
    aim = torch.minimum(noise[:, None] * total, _below(total))
    tokens = torch.searchsorted(cumulative, aim, right=True)
    tokens = tokens.clamp(max=z.shape[-1] - 1)  # NaN compares with nothing: past the end
    log_total = total[:, 0].log()
    mean = torch.linalg.vecdot(weights, z.clamp(min=-1e4) if sampling.filters else z) / total[:, 0]
    kept = z > -torch.inf if sampling.keep_mask else None
    return Drawn(tokens[:, 0], z.gather(-1, tokens)[:, 0] - log_total, log_total - mean, kept)


def _draw_wide(
    logits: Float[Tensor, "B V"], sampling: Sampling, noise: Float[Tensor, "B"]
) -> Drawn:
    """Draw as `draw` does from a wide vocabulary, in fewer passes over it.

    The cumulative sum of the whole vocabulary is the slowest pass: a GPU gives a row of it to a
    single multiprocessor. Here it is taken over the sums of blocks, and over the tokens of one
    block: that in which P exceeds noise · P(V).
    """
    at_once = WIDE_LOGITS if logits.device.type == "cpu" else WIDE_LOGITS_ON_GPU
    rows = max(at_once // logits.shape[-1], 1)
    parts = [
        _draw_in_blocks(scaled(some, sampling), their_noise, sampling)
        for some, their_noise in zip(logits.split(rows), noise.split(rows), strict=True)
    ]
    names = [name for name in Drawn.__dataclass_fields__ if getattr(parts[0], name) is not None]
    return Drawn(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _draw_in_blocks(
    logits: Float[Tensor, "B V"], noise: Float[Tensor, "B"], sampling: Sampling
) -> Drawn:
    """Draw from logits of the sampling distribution, which a filter may have set to −∞."""
    vocabulary = logits.shape[-1]
    z = logits - logits.amax(-1, keepdim=True)
    weights = z.exp()
    whole = vocabulary // WIDE_BLOCK * WIDE_BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, WIDE_BLOCK)).sum(-1)
    sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = _rising_sums(sums)
    total = cumulative[:, -1:]
    aim = torch.minimum(noise[:, None] * total, _below(total))
    block = torch.searchsorted(cumulative, aim, right=True).clamp(max=sums.shape[-1] - 1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    places = block * WIDE_BLOCK + torch.arange(WIDE_BLOCK, device=block.device)
    inside = weights.gather(-1, places.clamp(max=vocabulary - 1))
    inner = _rising_sums(torch.where(places < vocabulary, inside, 0.0))
    # The block's sum was added up in another order: its last token with a weight is the last one.
    aim = torch.minimum(aim - before, _below(inner[:, -1:]))
    tokens = block * WIDE_BLOCK + torch.searchsorted(inner, aim, right=True)
    tokens = tokens.clamp(max=vocabulary - 1)  # NaN compares with nothing: past the end
    log_total = total[:, 0].log()
    finite = z.clamp(min=-1e4) if sampling.filters else z
    if z.device.type == "cpu":
        mean = (weights[:, None] @ finite[:, :, None])[:, 0, 0] / total[:, 0]
    else:  # a product of matrices would round to TF32
        mean = torch.linalg.vecdot(weights, finite) / total[:, 0]
    kept = z > -torch.inf if sampling.keep_mask else None
    return Drawn(tokens[:, 0], z.gather(-1, tokens)[:, 0] - log_total, log_total - mean, kept)


def _rising_sums(weights: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Return the sums up to each weight, none below the one before it. The sum up to a weight of 0
    is that before it."""
    cumulative = weights.cumsum(-1)
    if weights.device.type == "cpu":
        return cumulative
    # Sums in parallel need not rise: a token of probability 0 could have a larger one than the
    # token before it, and be drawn. So it gets the one before.
    rising: Tensor = torch.where(weights > 0, cumulative, 0.0).cummax(-1).values
    return rising


def _below(x: Tensor) -> Tensor:
    """Return the next number towards 0: noise · x may round up to x itself."""
    return torch.nextafter(x, torch.zeros_like(x))
