"""Comparison of a policy with its initial policy on the same held-out prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quartet.experience import Rollout
from quartet.rewards.protocol import RewardError, Score
from quartet.training.metrics import distinct, mean_and_interval, response_metrics

Gold = Callable[[str, str], float]


@dataclass(frozen=True)
class MeanAndInterval:
    """A mean and half the width of its 95% confidence interval."""

    mean: float
    interval: float


@dataclass(frozen=True)
class PolicyComparison:
    """The result of the evaluation, over the prompts for which both answers could be judged. A win
    is a higher gold reward than the other policy's answer to the same prompt, a tie half a win;
    where there is no gold reward, the training reward judges, which flatters the policy trained on
    it."""

    judge: str
    prompts: int
    win_rate: MeanAndInterval
    kl: MeanAndInterval
    """KL of a response to the policy before, in nats: the mean of Σ_t log π(t) − log π_before(t)
    over the policy's own answers."""
    before: dict[str, float]
    after: dict[str, float]
    samples: tuple[dict[str, str], ...]
    """Prompts with both answers, to be read."""


def compare(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    kl: Sequence[float],
    gold: Gold | None,
    samples: int = 8,
) -> PolicyComparison:
    """Compare the responses of two policies. `before` and `after` have one rewarded response to
    each prompt, in the same order; `kl` has one number per response."""
    wins = wins_of(before, after, gold)
    if not wins:
        raise RewardError(
            "there is no prompt for which both answers have a score, so they cannot be compared."
        )
    return PolicyComparison(
        judge="gold" if gold else "reward",
        prompts=len(wins),
        win_rate=MeanAndInterval(*mean_and_interval(wins)),
        kl=MeanAndInterval(*mean_and_interval(kl)),
        before=_measures(before, gold),
        after=_measures(after, gold),
        samples=tuple(
            {"prompt": a.prompt.text, "before": a.response, "after": b.response}
            for a, b in list(zip(before, after, strict=True))[:samples]
        ),
    )


def wins_of(before: Sequence[Rollout], after: Sequence[Rollout], gold: Gold | None) -> list[float]:
    """Return 1, ½ or 0 (win, tie, loss of `after`) for each prompt whose two responses both have a
    score."""
    worth = zip(_worth(before, gold), _worth(after, gold), strict=True)
    return [
        1.0 if b > a else 0.5 if b == a else 0.0
        for a, b in worth
        if a is not None and b is not None
    ]


def _worth(rollouts: Sequence[Rollout], gold: Gold | None) -> list[Score]:
    return [gold(r.prompt.text, r.response) if gold else r.score for r in rollouts]


def _measures(rollouts: Sequence[Rollout], gold: Gold | None) -> dict[str, float]:
    measures = response_metrics(rollouts) | {
        "response/distinct": distinct([r.response for r in rollouts])
    }
    if gold:
        measures["gold"] = mean_and_interval([gold(r.prompt.text, r.response) for r in rollouts])[0]
    return measures
