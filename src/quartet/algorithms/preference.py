"""Losses on comparisons: of a reward model's scores, and of the policy itself (the DPO family).

A comparison is a prompt with two responses, of which the first was preferred. P is the number of
comparisons.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from quartet.algorithms.by_name import ByName
from quartet.algorithms.masked import masked
from quartet.parts import Family, Field
from quartet.tensors import Bool, Float, Int, Tensor, torch

# --- reward models ---


def bradley_terry(
    chosen: Float[Tensor, "*P"],
    rejected: Float[Tensor, "*P"],
    margin: Float[Tensor, "*P"] | float = 0.0,
) -> Float[Tensor, "*P"]:
    """−log σ(r_chosen − r_rejected − margin), per pair (Bradley & Terry 1952; Stiennon et al. 2020,
    eq. 1; the margin, larger the surer the labeller, Touvron et al. 2023, Llama 2, eq. 2).

    Scores 1 and −1: −log σ(2) = log(1 + e⁻²) = 0.1269. Equal scores: log 2. Exact for any margin:
    at −200 it is 200.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected - margin)


def centring(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """(r_chosen + r_rejected)² (Eisenstein et al. 2023): only differences of scores matter to
    Bradley–Terry; this holds their mean at 0. Scores 1.5 and −1: 0.25."""
    return (chosen + rejected).square()


def after_divergence(
    chosen: Int[Tensor, "P T"],
    rejected: Int[Tensor, "P T"],
    chosen_lengths: Int[Tensor, "P"],
    rejected_lengths: Int[Tensor, "P"],
) -> Bool[Tensor, "P T"]:
    """Return a mask from the first token in which the two sides differ to the end of the longer.
    For tokens (5 6 7) and (5 8): columns 1 and 2."""
    columns = torch.arange(chosen.shape[1], device=chosen.device)
    real = (columns < chosen_lengths[:, None]) & (columns < rejected_lengths[:, None])
    apart = (chosen != rejected) | ~real
    return apart.cummax(dim=1).values & (
        columns < torch.maximum(chosen_lengths, rejected_lengths)[:, None]
    )


class RewardModelLoss(Family):
    """The loss of a reward model on comparisons."""

    needs_every_token: ClassVar[bool] = False
    """Whether it reads the head at every token, and not at the last ones only."""

    def __call__(
        self,
        chosen: Float[Tensor, "P T"],
        rejected: Float[Tensor, "P T"],
        chosen_lengths: Int[Tensor, "P"],
        rejected_lengths: Int[Tensor, "P"],
        differs: Bool[Tensor, "P T"],
        margins: Float[Tensor, "P"],
    ) -> Float[Tensor, "P"]:
        """Return the loss of each comparison, from the head's outputs; `differs` is
        `after_divergence`."""
        raise NotImplementedError


class LastTokenLoss(RewardModelLoss):
    """Bradley–Terry on the scores at the last tokens, less the comparison's margin where its row
    has one, plus centring · (r_chosen + r_rejected)²."""

    type: Literal["last_token"] = "last_token"
    centring: float = Field(
        default=0.0, ge=0, description="Holds the mean score near 0. Typical: 0.01."
    )

    def __call__(
        self,
        chosen: Float[Tensor, "P T"],
        rejected: Float[Tensor, "P T"],
        chosen_lengths: Int[Tensor, "P"],
        rejected_lengths: Int[Tensor, "P"],
        differs: Bool[Tensor, "P T"],
        margins: Float[Tensor, "P"],
    ) -> Float[Tensor, "P"]:
        """From the head at every token, or at the last ones only; `differs` is
        `after_divergence`."""
        scores = last_token(chosen, chosen_lengths), last_token(rejected, rejected_lengths)
        return bradley_terry(*scores, margins) + self.centring * centring(*scores)


class PerTokenLoss(RewardModelLoss):
    """The mean of Bradley–Terry over every token after the point of divergence (DeepSpeed-Chat).
    Evaluation still reads the last token.

    Deviation: behind the end of the shorter side DeepSpeed-Chat reads the head at padding; here it
    stays what it was at the side's last token.
    """

    needs_every_token = True

    type: Literal["per_token"] = "per_token"

    def __call__(
        self,
        chosen: Float[Tensor, "P T"],
        rejected: Float[Tensor, "P T"],
        chosen_lengths: Int[Tensor, "P"],
        rejected_lengths: Int[Tensor, "P"],
        differs: Bool[Tensor, "P T"],
        margins: Float[Tensor, "P"],
    ) -> Float[Tensor, "P"]:
        columns = torch.arange(chosen.shape[1], device=chosen.device)[None]
        chosen = chosen.gather(1, torch.minimum(columns, chosen_lengths[:, None] - 1))
        rejected = rejected.gather(1, torch.minimum(columns, rejected_lengths[:, None] - 1))
        loss = bradley_terry(chosen, rejected, margins[:, None].expand(chosen.shape))
        return masked(loss, differs).sum(dim=1) / differs.sum(dim=1).clamp(min=1)


def last_token(outputs: Float[Tensor, "P T"], lengths: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Return the output at the last token of each row."""
    return outputs.gather(1, lengths[:, None] - 1)[:, 0]


# --- the DPO family ---


@dataclass(frozen=True)
class Pairs:
    """What the policy, and the reference where one is needed, say of whole responses: sums of
    log-probs over their tokens."""

    chosen: Float[Tensor, "P"]
    rejected: Float[Tensor, "P"]
    chosen_tokens: Float[Tensor, "P"]
    rejected_tokens: Float[Tensor, "P"]
    ref_chosen: Float[Tensor, "P"] | None = None
    ref_rejected: Float[Tensor, "P"] | None = None
    kl: float = 0.0
    """KL to the reference as KTO estimates it, over the whole batch."""

    def log_ratios(self) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
        """Return log π / π_ref of the chosen and of the rejected side."""
        assert self.ref_chosen is not None and self.ref_rejected is not None, (
            "this loss needs a reference"
        )
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


class PreferenceLoss(Family):
    """The loss of a policy on comparisons."""

    needs_reference: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    """Whether it reads an estimate of the policy's KL from the reference."""

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        """Return the loss of each comparison."""
        raise NotImplementedError


class Dpo(PreferenceLoss):
    """−(1 − ε) log σ(h) − ε log σ(−h) with h = β (log π/π_ref of the chosen − of the rejected)
    (Rafailov et al. 2023, eq. 7); ε > 0, the chance that a label is wrong, is conservative DPO
    (Mitchell 2023).

    Log-ratios 2 and −1, β = 0.1: h = 0.3, −log σ(0.3) = 0.5544.
    """

    type: Literal["dpo"] = "dpo"
    beta: float = Field(
        default=0.1,
        gt=0,
        description="The weight of the KL divergence from the reference. Typical: 0.01 to 0.5.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="The share of labels that are wrong."
    )
    needs_reference = True

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        chosen, rejected = pairs.log_ratios()
        h = self.beta * (chosen - rejected)
        log_sigmoid = torch.nn.functional.logsigmoid
        return -(1 - self.label_smoothing) * log_sigmoid(h) - self.label_smoothing * log_sigmoid(-h)


class Ipo(PreferenceLoss):
    """(log-ratio of the chosen − of the rejected − 1 / (2β))² (Azar et al. 2023, eq. 17): a target
    for the difference in place of "ever larger". Log-ratios 2 and −1, β = 0.1: (3 − 5)² = 4.

    With `per = "token"` a response's log-ratio is the mean over its tokens, as TRL takes it, and
    not their sum. With 4 and 2 tokens: (0.5 + 0.5 − 5)² = 16.
    """

    type: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0, description="τ in the paper. Typical: 0.01 to 0.5.")
    per: Literal["response", "token"] = Field(
        default="response", description="Log-ratios are sums over a response, or means per token."
    )
    needs_reference = True

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        chosen, rejected = pairs.log_ratios()
        if self.per == "token":
            chosen = chosen / pairs.chosen_tokens
            rejected = rejected / pairs.rejected_tokens
        return (chosen - rejected - 1 / (2 * self.beta)).square()


class Kto(PreferenceLoss):
    """w₊ (1 − σ(β (log-ratio of the chosen − z))) + w₋ (1 − σ(β (z − log-ratio of the rejected)))
    (Ethayarajh et al. 2024, eq. 8): each response is good or bad by itself.

    z estimates KL(π ‖ π_ref): the mean log-ratio, not below 0, of responses paired with another
    prompt of the batch; it carries no gradient. A comparison gives one desirable and one
    undesirable response, an unpaired preference one of the two: a side without tokens costs
    nothing. Log-ratios 2 and −1, z = 0, β = 0.1: (1 − σ(0.2)) + (1 − σ(0.1)) = 0.9252.
    """

    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    desirable: float = Field(default=1.0, gt=0, description="Weight of the chosen responses.")
    undesirable: float = Field(default=1.0, gt=0, description="Weight of the rejected responses.")
    needs_reference = True
    needs_kl = True

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        chosen, rejected = pairs.log_ratios()
        desirable = self.desirable * torch.sigmoid(-self.beta * (chosen - pairs.kl))
        undesirable = self.undesirable * torch.sigmoid(-self.beta * (pairs.kl - rejected))
        return torch.where(pairs.chosen_tokens > 0, desirable, 0.0) + torch.where(
            pairs.rejected_tokens > 0, undesirable, 0.0
        )


class Orpo(PreferenceLoss):
    """−mean log π(chosen) − λ log σ(log odds(chosen) − log odds(rejected)), odds = p / (1 − p) with
    p the geometric mean of a response's token probabilities (Hong et al. 2024, eq. 6–7): imitation
    and preference in one stage, without a reference.

    p = 0.5 and 0.2: odds 1 and 0.25, −log 0.5 + 0.1 · log(1 + 0.25) = 0.7155.
    """

    type: Literal["orpo"] = "orpo"
    weight: float = Field(default=0.1, ge=0, description="λ in the paper.")

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        chosen, rejected = (
            pairs.chosen / pairs.chosen_tokens,
            pairs.rejected / pairs.rejected_tokens,
        )
        log_odds = log_odds_of(chosen) - log_odds_of(rejected)
        return -chosen - self.weight * torch.nn.functional.logsigmoid(log_odds)


def log_odds_of(logprobs: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Return log p − log(1 − p). Just below p = 1 the second term is held at what float32 can tell
    from 0."""
    return logprobs - torch.log(-torch.expm1(logprobs.clamp(max=-1e-7)))


class Simpo(PreferenceLoss):
    """−log σ(β (mean log π(chosen) − mean log π(rejected)) − γ) (Meng et al. 2024, eq. 6): means
    over tokens, no reference. Means −1 and −2, β = 2, γ = 1: −log σ(1) = 0.3133."""

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, description="Typical: 2 to 2.5.")
    gamma: float = Field(
        default=1.0, ge=0, description="The margin to win by. Typical: 0.3 to 1.6."
    )

    def __call__(self, pairs: Pairs) -> Float[Tensor, "P"]:
        difference = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
        return -torch.nn.functional.logsigmoid(self.beta * difference - self.gamma)


PREFERENCES: dict[str, PreferenceLoss] = ByName(
    {
        "dpo": Dpo(),
        "cdpo": Dpo(label_smoothing=0.1),
        "ipo": Ipo(),
        "kto": Kto(),
        "orpo": Orpo(),
        "simpo": Simpo(),
        "online_dpo": Dpo(),
    }
)
"""The stages that learn from comparisons directly, and their losses. `online_dpo` makes its
comparisons itself: two responses to each prompt, judged by the run's reward."""
