"""Strings that end a response."""

import dataclasses

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.generation import native
from quartet.generation.dialects import DIALECTS
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from quartet.generation.slots import SlotDecoder
from quartet.generation.stops import LOOK_EVERY, StopStrings, StopWatch
from quartet.models.chat import after_reply
from quartet.models.language_model import stop_ids
from quartet.worlds.guess import message
from tests.generation.test_episodes import SAMPLING as TURN
from tests.generation.test_episodes import TOKENIZER, episodes, prompt_with
from tests.generation.test_servers import (  # noqa: F401  fixtures
    folder,
    generator,
    served,
)
from tests.support.world import model, prompts, tokenizer
from tests.training.test_learner import learner

STOP = ("good", "was not", "very")
LONG = Sampling(max_new_tokens=24)
STOPPED = dataclasses.replace(LONG, stop=STOP)


def ids_of(text):
    return tokenizer().encode(text, add_special_tokens=False)


def first_end(prompt_ids, ids, strings=STOP):
    """The length by the definition: the first prefix whose text has a string."""
    before = tokenizer().decode(prompt_ids, skip_special_tokens=True)
    for length in range(1, len(ids) + 1):
        text = tokenizer().decode([*prompt_ids, *ids[:length]], skip_special_tokens=True)
        if any(s in text[len(before) :] for s in strings):
            return length
    return None


def test_an_answer_by_hand():
    stops = StopStrings(tokenizer(), STOP)
    ids = ids_of("a film was long and was not good")
    assert stops.length((), ids) == 7, "a film was long and was not"
    assert stops.length((), ids[:6]) is None
    assert stops.text_before("a film was long and was not good") == "a film was long and "
    assert StopStrings(tokenizer(), ()).length((), ids) is None
    assert StopStrings(tokenizer(), ()).text_before("good") == "good"


class Cleaning:
    """A tokenizer that takes the space out of " n't" when it decodes, as BERT's does."""

    clean_up_tokenization_spaces = True
    words = ("do", " n", "'t", " go")

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.words[i] for i in ids).replace(" n't", "n't")


def test_an_answer_ends_where_its_text_first_had_the_string_even_if_later_text_changes_it():
    stops = StopStrings(Cleaning(), (" n",))
    assert stops.length((), (0, 1, 2, 3)) == 2, "do n, and then don't go"
    assert stops.length((), (0, 3)) is None
    assert stops.length((), (0, 1)) == 2, "by the last token of all"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [None, SlotDecoder])
@pytest.mark.parametrize("rows", [None, 3])
def test_answers_are_those_without_stop_strings_up_to_the_first(decoder, rows, monkeypatch):
    if decoder is not None:
        monkeypatch.setattr(native, "make_decoder", decoder)
    made, words = model(), tokenizer()

    def answers(sampling):
        one = NativeGenerator(made, words, stop_ids(made, words), 0, rows)
        return one.generate(prompts(12), sampling, 2)

    stopped = 0
    for whole, cut in zip(answers(LONG), answers(STOPPED), strict=True):
        length = first_end(whole.prompt.ids, whole.response_ids)
        stopped += length is not None
        assert cut.response_ids == whole.response_ids[:length]
        assert len(cut.logprobs) == len(cut.entropies) == len(cut.response_ids)
        torch.testing.assert_close(
            torch.tensor(cut.logprobs), torch.tensor(whole.logprobs[:length]), atol=1e-5, rtol=1e-5
        )
        assert not any(s in cut.response for s in STOP)
        if length is None:
            assert (cut.response, cut.finish_reason) == (whole.response, whole.finish_reason)
        else:
            assert cut.finish_reason == "stop" and whole.response.startswith(cut.response)
    assert 5 < stopped < 24


def test_the_learner_gives_the_tokens_of_a_stopped_answer_the_same_probability():
    made = learner("none", target_kl=1e9)
    made.sampling = dataclasses.replace(STOPPED, temperature=made.sampling.temperature)
    words = tokenizer()
    sampler = NativeGenerator(made.models.actor, words, frozenset({words.eos_token_id}), 0)
    rollouts = [
        dataclasses.replace(r, score=float(len(r.response_ids)))
        for r in sampler.generate(prompts(6), made.sampling)
    ]
    ends = [r for r in rollouts if r.finish_reason == "stop"]
    assert any(r.response_ids[-1] != words.eos_token_id for r in ends), "by a string"
    batch = made.score(rollouts, ALGORITHMS["grpo"])
    assert made.sampler_agrees is True
    assert batch.ended.tolist() == [r.finish_reason == "stop" for r in rollouts]
    update = made.update(ALGORITHMS["grpo"].experience(batch), ALGORITHMS["grpo"])
    assert update.first_ratio_error < 1e-5


def test_texts_are_looked_at_every_few_tokens_only():
    watch = StopWatch(StopStrings(tokenizer(), ("good",)), [(), ()])
    rows, alive = torch.tensor([0, 1]), torch.tensor([True, True])
    good, bad = ids_of("good bad")
    for _ in range(LOOK_EVERY - 1):
        assert watch.unfinished(rows, torch.tensor([good, bad]), alive) is alive
    assert watch.unfinished(rows, torch.tensor([bad, bad]), alive).tolist() == [False, True]
    for number in range(LOOK_EVERY):
        goes_on = watch.unfinished(rows, torch.tensor([bad, good if number == 6 else bad]), alive)
    assert goes_on.tolist() == [False, False]


def test_a_string_over_two_looks_is_found():
    watch = StopWatch(StopStrings(tokenizer(), ("was not",)), [()])
    row, alive = torch.tensor([0]), torch.tensor([True])
    was, no, film = ids_of("was not film")
    given = [film] * (LOOK_EVERY - 1) + [was, no] + [film] * (LOOK_EVERY - 1)
    found = [watch.unfinished(row, torch.tensor([token]), alive) for token in given]
    assert bool(found[LOOK_EVERY - 1]) and not bool(found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_answers_of_servers_are_cut_at_the_same_place(folder, generator, kind):  # noqa: F811
    with served(folder / "first", kind=kind) as (url, _):
        whole = generator(folder / "a", [url], kind).generate(prompts(6), LONG, 2)
        cut = generator(folder / "b", [url], kind).generate(prompts(6), STOPPED, 2)
    lengths = [first_end(r.prompt.ids, r.response_ids) for r in whole]
    assert any(length is not None for length in lengths)
    for one, other, length in zip(whole, cut, lengths, strict=True):
        assert other.response_ids == one.response_ids[:length]
        assert other.logprobs == one.logprobs[:length] and len(other.versions) == len(
            other.response_ids
        )
        assert length is None or other.finish_reason == "stop"
        assert not any(s in other.response for s in STOP)


def test_servers_are_given_the_strings():
    for kind, dialect in DIALECTS.items():
        plain, stopped = (
            dialect.write([1], 8, sampling, [2], 0, None).body["sampling_params"]
            for sampling in (LONG, STOPPED)
        )
        assert "stop" not in plain and stopped["stop"] == list(STOP)
        if kind == "vllm":  # it looks for strings only in texts that it makes
            assert (plain["detokenize"], stopped["detokenize"]) == (False, True)


class Unended(ScriptedGenerator):
    """A generator whose turns are ended by a string, with no token that ends a turn."""

    def generate(self, contexts, sampling, samples_per_prompt=1):
        return [
            dataclasses.replace(r, response_ids=r.response_ids[:1], logprobs=r.logprobs[:1])
            for r in super().generate(contexts, sampling, samples_per_prompt)
        ]


def test_a_turn_that_a_string_has_ended_is_closed_by_the_template():
    sampling = dataclasses.replace(TURN, stop=("h", "c", "e"))
    [made] = episodes(Unended(["h", "c", "e"], TOKENIZER)).generate([prompt_with("e")], sampling)
    assert TOKENIZER.decode(made.response_ids) == "h<eos><c<eos>>e<eos>="
    assert made.policy_mask == (True, False, False) * 3
    reply = after_reply(TOKENIZER, prompt_with("e").messages, [message("<")], None)
    assert TOKENIZER.decode(reply) == "<eos><"
