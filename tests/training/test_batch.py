"""Rollouts as tensors, by hand."""

import dataclasses
import math

import torch

from quartet.training.batch import collate
from tests.support.world import prompts, rollout

PROMPT = dataclasses.replace(prompts(1)[0], ids=(9, 8))
FULL = {
    "logprobs": (-1.0, -2.0, -3.0),
    "entropies": (0.1, 0.2, 0.3),
    "token_scores": (1.0, 2.0, 3.0),
    "state_values": (0.5, 0.9, None),
    "greedy_score": 0.25,
}
TURNS = dataclasses.replace(
    rollout(PROMPT, (5, 6, 7), 2.0), policy_mask=(True, False, True), **FULL
)
SHORT = dataclasses.replace(
    rollout(dataclasses.replace(PROMPT, ids=(9,)), (4,), None, 1, 1),
    logprobs=(-4.0,),
    entropies=(0.4,),
    token_scores=(4.0,),
    state_values=(0.75,),
    greedy_score=0.5,
    finish_reason="length",
)


def test_what_an_environment_wrote_is_outside_the_mask():
    batch = collate([TURNS, SHORT])
    assert batch.tokens.tolist() == [[9, 8, 5, 6, 7], [9, 4, 0, 0, 0]]
    assert batch.lengths.tolist() == [5, 2] and batch.groups.tolist() == [0, 1]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]
    assert batch.ended.tolist() == [True, False]
    assert batch.scores[0] == 2.0 and math.isnan(batch.scores[1])


def test_numbers_of_tokens_are_at_the_tokens_of_the_policy():
    batch = collate([TURNS, SHORT])
    assert batch.rollout_logprobs.tolist() == [[0, 0, -1, 0, -3], [0, -4, 0, 0, 0]]
    assert torch.equal(batch.old_logprobs, batch.rollout_logprobs)
    for name, a, b, c in (("entropy", 0.1, 0.3, 0.4), ("token_scores", 1.0, 3.0, 4.0)):
        expected = torch.tensor([[0, 0, a, 0, b], [0, c, 0, 0, 0]])
        assert torch.equal(getattr(batch, name), expected)
    assert batch.greedy_scores.tolist() == [0.25, 0.5]
    # NaN where no continuation was sampled
    values = batch.state_values
    assert values[0, 2] == 0.5 and math.isnan(values[0, 4]) and values[1].tolist()[:2] == [0, 0.75]


def test_what_one_rollout_lacks_the_batch_lacks():
    for name in ("entropies", "token_scores", "state_values", "greedy_score"):
        batch = collate([TURNS, dataclasses.replace(SHORT, **{name: None})])
        assert (
            getattr(
                batch, {"entropies": "entropy", "greedy_score": "greedy_scores"}.get(name, name)
            )
            is None
        )
