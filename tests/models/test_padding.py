import torch

from quartet.distributed.balance import micro_batches
from quartet.models.padding import left_pad, response_mask, right_pad, spread

ROWS = [[5, 6, 7], [8]]


def test_rows_are_padded_on_either_side():
    tokens, lengths = right_pad(ROWS)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert lengths.tolist() == [3, 1]
    tokens, mask = left_pad(ROWS)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_the_response_mask_comes_from_lengths_even_where_a_real_token_equals_the_pad():
    # A prompt of one token and a response (0, 0): id 0 is real here.
    tokens, lengths = right_pad([[5, 0, 0], [8]])
    assert response_mask(torch.tensor([1, 1]), lengths, tokens.shape[1]).tolist() == [
        [False, True, True],
        [False] * 3,
    ]


def test_numbers_are_spread_over_their_tokens():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert spread([[1.0, 2.0], [3.0]], mask).tolist() == [[0, 1, 2], [3, 0, 0]]


def test_micro_batches_hold_their_budget_and_lose_no_row():
    lengths = [9, 2, 3, 8, 2, 30]
    groups = micro_batches(lengths, max_tokens=18)
    assert sorted(i for group in groups for i in group) == list(range(6))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 18
    assert [5] in groups  # longer than the budget, so alone
