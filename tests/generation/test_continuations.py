"""Responses that are finished from a state in their middle."""

import dataclasses

import pytest

from quartet.generation.continuations import continued, cut
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.language_model import stop_ids
from tests.support.world import model, prompts, rollout, tokenizer


@pytest.fixture(scope="module")
def generator():
    made, words = model(), tokenizer()
    return NativeGenerator(made, words, stop_ids(made, words), 0)


def test_a_beginning_has_no_text_no_score_and_no_end():
    whole = dataclasses.replace(
        rollout(prompts(1)[0], (5, 6, 7), 2.0), entropies=(0.1, 0.2, 0.3), kept=("a", "b", "c")
    )
    begun = cut(dataclasses.replace(whole, logprobs=(-1.0, -2.0, -3.0)), 2)
    assert (begun.response_ids, begun.logprobs) == ((5, 6), (-1.0, -2.0))
    assert (begun.entropies, begun.kept) == ((0.1, 0.2), ("a", "b"))
    assert (begun.response, begun.score, begun.components) == ("", None, {})
    assert begun.finish_reason == "length"
    assert cut(whole, 0).response_ids == () and cut(dataclasses.replace(whole, kept=None), 1)


def test_the_whole_has_the_limits_of_a_response_whatever_it_began_with(generator):
    sampling = Sampling(max_new_tokens=8, min_new_tokens=6, keep_mask=True)
    lengths = (5, 2, 5, 7)
    answers = generator.generate(prompts(4), dataclasses.replace(sampling, min_new_tokens=8))
    begun = [cut(whole, length) for whole, length in zip(answers, lengths, strict=True)]
    seen = []
    found = continued(generator, begun, sampling, 60, lambda *done: seen.append(done))
    assert seen == [(1, 4), (3, 4), (4, 4)], "the shortest first"
    for number, (beginning, own, length) in enumerate(zip(begun, found, lengths, strict=True)):
        assert [r.id for r in own] == [f"{beginning.prompt.id}/{i}" for i in range(60)]
        for r in own:
            assert r.prompt == beginning.prompt and r.group == number
            assert r.response_ids[:length] == beginning.response_ids
            assert r.logprobs[:length] == beginning.logprobs
            assert r.entropies[:length] == beginning.entropies
            assert r.kept[:length] == beginning.kept
            assert len(r.response_ids) == len(r.logprobs) == len(r.entropies) == len(r.kept)
            assert r.finish_reason == "stop" or len(r.response_ids) == 8
        # As in any response, the token that ends it may be the seventh.
        assert {len(r.response_ids) for r in own} == ({8} if length == 7 else {7, 8})


def test_a_stop_string_may_begin_in_the_beginning(generator):
    was, no = tokenizer().encode("was not", add_special_tokens=False)
    begun = cut(rollout(prompts(1)[0], (was, was), 1.0), 1)
    begun = dataclasses.replace(begun, entropies=(1.0,))
    [found] = continued(generator, [begun], Sampling(max_new_tokens=4, stop=("was not",)), 200)
    at_once = [r for r in found if r.response_ids[1] == no]
    assert at_once and all(r.response_ids == (was, no) for r in at_once)
    assert {(r.response, r.finish_reason) for r in at_once} == {(" ", "stop")}
