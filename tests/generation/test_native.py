import math

import pytest
import torch

from quartet.generation.decoders import make_decoder
from quartet.generation.native import NativeGenerator
from quartet.generation.protocol import Weights
from quartet.generation.sampling import WIDE_BLOCK, Sampling, draw, scaled
from quartet.models.forward import policy_logprobs
from quartet.models.language_model import stop_ids
from quartet.models.logprobs import token_entropy
from quartet.models.padding import left_pad, response_mask, right_pad
from quartet.training.batch import collate
from tests.support.world import SHAPES, model, prompts, tokenizer

KINDS = pytest.mark.parametrize("kind", sorted(SHAPES))


def generator(made, seed=0, pad=True):
    words = tokenizer(pad)
    return NativeGenerator(made, words, stop_ids(made, words), seed)


@KINDS
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad", [True, False])
def test_the_samplers_logprobs_are_the_learners(kind, batch, temperature, pad):
    """The generator pads on the left, keeps a cache and drops finished rows; the learner pads on the right and reads
    whole rows. To 1e-5 they must agree."""
    made = model(kind)
    rollouts = generator(made, pad=pad).generate(
        prompts(batch), Sampling(max_new_tokens=24, temperature=temperature)
    )
    rows = collate(
        [r.__class__(**{**vars(r), "score": 0.0}) for r in rollouts], torch.device("cpu")
    )
    learner = policy_logprobs(
        made, rows.tokens, rows.lengths, rows.response_mask, temperature, 4096
    )
    torch.testing.assert_close(rows.rollout_logprobs, learner, atol=1e-5, rtol=0)
    if batch > 1:
        assert len({len(r.response_ids) for r in rollouts}) > 3, (
            "the rows must end at different times to mean anything"
        )


@KINDS
def test_left_and_right_padding_give_the_same_logprobs(kind):
    made = model(kind)
    rows = [[5, 6, 7, 8, 9], [4, 11], [12, 5, 6]]
    tokens, mask = left_pad(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = made(
        input_ids=tokens, attention_mask=mask.long(), position_ids=positions
    ).logits.log_softmax(-1)
    tokens, lengths = right_pad(rows)
    right = policy_logprobs(
        made, tokens, lengths, response_mask(torch.ones(3, dtype=torch.long), lengths, 5), 1.0, 999
    )
    for i, row in enumerate(rows):
        start = 5 - len(row)
        by_left = left[i, start:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(right[i, 1 : len(row)], by_left, atol=1e-5, rtol=0)


def test_answers_end_at_the_stop_token_and_nothing_follows_it():
    rollouts = generator(model()).generate(prompts(64), Sampling(max_new_tokens=24))
    end = tokenizer().eos_token_id
    for rollout in rollouts:
        assert end not in rollout.response_ids[:-1]
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == end)
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 24
        assert len(rollout.logprobs) == len(rollout.response_ids)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}


class Spy:
    """A decoder that writes down how many rows and prompts it was asked about."""

    look_every = 1

    def __init__(self, inner):
        self.inner, self.steps, self.reads = inner, [], []

    def free_rows(self):
        return self.inner.free_rows()

    def prefill(self, prompts, copies):
        self.reads.append((len(prompts), copies))
        return self.inner.prefill(prompts, copies)

    def step(self, tokens):
        self.steps.append(len(tokens))
        return self.inner.step(tokens)

    def keep(self, going):
        return self.inner.keep(going)


@pytest.fixture
def spies(monkeypatch):
    made = []

    def spying(*args):
        made.append(Spy(make_decoder(*args)))
        return made[-1]

    monkeypatch.setattr("quartet.generation.native.make_decoder", spying)
    return made


@KINDS
def test_rows_that_finish_cost_nothing_more(kind, spies):
    rollouts = generator(model(kind)).generate(prompts(64), Sampling(max_new_tokens=24))
    going = [sum(len(r.response_ids) > t for r in rollouts) for t in range(1, 24)]
    assert spies[0].steps == [count for count in going if count > 0]


@KINDS
def test_samples_of_one_prompt_share_its_prefill_and_its_group(kind, spies):
    rollouts = generator(model(kind)).generate(
        prompts(3), Sampling(max_new_tokens=8), samples_per_prompt=4
    )
    assert spies[0].reads == [(3, 4)]
    assert [r.group for r in rollouts] == [0] * 4 + [1] * 4 + [2] * 4
    assert rollouts[5].id == "tiny:1/1" and rollouts[5].prompt.id == "tiny:1"
    assert len({r.response_ids for r in rollouts[:4]}) > 1


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("samples", [1, 3])
def test_prompts_that_wait_take_the_place_of_rows_that_have_finished(kind, samples, spies):
    """Seven rows at a time or all at once: the same answers, for a row's noise is its own."""
    made = model(kind)
    few, all_at_once = (
        NativeGenerator(made, tokenizer(), stop_ids(made, tokenizer()), 0, rows)
        for rows in (7, None)
    )
    asked = (prompts(20), Sampling(max_new_tokens=24), samples)
    narrow, wide = few.generate(*asked), all_at_once.generate(*asked)
    assert [r.response_ids for r in narrow] == [r.response_ids for r in wide] and [
        r.id for r in narrow
    ] == [r.id for r in wide]
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(
            torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=0
        )
    assert (
        max(spies[0].steps) <= 7 and len(spies[0].reads) > 1 and spies[1].reads == [(20, samples)]
    )
    if kind != "gpt2":  # the written-out family fills up while others are still being written
        assert spies[0].steps.count(7 // samples * samples) > 3


def test_the_same_seed_samples_the_same_answers_and_another_seed_others():
    made = model()

    def answers(seed):
        return [
            r.response_ids
            for r in generator(made, seed).generate(prompts(8), Sampling(max_new_tokens=12))
        ]

    assert answers(1) == answers(1) != answers(2)


def test_weights_come_with_their_version():
    made = generator(model())
    made.load_weights(Weights(7, {}))
    assert made.generate(prompts(1), Sampling(max_new_tokens=2))[0].policy_version == 7


def test_draws_follow_the_distribution_and_never_take_what_is_impossible():
    logprobs = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(20_000, 4)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = draw(logprobs, Sampling(), noise)
    shares = drawn.tokens.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.015, rtol=0)
    torch.testing.assert_close(
        drawn.logprobs.exp(), torch.tensor([0.5, 0.0, 0.3, 0.2])[drawn.tokens]
    )


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_the_ends_of_the_noise_are_possible_tokens(noise):
    logprobs = torch.tensor([[0.0, 0.6, 0.4, 0.0]]).log()
    assert draw(logprobs, Sampling(), torch.tensor([noise])).tokens.item() in {1, 2}
    filtered = draw(torch.zeros(1, 5), Sampling(top_k=2), torch.tensor([noise]))
    assert filtered.tokens.item() in {0, 1} and filtered.entropies.item() == pytest.approx(
        math.log(2)
    )


def test_filters_renormalise_what_is_left():
    # p = (0.5, 0.3, 0.2); top-k 2 leaves (0.625, 0.375); top-p 0.45 leaves the first alone
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert scaled(logits, Sampling(top_k=2)).softmax(-1).tolist()[0] == pytest.approx(
        [0.625, 0.375, 0.0]
    )
    assert scaled(logits, Sampling(top_p=0.45)).softmax(-1).tolist()[0] == pytest.approx(
        [1.0, 0.0, 0.0]
    )
    assert scaled(logits, Sampling()).softmax(-1).tolist()[0] == pytest.approx([0.5, 0.3, 0.2])
    for sampling in (Sampling(), Sampling(temperature=0.7)):
        assert scaled(logits.bfloat16(), sampling).dtype == torch.float32
    # top-p keeps the token that reaches its mass, and cuts what is left of top-k
    for both in (Sampling(top_p=0.6), Sampling(top_k=2, top_p=0.9), Sampling(top_k=3, top_p=0.79)):
        assert scaled(logits, both).softmax(-1).tolist()[0] == pytest.approx([0.625, 0.375, 0.0])
    assert scaled(logits, Sampling(top_k=1, top_p=0.9)).softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    # T = ½ comes first: (25, 9, 4) / 38, of which the first alone is more than 0.6
    cold = scaled(logits, Sampling(top_p=0.6, temperature=0.5))
    assert cold.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    cold = scaled(logits, Sampling(top_k=2, temperature=0.5)).softmax(-1)
    assert cold.tolist()[0] == pytest.approx([25 / 34, 9 / 34, 0.0])
    second = draw(logits, Sampling(top_k=2), torch.tensor([0.7]))
    assert second.tokens.item() == 1 and second.logprobs.exp().item() == pytest.approx(0.375)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_the_distribution_that_was_sampled(temperature):
    logits = 3 * torch.randn(6, 50)
    drawn = draw(logits, Sampling(temperature=temperature), torch.rand(6))
    torch.testing.assert_close(
        drawn.entropies, token_entropy(logits, temperature), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=5, keep_mask=True), Sampling(top_p=0.6)],
)
@pytest.mark.parametrize("size", [3 * WIDE_BLOCK, 3 * WIDE_BLOCK + 7])
def test_a_wide_vocabulary_is_drawn_from_in_blocks_with_the_same_answers(
    sampling, size, monkeypatch
):
    logits, noise = 3 * torch.randn(64, size), torch.rand(64)
    noise[:4] = torch.tensor([0.0, 1 - 2**-24, 0.5, 1e-7])
    expected = draw(logits, sampling, noise)
    monkeypatch.setattr("quartet.generation.sampling.WIDE", size)
    monkeypatch.setattr("quartet.generation.sampling.WIDE_LOGITS", 5 * size)
    found = draw(logits, sampling, noise)
    # a token at the edge of its interval may fall to either side
    assert (found.tokens == expected.tokens).sum() >= 62
    same = found.tokens == expected.tokens
    torch.testing.assert_close(found.logprobs[same], expected.logprobs[same], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropies, expected.entropies, atol=1e-4, rtol=1e-4)
    assert found.logprobs.isfinite().all()  # no token of probability 0
    assert (found.kept is None) == (expected.kept is None) == (not sampling.keep_mask)
    if sampling.keep_mask:
        assert torch.equal(found.kept, expected.kept) and (found.kept.sum(-1) == 5).all()
    nan = draw(torch.full((2, size), torch.nan), sampling, noise[:2])
    assert (nan.tokens < size).all() and nan.logprobs.isnan().all()
