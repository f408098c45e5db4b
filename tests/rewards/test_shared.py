"""Rewards that several ranks ask for."""

import pytest

from quartet.distributed.process_group import SINGLE_PROCESS
from quartet.rewards.protocol import Logged, RewardError, Weighted, rewarded
from quartet.rewards.shared import shared
from quartet.training.metrics import response_metrics
from tests.support.thread_ranks import on_ranks
from tests.support.world import prompts, rollout

LENGTHS = [9, 1, 2, 1, 5, 1, 1, 3, 8, 2, 4, 4]


def rollouts():
    """Three answers to each of four prompts, in turns."""
    return [rollout(prompts(4)[i % 4], (5,) * n, 0.0, i % 4, i // 4) for i, n in enumerate(LENGTHS)]


class Rank:
    """How many answers to the same prompt are longer: it has to see them all."""

    name = "rank"

    def __init__(self):
        self.asked = []

    def score(self, rows):
        self.asked.append([r.id for r in rows])
        sizes = [[len(o.response_ids) for o in rows if o.group == r.group] for r in rows]
        assert all(len(size) == 3 for size in sizes)
        return [
            float(sum(n > len(r.response_ids) for n in size))
            for r, size in zip(rows, sizes, strict=True)
        ]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_answers_to_one_prompt_are_asked_of_one_rank(world):
    alone, asked = Rank().score(rollouts()), []

    def score(process_group):
        reward = Rank()
        scores = shared(reward, process_group).score(rollouts())
        asked.append(reward.asked)
        return scores

    assert on_ranks(world, score) == [alone] * world
    assert sorted(i for calls in asked for ids in calls for i in ids) == sorted(
        r.id for r in rollouts()
    ), "each once"


def test_what_fails_on_one_rank_fails_on_all():
    class Picky(Rank):
        def score(self, rows):
            if any(r.group == 0 for r in rows):
                raise RewardError("no such film.")
            return [1.0] * len(rows)

    def score(process_group):
        with pytest.raises(RewardError, match="no such film"):
            shared(Picky(), process_group).score(rollouts())
        return True

    assert on_ranks(2, score) == [True, True]


def test_alone_it_is_the_reward_itself():
    reward = Rank()
    assert shared(reward, SINGLE_PROCESS) is reward


class Counts:
    """Logs, of the responses it is given, how many tokens they have on average, and each one's."""

    name = "counts"

    def score(self, rows):
        return [1.0] * len(rows)

    def token_scores(self, rows):
        return [[1.0] * len(r.response_ids) for r in rows]

    def logged(self, rows):
        sizes = [len(r.response_ids) for r in rows]
        return [Logged({"mean": sum(sizes) / len(sizes)}, {"size": size}) for size in sizes]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_what_is_logged_is_the_same_on_every_rank_and_as_on_one(world):
    def log(process_group):
        scored = rewarded(rollouts(), [Weighted(shared(Counts(), process_group))])
        return response_metrics(scored), [r.logged_columns for r in scored]

    [(metrics, columns), *others] = on_ranks(world, log)
    assert others == [(metrics, columns)] * (world - 1)
    assert columns == [{"counts/size": n} for n in LENGTHS]
    assert metrics["logged/counts/mean"] == pytest.approx(sum(LENGTHS) / len(LENGTHS))
    alone, _ = log(SINGLE_PROCESS)
    assert metrics["logged/counts/mean"] == pytest.approx(alone["logged/counts/mean"])
