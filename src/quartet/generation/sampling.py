"""The sampling distribution, and drawing one token per row from it."""

from dataclasses import dataclass

from quartet.parts import Field, part
from quartet.tensors import Float, Int, Tensor, torch


@part
class Sampling:
    """The distribution that responses are sampled from, and their largest length."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(
        default=1.0, gt=0, description="Logits are divided by it. PPO samples, so it is never 0."
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Keep the k most probable tokens; 0 keeps all. Prefer 0: the learner does not "
        "filter.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Keep the most probable tokens of this mass. Prefer 1, as above.",
    )

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p excludes tokens. The learner's log-probs are those of the
        unfiltered distribution, so with a filter the ratio is not 1 on the first minibatch and KL
        estimates can be negative."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Drawn:
    """A sampled token for each row."""

    tokens: Int[Tensor, "B"]
    logprobs: Float[Tensor, "B"]
    """Log-probs of the tokens under the distribution they were drawn from."""
    entropies: Float[Tensor, "B"]
    """Entropies of that distribution, in nats."""


def scaled(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Return the logits of the sampling distribution in float32: divided by the temperature, with
    −∞ for tokens that top-k or top-p excludes."""
    z = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    if not sampling.filters:
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

    Where the logits of a row hold NaN or +∞, its token is any token and its log-prob is NaN.
    """
    z = scaled(logits, sampling)
    z = z - z.amax(-1, keepdim=True)
    weights = z.exp()
    cumulative = weights.cumsum(-1)
    if z.device.type != "cpu":
        # Sums in parallel need not rise: a token of probability 0 could have a larger one than the
        # token before it, and be drawn. So it gets the one before.
        cumulative = torch.where(weights > 0, cumulative, 0.0).cummax(-1).values
    total = cumulative[:, -1:]
    below = torch.nextafter(
        total, torch.zeros_like(total)
    )  # noise · total may round up to the total itself
    tokens = torch.searchsorted(
        cumulative, torch.minimum(noise[:, None] * total, below), right=True
    )
    tokens = tokens.clamp(max=z.shape[-1] - 1)  # NaN compares with nothing: past the end
    log_total = total[:, 0].log()
    mean = torch.linalg.vecdot(weights, z.clamp(min=-1e4) if sampling.filters else z) / total[:, 0]
    return Drawn(tokens[:, 0], z.gather(-1, tokens)[:, 0] - log_total, log_total - mean)
