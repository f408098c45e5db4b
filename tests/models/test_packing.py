"""Rows end to end, by hand."""

import pytest
import torch

from quartet.models.packing import (
    pack,
    pack_rows,
    prefixes,
    real_tokens,
    repacked,
    take,
    tokens_stood_for,
    unpacked,
)


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_rows_of_four_and_two_tokens():
    tokens = torch.tensor([[10, 11, 12, 13], [20, 21, 0, 0]])
    mask = mask_of([0, 0, 0, 1], [0, 1, 0, 0])
    packed = pack(tokens, mask)
    assert packed.tokens.tolist() == [10, 11, 12, 13, 20, 21]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert (packed.lengths, packed.width, packed.rows) == ((4, 2), 4, 2)
    assert packed.starts.tolist() == [0, 4, 6] and packed.starts.dtype == torch.int32
    assert packed.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.output_index.tolist() == [3, 5] and packed.repeats is None
    assert real_tokens(packed, mask).tolist() == [1.0] * 6 + [0.0] * 2
    assert tokens_stood_for(packed, mask).tolist() == [1.0] * 6


def test_what_stands_behind_the_last_output_is_left_out():
    tokens = torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9]])
    packed = pack(tokens, mask_of([0, 1, 1, 0], [1, 0, 0, 0]))
    assert packed.tokens.tolist() == [1, 2, 3, 4] and packed.positions.tolist() == [0, 1, 2, 0]
    assert (packed.lengths, packed.width) == ((3, 1), 3)
    assert packed.places.tolist() == [0, 1, 2, 3]
    assert packed.output_index.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("length", "is_packed"), [(7, True), (8, False), (10, False)])
def test_a_rectangle_with_little_padding_stays_whole(length, is_packed):
    """18 of 20 places are enough."""
    tokens = torch.arange(20).view(2, 10)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 9] = mask[1, length - 1] = True
    packed = pack(tokens, mask)
    if is_packed:
        assert packed.lengths == (10, 7) and len(packed.tokens) == len(packed.places) == 17
        assert packed.output_index.tolist() == [9, 16]
        return
    assert packed.places is None and packed.lengths == (10, 10)
    assert packed.tokens.tolist() == list(range(20))
    assert packed.positions.tolist() == [*range(10), *range(10)]
    assert packed.output_index.tolist() == [9, 9 + length]
    real = [1.0] * (10 + length) + [0.0] * (10 - length)
    assert real_tokens(packed, mask).tolist() == real


def test_a_prompt_of_two_rows_is_packed_once():
    # The first output is that of the prompt's last token, which is computed for both.
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8]])
    mask = mask_of([0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0])
    assert [prefix.length for prefix in prefixes(tokens, mask)] == [3, 3]
    packed = pack(tokens, mask)
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5, 4, 7]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert (packed.lengths, packed.width) == ((5, 2), 5)
    assert packed.places.tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert packed.output_index.tolist() == [3, 4, 5, 6]
    repeats = packed.repeats
    assert repeats.places.tolist() == [5, 6, 7] and repeats.sources.tolist() == [0, 1, 2]
    assert repeats.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]
    assert repeats.key_starts.tolist() == [0, 5, 10]
    assert tokens_stood_for(packed, mask).tolist() == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    own = unpacked(packed.tokens, packed)
    assert own.tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 4, 7]]
    assert unpacked(packed.tokens, packed, repeats).tolist() == tokens[:, :5].tolist()
    assert repacked(own, packed).tolist() == packed.tokens.tolist()


@pytest.mark.parametrize(("shared", "is_shared"), [(2, False), (3, True)])
def test_a_prompt_of_a_tenth_of_the_tokens_is_not_worth_sharing(shared, is_shared):
    tokens = torch.arange(20).view(2, 10)
    tokens[1, :shared] = tokens[0, :shared]
    mask = (torch.arange(10) >= shared).expand(2, 10)
    packed = pack(tokens, mask)
    assert (packed.repeats is not None) == is_shared
    assert len(packed.tokens) == 20 - shared * is_shared


def test_whole_rows_need_the_output_of_their_last_tokens():
    packed = pack_rows([(1, 2), (3, 4, 5)], torch.device("cpu"))
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2]
    assert (packed.lengths, packed.width) == ((2, 3), 3)
    assert packed.places.tolist() == [0, 1, 3, 4, 5]
    assert packed.output_index.tolist() == [1, 4] and packed.starts.tolist() == [0, 2, 5]
    assert pack_rows([(1, 2), (3, 4)], torch.device("cpu")).places is None


def test_the_gradient_of_taking_rows_is_where_they_were():
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    taken = take(x, torch.tensor([2, 0]))
    assert taken.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    (taken * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert x.grad.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
