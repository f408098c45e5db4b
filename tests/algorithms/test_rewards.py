import torch

from quartet.algorithms.rewards import LastToken, last_token_index

# Prompts of 2 and 1 tokens, responses of 2 and 3; the last column of row 0 is padding.
MASK = torch.tensor([[False, False, True, True, False], [False, True, True, True, False]])


def test_the_score_sits_on_the_last_response_token_and_not_on_the_pad_after_it():
    rewards = LastToken()(torch.tensor([1.5, -2.0]), MASK)
    assert rewards.tolist() == [[0, 0, 0, 1.5, 0], [0, 0, 0, -2.0, 0]]
    assert last_token_index(MASK).tolist() == [3, 3]


def test_scores_are_clipped_on_both_sides():
    assert LastToken(clip=5.0)(torch.tensor([7.0, -7.0]), MASK).sum(dim=1).tolist() == [5, -5]


def test_an_infinite_clip_leaves_them_alone():
    assert LastToken(clip=float("inf"))(torch.tensor([70.0, -7.0]), MASK).sum(dim=1).tolist() == [70, -7]


def test_an_empty_response_gets_nothing():
    assert LastToken()(torch.tensor([1.0]), torch.zeros(1, 4, dtype=torch.bool)).abs().sum() == 0
