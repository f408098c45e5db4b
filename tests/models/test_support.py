"""The support of a policy: ids that the tokenizer does not have are never sampled, and have no part
in what the learner computes."""

import copy

import pytest
import torch

from quartet.generation import native
from quartet.generation.dialects import DIALECTS
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.slots import SlotDecoder
from quartet.models.actor_critic import ForwardRequest, Separate
from quartet.models.forward import forward_positions, logits_of, masked_logprobs, statistics
from quartet.models.language_model import add_embeddings
from quartet.models.padding import response_mask, right_pad
from quartet.models.support import ids_outside, limit_support, support_of
from tests.support.world import model, prompts, tokenizer

EXTRA = 11
SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)


def padded(kind="llama", limited=True):
    """A model with more rows than tokens, the others being far more probable than any token."""
    made, words = model(kind), tokenizer()
    made.resize_token_embeddings(len(words) + EXTRA, mean_resizing=False)
    with torch.no_grad():
        head = made.get_output_embeddings().weight
        head[len(words) :] = 3 * head[: len(words)].mean(0) + 0.5 * torch.randn(EXTRA, 32)
    return limit_support(made, words) if limited else made


def answers(made):
    generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
    return generator.generate(prompts(16), SAMPLING, 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "slots"])
def test_no_generator_samples_outside_and_the_learner_sees_the_same_distribution(kind, monkeypatch):
    if kind == "slots":
        monkeypatch.setattr(native, "make_decoder", SlotDecoder)
    made, size = padded(kind.replace("slots", "llama")), len(tokenizer())
    without = copy.deepcopy(made)
    del without.quartet_support
    assert any(token >= size for r in answers(without) for token in r.response_ids)
    found = answers(made)
    assert all(token < size for r in found for token in r.response_ids)
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in found])
    starts = lengths - torch.tensor([len(r.response_ids) for r in found])
    mask = response_mask(starts, lengths, tokens.shape[1])
    [forward] = Separate(made, None).forward_passes(
        ForwardRequest(tokens, mask, SAMPLING.temperature)
    )
    ratios = (forward.logprobs[mask] - torch.tensor([x for r in found for x in r.logprobs])).exp()
    torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-5, rtol=0)
    theirs = torch.tensor([x for r in found for x in r.entropies])
    torch.testing.assert_close(forward.entropy[mask], theirs, atol=1e-5, rtol=1e-5)


def test_log_probs_and_gradients_are_those_of_a_model_without_the_other_rows():
    made = padded().double()
    exact = copy.deepcopy(made)
    exact.resize_token_embeddings(len(tokenizer()))
    del exact.quartet_support
    tokens = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    results = []
    for each in (made, exact):
        outputs = forward_positions(each, tokens, mask)
        logprobs, entropy = statistics(each, outputs, tokens, mask, 0.7, entropy_gradient=True)
        (logprobs.sum() + entropy.sum()).backward()
        results.append((logprobs, entropy, logits_of(each, outputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    size = len(tokenizer())
    for name, parameter in exact.named_parameters():
        ours = made.get_parameter(name).grad
        if parameter.shape != ours.shape:
            assert not ours[size:].any()
        torch.testing.assert_close(ours[: len(parameter)], parameter.grad)


def test_copies_have_the_support_and_exact_models_have_none():
    made = padded()
    assert support_of(copy.deepcopy(made)) == len(tokenizer())
    assert list(ids_outside(made)) == list(range(len(tokenizer()), len(tokenizer()) + EXTRA))
    exact = limit_support(model(), tokenizer())
    assert support_of(exact) is None and not ids_outside(exact)


@pytest.mark.parametrize("kind", DIALECTS)
def test_servers_are_asked_not_to_sample_outside(kind):
    body = DIALECTS[kind].write([1], 4, SAMPLING, [1], 0, None, range(20, 23)).body
    assert body["sampling_params"]["logit_bias"] == {"20": -100.0, "21": -100.0, "22": -100.0}
    body = DIALECTS[kind].write([1], 4, SAMPLING, [1], 0, None).body
    assert "logit_bias" not in body["sampling_params"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_added_embeddings_are_the_mean_and_change_nothing_else(kind):
    made, words = model(kind), tokenizer()
    before = made.get_input_embeddings().weight.clone()
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = made(input_ids=tokens).logits.detach()
    words.add_tokens(["unheard", "unseen"])
    add_embeddings(made, words)
    after = made.get_input_embeddings().weight
    assert len(after) == len(before) + 2 and made.config.vocab_size == len(words)
    torch.testing.assert_close(after[-2:], before.mean(0).expand(2, -1))
    grown = made(input_ids=tokens).logits
    torch.testing.assert_close(grown[..., :-2], logits)
    torch.testing.assert_close(grown[..., -1], logits.mean(-1))
    assert masked_logprobs(made, tokens, torch.tensor([[False, True, True, True]])).isfinite().all()
