"""A smallest length: what ends a response cannot be sampled before, for sampler and learner."""

import dataclasses

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.experience import pack_ids
from quartet.generation import native
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.slots import SlotDecoder
from tests.support.world import model, prompts, rollout, tokenizer
from tests.training.test_keep_mask import filtered_learner, next_logits, sampled

LEAST = 4
SAMPLING = Sampling(max_new_tokens=12, temperature=0.8, min_new_tokens=LEAST, keep_mask=True)
EOS = tokenizer().eos_token_id


@pytest.mark.parametrize("decoder", [None, SlotDecoder])
def test_no_answer_ends_before_and_all_are_drawn_from_what_is_left(decoder, monkeypatch):
    if decoder is not None:
        monkeypatch.setattr(native, "make_decoder", decoder)
    made = model()
    generator = NativeGenerator(made, tokenizer(), frozenset({EOS}), 0)
    rollouts = generator.generate(prompts(8), SAMPLING, 16)
    assert all(EOS not in r.response_ids[:LEAST] for r in rollouts)
    assert any(r.response_ids[LEAST] == EOS for r in rollouts), "the first place where it can end"
    for r in rollouts[:4]:
        for t, (token, logprob) in enumerate(zip(r.response_ids, r.logprobs, strict=True)):
            logits = next_logits(made, [*r.prompt.ids, *r.response_ids[:t]]).detach() / 0.8
            if t < LEAST:
                logits[EOS] = -torch.inf
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_first_ratio_is_1(top_k):
    made = filtered_learner(dataclasses.replace(SAMPLING, top_k=top_k), "none", target_kl=1e9)
    batch = made.score(sampled(made, 12), ALGORITHMS["grpo"])
    assert made.sampler_agrees is True and batch.entropy.isfinite().all()
    update = made.update(ALGORITHMS["grpo"].experience(batch), ALGORITHMS["grpo"])
    assert update.first_ratio_error < 1e-5


def test_without_the_mask_the_learner_has_another_distribution():
    made = filtered_learner(dataclasses.replace(SAMPLING, keep_mask=False), "none")
    made.score(sampled(made, 12), ALGORITHMS["grpo"])
    assert made.sampler_agrees is False


def test_the_probabilities_of_all_answers_add_up_to_1():
    """Answers of at most two tokens, of which the first is not the end."""
    sampling = Sampling(max_new_tokens=2, min_new_tokens=1, keep_mask=True)
    made = filtered_learner(sampling, "none")
    made.scorer = dataclasses.replace(made.scorer, temperature=1.0)
    size, prompt = len(tokenizer()), prompts(1)[0]
    whole = pack_ids(range(size))
    others = [i for i in range(size) if i != EOS]
    answers = [(one, two) for one in others for two in range(size)]
    rollouts = [
        dataclasses.replace(rollout(prompt, answer, 0.0, number=i), kept=(pack_ids(others), whole))
        for i, answer in enumerate(answers)
    ]
    batch = made.score(rollouts, ALGORITHMS["grpo"])
    assert float(batch.old_logprobs.sum(1).exp().sum()) == pytest.approx(1, abs=1e-4)
    sampler = NativeGenerator(made.models.actor, tokenizer(), frozenset({EOS}), 0)
    drawn = sampler.generate(prompts(1), sampling, 50)
    known = dict(zip(answers, batch.old_logprobs.sum(1).tolist(), strict=True))
    for r in drawn:
        assert sum(r.logprobs) == pytest.approx(known[r.response_ids], abs=1e-4)
        assert r.kept == (pack_ids(others), whole)
