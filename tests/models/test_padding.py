import pytest
import torch

from quartet.distributed.balance import Prefix, cost, micro_batches, shares
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


def grouped(*sizes):
    """Rows of 10 tokens in groups of these sizes, that share 6 tokens in each group."""
    prefixes = [Prefix(bytes([group]), 6) for group, size in enumerate(sizes) for _ in range(size)]
    return [10] * len(prefixes), prefixes


def test_rows_with_one_prompt_share_a_micro_batch():
    """A group of three costs 30 tokens less two thirds of the 12 that are computed elsewhere: 22."""
    lengths, prefixes = grouped(3, 3, 2)
    assert cost(range(3), lengths, prefixes) == pytest.approx(22)
    assert micro_batches(lengths, 22, prefixes) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    # 30 would hold one more row of the next group, which stays whole instead
    assert micro_batches(lengths, 30, prefixes) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert micro_batches(lengths, 40, prefixes) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    # a group that no micro-batch holds is divided
    assert micro_batches(lengths, 16, prefixes) == [[0, 1], [2], [3, 4], [5], [6, 7]]
    assert micro_batches(lengths, 30) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_ranks_keep_prompts_together_where_the_busiest_has_less_to_do_then():
    lengths, prefixes = grouped(4, 4)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # groups mixed: rows 0, 2, 4, 6 and 1, 3, 5, 7
    lengths, prefixes = [lengths[i] for i in order], [prefixes[i] for i in order]
    assert shares(lengths, 2, prefixes) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # one group cannot be divided and kept: both ranks work
    lengths, prefixes = grouped(8)
    assert sorted(map(len, shares(lengths, 2, prefixes))) == [4, 4]
