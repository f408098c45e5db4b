"""Which states and next tokens an audit of a critic takes, by hand."""

import dataclasses

import numpy as np
import pytest

from quartet.evaluation.critic_samples import LAMBDAS, _action, _known, candidates, positions
from tests.support.world import prompts, rollout


def answer(*ids):
    return rollout(prompts(1)[0], ids, 1.0)


def test_places_are_the_first_one_and_one_in_each_part_of_the_rest():
    for seed in range(50):
        first, *others = positions(10, 4, np.random.default_rng(seed))
        assert first == 0 and [(place - 1) // 3 for place in others] == [0, 1, 2]
    rng = np.random.default_rng(0)
    assert positions(1, 4, rng) == [0] and positions(2, 4, rng) == [0, 1]
    assert {positions(3, 2, rng)[1] for _ in range(50)} == {1, 2}


def test_next_tokens_are_the_answers_own_and_the_most_frequent_others():
    ended = answer(1, 4)
    others = [answer(1, 5, 8), ended, answer(1, 4, 9), answer(1, 2, 7), answer(1, 6, 6)]
    own, most, second = candidates(answer(1, 2, 3), 1, others)
    assert [own.response_ids, most.response_ids, second.response_ids] == [(1, 2), (1, 4), (1, 5)]
    assert most is ended, "a response that ends with the token stays whole"
    assert (own.finish_reason, own.score) == ("length", None)
    [only] = candidates(answer(1, 2), 1, [answer(1, 2, 7)])
    assert only.response_ids == (1, 2)


def test_the_numbers_of_a_next_token():
    start = answer(1, 2)
    rollouts = [answer(1, 2, 3), dataclasses.replace(start, id="other"), answer(1, 2, 4)]
    # V, the return, and the advantages at each λ; at λ = 0 that is r + γ V' − V
    rows = {
        id(each): np.array([0.5, g, 0.25, *range(len(LAMBDAS) - 1)])
        for each, g in zip(rollouts[:2], (3.0, 4.0), strict=True)
    }
    numbers = _known(rows, rollouts)
    assert numbers.shape == (2, 2 + len(LAMBDAS)), "the third has no score"
    found = _action(start, 1, True, rollouts, numbers)
    assert (found.token, found.is_sampled, found.ends) == (2, True, False)
    assert found.critic == pytest.approx(0.75) and found.returns.tolist() == [3.0, 4.0]
    assert found.advantages[0].tolist() == [0.25, *range(len(LAMBDAS) - 1)]
    assert _action(start, 1, False, [start], numbers[:1]).ends
    assert not _action(start, 1, False, rollouts[:1], numbers[:1]).ends
    assert _known(rows, []).shape == (0, 2 + len(LAMBDAS))
