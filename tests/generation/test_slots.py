"""The decoder for GPUs, on a CPU: the same answers as the others give, in few shapes."""

import dataclasses

import pytest
import torch

from quartet.generation import native, slots
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.slots import COLUMNS, LOOK_EVERY, SlotDecoder, bucket
from quartet.models.language_model import stop_ids
from quartet.models.precision import compute_in
from tests.support.world import model, prompts, tokenizer


def answers(made, rows=None, samples=2, limit=24):
    words = tokenizer()
    generator = NativeGenerator(made, words, stop_ids(made, words), 0, rows)
    return generator.generate(prompts(20), Sampling(max_new_tokens=limit), samples)


@pytest.mark.parametrize("rows", [None, 7, 2])
@pytest.mark.parametrize("look_every", [1, 5, LOOK_EVERY])
def test_answers_are_those_of_the_other_decoder_however_seldom_their_ends_are_looked_at(
    rows, look_every, monkeypatch
):
    made = model()
    expected = answers(made)
    monkeypatch.setattr(slots, "LOOK_EVERY", look_every)
    monkeypatch.setattr(SlotDecoder, "look_every", look_every)
    monkeypatch.setattr(native, "make_decoder", SlotDecoder)
    found = answers(made, rows)
    assert [r.response_ids for r in found] == [r.response_ids for r in expected]
    assert len({len(r.response_ids) for r in found}) > 5
    for a, b in zip(found, expected, strict=True):
        assert a.finish_reason == b.finish_reason and len(a.logprobs) == len(a.response_ids)
        torch.testing.assert_close(
            torch.tensor([a.logprobs, a.entropies]), torch.tensor([b.logprobs, b.entropies]),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip


def test_in_bfloat16_the_learner_gives_the_answers_nearly_the_same_probability(monkeypatch):
    made = compute_in(model(), torch.bfloat16)
    gap = {}
    for kind in ("rectangles", "slots"):
        if kind == "slots":
            monkeypatch.setattr(native, "make_decoder", SlotDecoder)
        gap[kind] = [dataclasses.replace(r, score=0.0) for r in answers(made)]
    same = [a.response_ids == b.response_ids for a, b in zip(*gap.values(), strict=True)]
    assert sum(same) > len(same) / 2  # a token at the edge of its interval may fall to either side


def test_shapes_come_from_a_small_set(monkeypatch):
    """What a graph is recorded for: a power of two of slots, and of 256 columns."""
    made, shapes = model(), set()
    real = SlotDecoder._step

    def seen(self, count):
        shapes.add((count, self.columns))
        return real(self, count)

    monkeypatch.setattr(SlotDecoder, "_step", seen)
    monkeypatch.setattr(native, "make_decoder", SlotDecoder)
    answers(made, samples=3)
    assert shapes <= {(count, COLUMNS) for count in (8, 16, 32, 64)} and len(shapes) > 1


def test_a_cache_grows_to_the_next_bucket_and_keeps_what_it_held():
    made = model()
    decoder = SlotDecoder(made, 2 * COLUMNS, 100)
    prompt = [5, 6, 7] * 3
    logits = decoder.prefill([prompt], 3)
    before = decoder.caches[0][:3, : len(prompt)].clone()
    decoder._resize(20, COLUMNS + 1)
    assert decoder.caches[0].shape[:2] == (32, 2 * COLUMNS)
    assert torch.equal(decoder.caches[0][:3, : len(prompt)], before)
    following = decoder.step(torch.tensor([4, 5, 6]))
    alone = made(input_ids=torch.tensor([[*prompt, 5]])).logits[0, -1]
    torch.testing.assert_close(following[1], alone, atol=1e-5, rtol=1e-5)
    assert len(logits) == 3


def test_buckets():
    assert [bucket(n, 8, 100) for n in (1, 8, 9, 64, 65, 99)] == [8, 8, 16, 64, 100, 100]
