"""The interface of rewards, and the scores that they give to rollouts."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from quartet.errors import QuartetError
from quartet.experience import Rollout
from quartet.io.activity import activity
from quartet.io.texts import well_formed
from quartet.rewards.worker import NotScores, plain

log = logging.getLogger(__name__)
LARGEST = 3.4e38
"""Almost the largest number of float32. A score beyond it counts as none."""
LOGGED = 3
"""How many scores of one call that are no finite number are logged."""
DEVIATION = "deviation/"
"""Stands before the name of a reward among the components of a rollout: the deviation of its
score."""
Score = float | None
"""None: there is no score for this response (a judge that did not answer, a test that could not be
run). It is never read as 0: the response is left out of the step, and the step says how many
were."""


@runtime_checkable
class Reward(Protocol):
    """Scores responses. Metrics and rollouts call its scores by its `name`."""

    name: str

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """Return one number, or None, for each rollout, in their order."""
        ...


@runtime_checkable
class TokenReward(Reward, Protocol):
    """A reward that can also say what each token of a response is worth."""

    def token_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return one number per response token for each rollout; an empty list where there is no
        score."""
        ...


@runtime_checkable
class UncertainReward(Reward, Protocol):
    """A reward that knows how uncertain its scores are."""

    def uncertain_scores(self, rollouts: Sequence[Rollout]) -> list[tuple[Score, Score]]:
        """Return the score of each rollout, and the standard deviation of that score."""
        ...


@dataclass(frozen=True)
class Logged:
    """What a reward logs of one response beside its score."""

    metrics: Mapping[str, float]
    """By name; responses that were scored in one call share the number."""
    columns: Mapping[str, Any]
    """The values of this response, by column: texts, numbers or None."""


@runtime_checkable
class LoggingReward(Reward, Protocol):
    """A reward that logs metrics and columns of its own while it scores."""

    def logged(self, rollouts: Sequence[Rollout]) -> list[Logged]:
        """Return what was logged of each rollout when it was scored."""
        ...


class RewardError(QuartetError, RuntimeError):
    """A reward that cannot be used, or that returned something else than scores. The message may
    quote text of a server, a function or the policy."""

    def __init__(self, message: str) -> None:
        super().__init__(well_formed(message))


def openrlhf_labels(rollouts: Sequence[Rollout]) -> list[Any]:
    """Return what OpenRLHF calls the labels: each row's column `label`, else `answer`, else
    None."""
    return [r.prompt.extra.get("label", r.prompt.extra.get("answer")) for r in rollouts]


@dataclass(frozen=True)
class Weighted:
    """A reward and its weight in the score."""

    reward: Reward
    weight: float = 1.0


def rewarded(
    rollouts: Sequence[Rollout], rewards: Sequence[Weighted], per_token: bool = False
) -> list[Rollout]:
    """Return the rollouts with their score, the weighted sum of the rewards, and with each reward's
    own number by name, and that of an uncertain one with its deviation (`deviation/NAME`);
    with what rewards log beside it (`REWARD/NAME`); `per_token` also with the weighted sum of
    their numbers for each token.
    Where a reward that counts has no score, there is none at all; those of weight 0 are only
    watched."""
    columns: dict[str, list[Score]] = {}
    for w in rewards:
        columns |= _columns(w.reward, rollouts)
    logged = _logged(rollouts, rewards)
    scored = []
    for i, rollout in enumerate(rollouts):
        counted = [(w.weight, columns[w.reward.name][i]) for w in rewards if w.weight != 0]
        missing = any(score is None for _, score in counted)
        scored.append(
            dataclasses.replace(
                rollout,
                score=None
                if missing
                else sum((weight * (score or 0.0) for weight, score in counted), 0.0),
                components={name: column[i] for name, column in columns.items()},
                logged_metrics=logged[i].metrics,
                logged_columns=logged[i].columns,
            )
        )
    if not per_token:
        return scored
    totals = _token_scores(rollouts, scored, rewards)
    return [
        dataclasses.replace(r, token_scores=tuple(total))
        for r, total in zip(scored, totals, strict=True)
    ]


def _logged(rollouts: Sequence[Rollout], rewards: Sequence[Weighted]) -> list[Logged]:
    """Return what the rewards logged of each rollout, each name after that of its reward."""
    metrics: list[dict[str, float]] = [{} for _ in rollouts]
    columns: list[dict[str, Any]] = [{} for _ in rollouts]
    for w in rewards:
        if not isinstance(w.reward, LoggingReward):
            continue
        for i, own in enumerate(w.reward.logged(rollouts)):
            metrics[i] |= {f"{w.reward.name}/{name}": x for name, x in own.metrics.items()}
            columns[i] |= {f"{w.reward.name}/{name}": x for name, x in own.columns.items()}
    return [Logged(*both) for both in zip(metrics, columns, strict=True)]


def _columns(reward: Reward, rollouts: Sequence[Rollout]) -> dict[str, list[Score]]:
    """Return the scores of a reward by its name, and their deviations where it is uncertain."""
    with activity(f"reward {reward.name}"):
        if not isinstance(reward, UncertainReward):
            return {reward.name: _usable(reward, reward.score(rollouts), rollouts)}
        pairs = reward.uncertain_scores(rollouts)
    return {
        reward.name: _usable(reward, [score for score, _ in pairs], rollouts),
        f"{DEVIATION}{reward.name}": [deviation for _, deviation in pairs],
    }


def _usable(reward: Reward, column: Any, rollouts: Sequence[Rollout]) -> list[Score]:
    """Return one score for each rollout. A value that is no number of float32 (NaN, infinity,
    1e308) counts as no score. The first `LOGGED` of them are logged, and the number of the
    others."""
    column = _numbers(reward, column)
    if len(column) != len(rollouts):
        raise RewardError(
            f"reward {reward.name} returned {len(column)} value{'s' * (len(column) != 1)} for "
            f"{len(rollouts)} responses. "
            f"Return a list of {len(rollouts)} numbers."
        )
    usable = [  # a comparison with NaN is false
        score if score is None or abs(score) <= LARGEST else None for score in column
    ]
    left_out = [i for i, score in enumerate(column) if score is not None and usable[i] is None]
    for i in left_out[:LOGGED]:
        log.warning(
            "reward %s gave %s for %s, which is left out: %r",
            reward.name,
            column[i],
            rollouts[i].id,
            rollouts[i].response[:200],
        )
    if len(left_out) > LOGGED:
        more = len(left_out) - LOGGED
        log.warning("reward %s gave no finite number for %d more responses", reward.name, more)
    return usable


def _numbers(reward: Reward, scores: Any) -> list[Score]:
    """Return what a reward gave as numbers and None. Raises `RewardError` where it is none."""
    try:
        numbers = plain(scores)
    except NotScores as error:
        raise RewardError(f"reward {reward.name} {error}.") from None
    if (index := next((i for i, x in enumerate(numbers) if isinstance(x, list)), None)) is not None:
        raise RewardError(
            f"reward {reward.name} returned a list for response {index}. Return one number for "
            "each response."
        )
    return numbers


def check_model_scores(
    name: str, rollouts: Sequence[Rollout], scores: Sequence[Sequence[float]]
) -> None:
    """Raise `RewardError` where a reward model's numbers of a rollout are not finite. Other rewards
    may have no number for a response; a model that gives none has damaged weights."""
    for rollout, numbers in zip(rollouts, scores, strict=True):
        if not all(map(math.isfinite, numbers)):
            raise RewardError(
                f"reward {name}: the score of {rollout.id} is not finite: the model's weights are "
                f'wrong. The response is "{rollout.response[:200]}".'
            )


def with_score(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the rollouts that have a score. Raises `RewardError` if none has one."""
    kept = [r for r in rollouts if r.score is not None]
    if rollouts and not kept:
        absent = [
            name
            for name in rollouts[0].components
            if not name.startswith(DEVIATION) and all(r.components[name] is None for r in rollouts)
        ]
        raise RewardError(
            f"none of {len(rollouts)} responses has a "
            f"score{' from ' + ' and '.join(absent) if absent else ''}: there is nothing to learn "
            "from. None, NaN and infinities are no scores; run.log has the numbers."
        )
    return kept


def _token_scores(
    rollouts: Sequence[Rollout], scored: Sequence[Rollout], rewards: Sequence[Weighted]
) -> list[list[float]]:
    """Return the weighted sum of the rewards' numbers for each response token. The rewards are
    given the same rollouts as before, so that they can return what they computed then."""
    total = [[0.0] * len(r.response_ids) for r in rollouts]
    for w in rewards:
        if w.weight == 0:
            continue
        if not isinstance(w.reward, TokenReward):
            raise RewardError(
                f"reward {w.reward.name} gives one number per response, and the algorithm reads "
                f"one per token. Use a reward "
                'model, or algorithm.rewards.type = "last_token".'
            )
        for i, numbers in enumerate(w.reward.token_scores(rollouts)):
            if scored[i].score is None:
                continue
            if len(numbers) != len(total[i]):
                raise RewardError(
                    f"reward {w.reward.name} returned {len(numbers)} token scores for "
                    f"{rollouts[i].id}, "
                    f"which has {len(total[i])} tokens."
                )
            total[i] = [a + w.weight * b for a, b in zip(total[i], numbers, strict=True)]
    return total
