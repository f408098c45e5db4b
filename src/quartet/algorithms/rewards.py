"""From the score of a response to a reward for each of its tokens.

First the score is shaped, by any number of parts in the order in which they are listed
(`algorithm.scores`); then it is given to tokens (`algorithm.rewards`), and the KL penalty is added.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from quartet.algorithms.masked import masked, masked_mean, whiten
from quartet.experience import Batch
from quartet.parts import Family, Field
from quartet.tensors import Bool, Float, Int, Tensor, torch

# --- shaping the score ---


class ScoreShape(Family):
    """What is done to the score of each response before tokens get it."""

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        """Return the shaped scores, [B], from those that the parts before it have left."""
        raise NotImplementedError

    def clipped(self, scores: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        """Return which of the scores that it is given it cuts off at a limit, so that they no
        longer differ; by default none."""
        return torch.zeros_like(scores, dtype=torch.bool)

    def adapt(self, metrics: Mapping[str, float]) -> "ScoreShape":
        """Return the part of the next step, after a step with these metrics; by default itself."""
        return self


class ClipScore(ScoreShape):
    """clip(score, ±limit): bounds what one outlier of the reward model can do to an update
    (DeepSpeed-Chat: 5)."""

    type: Literal["clip"] = "clip"
    limit: float = Field(default=5.0, gt=0, description="Scores are cut to ± this value.")

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        return scores.clamp(-self.limit, self.limit)

    def clipped(self, scores: Float[Tensor, "B"]) -> Bool[Tensor, "B"]:
        return scores.abs() > self.limit


class RunningScale(ScoreShape):
    """score / σ, or (score − μ) / σ with `centre`, by the mean and sample deviation of all scores
    so far, this step's included (Zheng et al. 2023, PPO-max).

    `count`, `mean` and `squares` (Σ (x − mean)²) are its state; `adapt` returns a part that
    includes one step more. After the scores 1 and 3: mean 2, squares 2, σ = √(2 / (2 − 1)). As long
    as all scores were the same, they stay as they are.
    """

    type: Literal["running_scale"] = "running_scale"
    centre: bool = Field(
        default=False,
        description="Whether the mean of all scores so far is subtracted first.",
    )
    count: float = Field(
        default=0.0, ge=0, description="How many scores were seen: state, not a setting."
    )
    mean: float = Field(
        default=0.0,
        description="The mean of the scores that were seen: state, not a setting.",
    )
    squares: float = Field(
        default=0.0,
        ge=0,
        description="The sum of their squared deviations from the mean: state, not a setting.",
    )

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        moments = self.including(
            float(len(scores)),
            float(scores.double().mean()),
            float(scores.double().var(correction=0)),
        )
        deviation = (moments.squares / max(moments.count - 1, 1)) ** 0.5
        return (scores - moments.mean if self.centre else scores) / (deviation or 1.0)

    def adapt(self, metrics: Mapping[str, float]) -> "ScoreShape":
        return self.including(metrics["responses"], metrics["reward"], metrics["reward/std"] ** 2)

    def including(self, count: float, mean: float, variance: float) -> "RunningScale":
        """Return the part with the moments of the old and the new scores together (Chan et al.
        1979)."""
        total = self.count + count
        difference = mean - self.mean
        return dataclasses.replace(
            self,
            count=total,
            mean=self.mean + difference * count / total,
            squares=self.squares + variance * count + difference**2 * self.count * count / total,
        )


class MissingEos(ScoreShape):
    """What a response that was cut off gets: `penalty` off its score, or, with `replace`, −penalty
    for a score (Stiennon et al. 2020: −1, whatever the reward model says of half a summary)."""

    type: Literal["missing_eos"] = "missing_eos"
    penalty: float = Field(
        default=1.0,
        ge=0,
        description="What is taken off the score of a response that was cut off, ≥ 0, in "
        "units of the score. Typical: 1.",
    )
    replace: bool = Field(
        default=False,
        description="Whether −penalty takes the place of the score instead of lowering it.",
    )

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        cut_off = torch.full_like(scores, -self.penalty) if self.replace else scores - self.penalty
        return torch.where(batch.ended, scores, cut_off)


class SoftOverlong(ScoreShape):
    """DAPO's soft punishment (Yu et al. 2025, eq. 13): 0 up to max_tokens − buffer tokens, then
    down in a straight line to −1 at max_tokens, −1 beyond. With max_tokens = 20, buffer = 5, a
    response of 17 tokens: (15 − 17) / 5 = −0.4."""

    type: Literal["soft_overlong"] = "soft_overlong"
    max_tokens: int = Field(
        default=20_480,
        ge=1,
        description="The tokens of a response at which the punishment is 1. Typical: "
        "rollout.max_new_tokens.",
    )
    buffer: int = Field(
        default=4_096, ge=1, description="Over how many tokens the punishment grows from 0 to 1."
    )

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        tokens = batch.response_mask.sum(dim=1)
        return scores + ((self.max_tokens - self.buffer - tokens) / self.buffer).clamp(-1, 0).to(
            scores.dtype
        )


class LengthPenalty(ScoreShape):
    """coef · number of response tokens off the score: what a token must be worth to be written."""

    type: Literal["length"] = "length"
    coef: float = Field(default=0.01, description="Below 0 it pays for length.")

    def __call__(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B"]:
        return scores - self.coef * batch.response_mask.sum(dim=1).to(scores.dtype)


# --- giving it to tokens ---


def last_token_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B"]:
    """Return the index of the last response token of each row: the end-of-sequence token where
    there is one, never the pad after it. 0 for a row with an empty response."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, 0).amax(dim=1)


def at_last_token(scores: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Return rewards with the score on the last response token and 0 on every other; a row with an
    empty response gets none."""
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    return masked(rewards.scatter(1, last_token_index(mask)[:, None], scores[:, None]), mask)


def whiten_keeping_mean(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return (r − μ) / σ + μ (Ziegler et al. 2019, `whiten_rewards`). Not harmless: every token
    gets μ − μ / σ more than its share, which pays for length or for brevity."""
    return masked(whiten(rewards, mask) + masked_mean(rewards, mask), mask)


class Rewards(Family):
    """Which tokens get the score of a response."""

    needs_token_scores: ClassVar[bool] = False
    """Whether it reads `batch.token_scores`."""
    shapes_scores: ClassVar[bool] = True
    """Whether the shaped score of a response (`algorithm.scores`) has a place in it."""

    @property
    def whiten(self) -> bool:
        """Whether the rewards of all tokens are whitened, with their mean kept."""
        return False

    def score(self, batch: Batch) -> Float[Tensor, "B"]:
        """Return the score of each response, before it is shaped."""
        return batch.scores

    def place(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B T"]:
        """Return the reward of each token, given the shaped scores."""
        raise NotImplementedError


class LastToken(Rewards):
    """r_T = score on the last response token, 0 on every other (Ziegler et al. 2019)."""

    type: Literal["last_token"] = "last_token"
    whiten: bool = Field(
        default=False,
        description="Whether the rewards of the step are scaled to a standard deviation of "
        "1, with their mean kept.",
    )

    def place(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B T"]:
        return at_last_token(scores, batch.response_mask)


class MeanOfTokens(Rewards):
    """The score is the mean of the reward model's values at every response token; it goes to the
    last."""

    type: Literal["mean_of_tokens"] = "mean_of_tokens"
    whiten: bool = Field(
        default=False,
        description="Whether the rewards of the step are scaled to a standard deviation of "
        "1, with their mean kept.",
    )
    needs_token_scores = True

    def score(self, batch: Batch) -> Float[Tensor, "B"]:
        assert batch.token_scores is not None, "mean_of_tokens needs a score for each token"
        mask = batch.response_mask
        return masked(batch.token_scores, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def place(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B T"]:
        return at_last_token(scores, batch.response_mask)


class EveryToken(Rewards):
    """Every token keeps its own score: the reward model read at each of them, or dense rewards that
    the user gives."""

    type: Literal["every_token"] = "every_token"
    whiten: bool = Field(
        default=False,
        description="Whether the rewards of the step are scaled to a standard deviation of "
        "1, with their mean kept.",
    )
    needs_token_scores = True
    shapes_scores = False

    def place(self, scores: Float[Tensor, "B"], batch: Batch) -> Float[Tensor, "B T"]:
        assert batch.token_scores is not None, "every_token needs a score for each token"
        return masked(batch.token_scores, batch.response_mask)
