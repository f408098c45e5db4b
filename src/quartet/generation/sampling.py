"""How the next token is drawn."""

from quartet.parts import Field, part
from quartet.tensors import Float, Int, Tensor, torch


@part
class Sampling:
    """The distribution that answers are drawn from, and how long they may get."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0, description="Logits are divided by it. PPO samples, so it is never 0.")
    top_k: int = Field(
        default=0, ge=0, description="Keep the k likeliest tokens; 0 keeps all. Prefer 0: the learner does not filter."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the likeliest tokens of this mass. Prefer 1, as above.")

    @property
    def filters(self) -> bool:
        """Whether some tokens can never be drawn. The learner's log-probs know of no filter, so that the ratio is not 1
        on the first minibatch and KL estimates can turn negative."""
        return self.top_k > 0 or self.top_p < 1


def sampling_logprobs(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """The log-probabilities of the distribution that is sampled, in float32: softmax(logits / temperature), and where
    tokens are filtered away, what is left of it renormalised."""
    logprobs = (logits.float() / sampling.temperature).log_softmax(-1)
    if not sampling.filters:
        return logprobs
    ordered, order = logprobs.sort(-1, descending=True)
    keep = ordered.exp().cumsum(-1) - ordered.exp() < sampling.top_p
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    return logprobs.masked_fill(~kept, -torch.inf).log_softmax(-1)


def draw(logprobs: Float[Tensor, "B V"], noise: Float[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """One token per row by inverting its cumulative distribution at a uniform number, and the token's log-prob.

    The noise comes from outside, one number per row and token, so that a row's answer does not depend on which other
    rows are still being sampled.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = noise.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logprobs.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
