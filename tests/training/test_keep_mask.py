"""The filtered distribution is the policy: what top-k and top-p leave is kept, and trained on."""

import dataclasses
import json

import pytest
import torch

from quartet.algorithms.kl import exact_kl
from quartet.algorithms.presets import ALGORITHMS
from quartet.errors import QuartetError
from quartet.experience import KeptIds, pack_ids, rollout_from_row, rollout_to_row
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling, draw, scaled
from quartet.models.actor_critic import ForwardRequest
from quartet.models.forward import masked_logprobs
from quartet.runs.doctor import examine
from tests.support.tiny_run import make_run
from tests.support.world import model, prompts, rollout, tokenizer
from tests.training.test_learner import learner
from tests.training.test_trust_region import learner as trust_region_learner

SAMPLINGS = [
    Sampling(max_new_tokens=8, temperature=0.8, keep_mask=True, **filters)
    for filters in ({"top_k": 3}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9})
]
FILTERED = pytest.mark.parametrize("sampling", SAMPLINGS, ids=["top_k", "top_p", "both"])


def filtered_learner(sampling, kind="separate", **settings):
    made = learner(kind, **settings)
    made.sampling = sampling
    return made


def actor_outputs(made, batch, temperature, **more):
    request = ForwardRequest(batch.tokens, batch.response_mask, temperature, **more)
    return next(made.models.forward_passes(request))


def sampled(made, count=6):
    generator = NativeGenerator(
        made.models.actor, tokenizer(), frozenset({tokenizer().eos_token_id}), 0
    )
    generator.load_weights(made.weights())
    answers = generator.generate(prompts(count), made.sampling)
    return [dataclasses.replace(r, score=float(len(r.response_ids))) for r in answers]


def next_logits(policy, ids):
    return policy(input_ids=torch.tensor([ids])).logits[0, -1]


@FILTERED
@pytest.mark.parametrize("kind", ["separate", "shared", "none"])
def test_the_learner_gives_each_token_the_log_prob_that_it_was_drawn_with(sampling, kind):
    made = filtered_learner(sampling, kind, target_kl=1e9)
    algorithm = ALGORITHMS["grpo" if kind == "none" else "ppo"]
    batch = made.score(sampled(made), algorithm)
    assert made.sampler_agrees is True
    ratio = (batch.old_logprobs - batch.rollout_logprobs).exp()
    assert (ratio - 1).abs().max() < 1e-6
    update = made.update(algorithm.experience(batch), algorithm)
    assert update.first_ratio_error < 1e-6
    again = made.scorer.logprobs(made.models.actor, batch, 64, batch.kept)
    assert (again - update.logprobs).abs().max() > 0  # other weights by now
    assert again.isfinite().all() and (again[batch.response_mask] > -50).all()


def test_without_it_they_differ():
    made = filtered_learner(dataclasses.replace(SAMPLINGS[2], keep_mask=False))
    batch = made.score(sampled(made), ALGORITHMS["ppo"])
    assert batch.kept is None and made.sampler_agrees is False


@FILTERED
def test_what_is_kept_are_the_ids_that_the_filter_left(sampling):
    policy = model()
    generator = NativeGenerator(policy, tokenizer(), frozenset({tokenizer().eos_token_id}), 0)
    rollouts = generator.generate(prompts(4), sampling, 2)
    kept = KeptIds.of(rollouts, 32)
    for row, r in enumerate(rollouts):
        start = len(r.prompt.ids)
        found = kept.ids[row].split(kept.counts[row, start : start + len(r.response_ids)].tolist())
        for t, ids in enumerate(found):
            z = scaled(next_logits(policy, [*r.prompt.ids, *r.response_ids[:t]])[None], sampling)
            assert ids.tolist() == (z[0] > -torch.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_expected_gradient_is_that_of_the_filtered_policy(temperature):
    """All answers of two tokens that top-k 3 can give, each with its probability: their gradient
    through the learner is that of J = Σ_y π_S(y) R(y), the filtered policy's expected reward."""
    sampling = Sampling(max_new_tokens=2, temperature=temperature, top_k=3, keep_mask=True)
    made = filtered_learner(sampling, "none")
    made.scorer = dataclasses.replace(made.scorer, temperature=temperature)
    policy, prompt = made.models.actor, prompts(1)[0]

    def probabilities(ids):
        """The filtered distribution after some ids, from dense logits: (ids left, π_S)."""
        logits = next_logits(policy, ids) / temperature
        left = logits.topk(3).indices.sort().values
        return left, logits[left].softmax(-1)

    rollouts, rewards, chances = [], [], []
    first, p = probabilities(list(prompt.ids))
    for one, p_one in zip(first.tolist(), p, strict=True):
        second, q = probabilities([*prompt.ids, one])
        for other, p_other in zip(second.tolist(), q, strict=True):
            made_up = rollout(prompt, (one, other), 0.0, number=len(rollouts))
            kept = (pack_ids(first.tolist()), pack_ids(second.tolist()))
            rollouts.append(dataclasses.replace(made_up, kept=kept))
            rewards.append((7 * one + 3 * other) % 5 - 1.5)
            chances.append(p_one * p_other)
    rewards, chances = torch.tensor(rewards), torch.stack(chances)
    assert len(rollouts) == 9 and float(chances.detach().sum()) == pytest.approx(1)
    parameters = made.models.actor_parameters()
    expected = torch.autograd.grad((chances * rewards).sum(), parameters)

    batch = made.score(rollouts, ALGORITHMS["grpo"])
    torch.testing.assert_close(batch.old_logprobs.sum(1).exp(), chances.detach())
    weights = (chances.detach() * rewards)[:, None]

    def gradient(kept):
        now = actor_outputs(made, batch, temperature, kept=kept)
        ratio = torch.where(batch.response_mask, (now.logprobs - now.logprobs.detach()).exp(), 0)
        return torch.autograd.grad((weights * ratio).sum(), parameters)

    for ours, theirs in zip(gradient(batch.kept), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    unfiltered = torch.cat([g.flatten() for g in gradient(None)])
    exact = torch.cat([g.flatten() for g in expected])
    assert (unfiltered - exact).norm() > 0.1 * exact.norm()  # what is noted without keep_mask


def test_the_reference_keeps_its_whole_vocabulary():
    """So its KL is that of what is sampled: a token that is left alone has −log π_ref, and not 0."""
    alone = dataclasses.replace(SAMPLINGS[0], top_k=1)
    made = filtered_learner(alone, "none")
    batch = made.score(sampled(made), ALGORITHMS["grpo"])
    mask = batch.response_mask
    assert (batch.old_logprobs[mask] == 0).all() and (batch.entropy[mask] == 0).all()
    whole = masked_logprobs(made.reference, batch.tokens, mask, alone.temperature)
    torch.testing.assert_close(batch.ref_logprobs, whole)
    assert (batch.ref_logprobs[mask] < -0.5).all()


@FILTERED
def test_the_exact_kl_is_of_the_filtered_policy_to_the_whole_reference(sampling):
    made = filtered_learner(sampling, "none")
    batch = made.score(sampled(made), ALGORITHMS["grpo"])
    forward = actor_outputs(
        made, batch, sampling.temperature, reference=made.reference, kept=batch.kept
    )
    row = 1
    start, end = len(prompts(6)[row].ids), int(batch.lengths[row])
    for t in range(start, end):
        ids = batch.tokens[row, :t].tolist()
        z = scaled(next_logits(made.models.actor, ids)[None], sampling).log_softmax(-1)[0]
        ref = (next_logits(made.reference, ids) / sampling.temperature).log_softmax(-1)
        left = z > -torch.inf
        expected = exact_kl(z[left], ref[left])
        torch.testing.assert_close(forward.exact_kl[row, t], expected, atol=1e-5, rtol=1e-5)
        assert expected >= 0
    forward.exact_kl.sum().backward()
    assert all(p.grad.isfinite().all() for p in made.models.actor_parameters())


@pytest.mark.parametrize("size", [1536, 1543])
def test_a_wide_vocabulary_keeps_the_same_ids(size, monkeypatch):
    logits, noise = 3 * torch.randn(16, size), torch.rand(16)
    expected = draw(logits, SAMPLINGS[1], noise)
    monkeypatch.setattr("quartet.generation.sampling.WIDE", size)
    assert torch.equal(draw(logits, SAMPLINGS[1], noise).kept, expected.kept)
    assert expected.kept.sum() < expected.kept.numel()


def test_rollouts_keep_them_through_json():
    made = sampled(filtered_learner(SAMPLINGS[0]), 2)
    again = [rollout_from_row(json.loads(json.dumps(rollout_to_row(r)))) for r in made]
    assert [r.kept for r in again] == [r.kept for r in made]
    assert all(len(r.kept) == len(r.response_ids) for r in again)


def test_rollouts_that_do_not_say_what_was_left_are_refused():
    made = filtered_learner(SAMPLINGS[0])
    bare = [dataclasses.replace(r, kept=None) for r in sampled(made)]
    with pytest.raises(QuartetError, match="rollouts do not say which ids the filter left"):
        made.score(bare, ALGORITHMS["ppo"])
    wrong = [dataclasses.replace(r, kept=(pack_ids([0]),) * len(r.response_ids)) for r in bare]
    with pytest.raises(ValueError, match="a token is not among the ids that its filter left"):
        made.score(wrong, ALGORITHMS["ppo"])


def test_micro_batches_change_nothing():
    results = []
    for tokens in (2048, 24):
        made = filtered_learner(SAMPLINGS[2], tokens=tokens)
        algorithm = ALGORITHMS["ppo"]
        made.update(algorithm.experience(made.score(sampled(made), algorithm)), algorithm)
        results.append([p.detach().clone() for p in made.models.actor_parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


# --- whole runs

FILTERS = ("rollout.top_p=0.9", "rollout.top_k=5", "rollout.keep_mask=true", "run.steps=3")
RUNS = {
    "sums": ("sums", ()),
    "staleness": ("sums", ("rollout.staleness=1", "algorithm.correction.type=truncated")),
    "reviews": ("reviews", ("algorithm.kl.estimator=exact",)),
    "turns": ("guess", ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ratios_of_a_run_start_at_one(name, tmp_path):
    recipe, words = RUNS[name]
    run = make_run(tmp_path, recipe, *FILTERS, *words)
    [series] = [s for stage, s in run.series.items() if stage in {"grpo", "ppo"}]
    assert len(series.steps) == 3
    assert max(series.columns["ratio/first_error"]) < 1e-6
    assert all(abs(ratio - 1) < 1e-6 for ratio in series.columns["sampler_ratio"])
    assert min(series.columns["kl"]) > 0
    rules = {finding.rule for finding in examine(run)}
    assert not rules & {"sampler_disagrees", "ratio_is_not_one", "reference_differs"}


def test_a_natural_step_keeps_to_the_filtered_policy():
    """The KL of the step is that over the ids that were left, and the log-probs are of them."""
    made = trust_region_learner()
    made.sampling = dataclasses.replace(SAMPLINGS[2], temperature=1.0)
    algorithm = ALGORITHMS["trpo"]
    experience = algorithm.experience(made.score(sampled(made), algorithm))
    update = made.update(experience, algorithm)
    assert 0 < update.step_stats["trust_region/kl"] <= algorithm.update.max_kl
    assert update.step_stats["trust_region/improvement"] > 0
    now = made.scorer.logprobs(made.models.actor, experience, 2048, experience.kept)
    torch.testing.assert_close(update.logprobs, now, atol=1e-5, rtol=0)
