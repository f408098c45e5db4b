import dataclasses

import pytest
import torch

from quartet.algorithms.aggregation import TokenMean
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.baselines import ReturnToGo
from quartet.algorithms.kl import KLInReward, NoKL
from quartet.algorithms.rewards import (
    ClipScore,
    EveryToken,
    LastToken,
    LengthPenalty,
    MeanOfTokens,
    MissingEos,
    RunningScale,
    SoftOverlong,
    at_last_token,
    last_token_index,
)
from tests.support.world import ragged_batch

# Prompts of 2 and 1 tokens, responses of 2 and 3; the last column of row 0 is padding.
MASK = torch.tensor([[False, False, True, True, False], [False, True, True, True, False]])


def batch(lengths=(2, 3), scores=(1.5, -2.0), ended=(True, True), **others):
    made = ragged_batch(list(lengths), list(scores))
    return dataclasses.replace(made, ended=torch.tensor(ended), **others)


def shaped(part, **settings):
    made = batch(**settings)
    return part(made.scores, made).tolist()


def test_the_score_sits_on_the_last_response_token_and_not_on_the_pad_after_it():
    rewards = at_last_token(torch.tensor([1.5, -2.0]), MASK)
    assert rewards.tolist() == [[0, 0, 0, 1.5, 0], [0, 0, 0, -2.0, 0]]
    assert last_token_index(MASK).tolist() == [3, 3]


def test_an_empty_response_gets_nothing():
    assert at_last_token(torch.tensor([1.0]), torch.zeros(1, 4, dtype=torch.bool)).abs().sum() == 0


def test_scores_are_clipped_on_both_sides():
    assert shaped(ClipScore(limit=5.0), scores=(7.0, -7.0)) == [5, -5]


def test_the_responses_whose_scores_are_beyond_a_limit_are_named_as_the_limit_sees_them():
    made = batch(scores=(7.0, -3.0))
    frame = {"advantage": ReturnToGo(), "kl": NoKL(), "aggregation": TokenMean()}

    def clipped(*shapes):
        return Algorithm(**frame, scores=shapes).clipped_scores(made).tolist()

    assert clipped(ClipScore(limit=5.0)) == [True, False]
    assert clipped(ClipScore(limit=7.0)) == clipped() == [False, False]
    assert clipped(ClipScore(limit=2.0), ClipScore(limit=2.5)) == [True, True]
    scaled = RunningScale(count=2.0, mean=0.0, squares=100.0)  # σ = √(158 / 3) = 7.3 with these
    assert clipped(scaled, ClipScore(limit=0.9)) == [True, False]


def test_a_response_that_was_cut_off_pays_or_is_replaced():
    assert shaped(MissingEos(penalty=1.0), ended=(True, False)) == [1.5, -3.0]
    assert shaped(MissingEos(penalty=1.0, replace=True), ended=(True, False)) == [1.5, -1.0]


def test_the_overlong_punishment_grows_in_a_straight_line():
    # budget 20, buffer 5: nothing up to 15 tokens, (15 − 17) / 5 = −0.4 at 17, −1 at 20 and beyond
    part = SoftOverlong(max_tokens=20, buffer=5)
    lengths = (15, 17, 20, 23)
    assert shaped(part, lengths=lengths, scores=(0.0,) * 4, ended=(True,) * 4) == pytest.approx(
        [0, -0.4, -1, -1]
    )


def test_a_price_per_token():
    assert shaped(LengthPenalty(coef=0.1)) == pytest.approx([1.3, -2.3])


def test_running_scale_is_that_of_all_scores_so_far():
    """Two steps against the deviation of all their scores at once."""
    first, second = batch(scores=(1.0, 3.0)), batch(scores=(2.0, 8.0))
    part = RunningScale()
    # after 1 and 3: σ = √2
    assert part(first.scores, first).tolist() == pytest.approx([1 / 2**0.5, 3 / 2**0.5])
    part = part.adapt({"responses": 2.0, "reward": 2.0, "reward/std": 1.0})
    everything = torch.tensor([1.0, 3.0, 2.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(part(second.scores, second), second.scores / everything.std())
    centred = dataclasses.replace(part, centre=True)
    torch.testing.assert_close(
        centred(second.scores, second), (second.scores - everything.mean()) / everything.std()
    )


def test_scores_that_never_differed_are_not_divided_by_nothing():
    assert shaped(RunningScale(), scores=(0.7, 0.7)) == [0.7, 0.7]
    assert shaped(RunningScale(centre=True), scores=(0.5, 0.5)) == [0, 0]


def algorithm(**parts):
    return Algorithm(
        **({"advantage": ReturnToGo(), "kl": NoKL(), "aggregation": TokenMean()} | parts)
    )


def test_shaping_goes_in_the_order_of_the_list():
    made = batch(scores=(7.0, 7.0), ended=(True, False))
    clip_first = algorithm(scores=(ClipScore(limit=5.0), MissingEos(penalty=2.0)))
    penalty_first = algorithm(scores=(MissingEos(penalty=2.0), ClipScore(limit=5.0)))
    assert clip_first.token_rewards(made).sum(dim=1).tolist() == [5, 3]
    assert penalty_first.token_rewards(made).sum(dim=1).tolist() == [5, 5]


def test_the_mean_of_token_scores_goes_to_the_last_token():
    scores = torch.tensor([[0.0, 1.0, 3.0, 9.0], [0.0, 1.0, 1.0, 4.0]], dtype=torch.float64)
    rewards = algorithm(rewards=MeanOfTokens()).token_rewards(batch(token_scores=scores))
    assert rewards.tolist() == [[0, 0, 2.0, 0], [0, 0, 0, 2.0]]


def test_every_token_keeps_its_own_score_and_pays_its_own_penalty():
    made = batch(token_scores=torch.ones(2, 4, dtype=torch.float64))
    plain = algorithm(rewards=EveryToken()).token_rewards(made)
    assert plain.tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    penalised = algorithm(rewards=EveryToken(), kl=KLInReward(coef=0.5)).token_rewards(made)
    expected = plain - 0.5 * torch.where(
        made.response_mask, made.old_logprobs - made.ref_logprobs, 0.0
    )
    torch.testing.assert_close(penalised, expected)


def test_scores_that_nobody_reads_are_refused():
    with pytest.raises(ValueError, match="scores: shape the score of a response"):
        algorithm(rewards=EveryToken(), scores=(ClipScore(),))


def test_whitening_keeps_the_mean_and_makes_the_deviation_1():
    made = batch(lengths=(9, 7))
    rewards = algorithm(rewards=LastToken(whiten=True), kl=KLInReward()).token_rewards(made)[
        made.response_mask
    ]
    plain = algorithm(kl=KLInReward()).token_rewards(made)[made.response_mask]
    assert rewards.mean().item() == pytest.approx(plain.mean().item())
    assert rewards.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
