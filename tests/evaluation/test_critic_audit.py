"""The audit of a critic on a policy that can be enumerated: expected returns, their variances and the expectation of GAE are
sums there, and the audit must find them within its intervals."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.kl import KLInReward
from quartet.algorithms.rewards import LastToken, RunningScale
from quartet.evaluation import critic_samples
from quartet.evaluation.critic_numbers import audit_numbers, ratio, t_quantile
from quartet.evaluation.critic_samples import (
    LAMBDAS,
    Audited,
    AuditSizes,
    Samples,
    TokenRewards,
    sample,
)
from quartet.generation.native import NativeGenerator
from tests.support.audits import made_states
from tests.support.enumerated import (
    ALGORITHM,
    BOOTSTRAPPED,
    EOS,
    LONGEST,
    PROMPTS,
    SAMPLING,
    VOCABULARY,
    Enumerated,
    everything,
    reward,
    tokenizer,
    toy_learner,
)

SIZES = AuditSizes(prefixes=3, continuations=64, seed=3)


def audited(learner, algorithm, values=None, max_rows=None):
    def score(rollouts):
        old = [dataclasses.replace(r, policy_version=-1) for r in rollouts]
        batch = learner.score(old, algorithm)
        return batch if values is None else Enumerated.with_values(batch, values)

    generator = NativeGenerator(
        learner.models.actor, tokenizer(), frozenset({EOS}), SIZES.seed, max_rows
    )
    return Audited(generator, SAMPLING, score, reward, algorithm)


def silent(words):
    pass


@pytest.fixture(scope="module")
def learner():
    return toy_learner()


@pytest.fixture(scope="module")
def enumerated(learner):
    return Enumerated(learner, ALGORITHM)


@pytest.fixture(scope="module")
def truth(enumerated):
    """V* of every state."""
    open_ones = [i for i in range(VOCABULARY) if i != EOS]
    prefixes = [p for n in range(LONGEST) for p in itertools.product(open_ones, repeat=n)]
    return {
        (prompt.ids, p): enumerated.moments(prompt.ids, p)[0]
        for prompt in PROMPTS
        for p in prefixes
    }


def audit(learner, values=None, algorithm=ALGORITHM):
    samples = sample(audited(learner, algorithm, values), PROMPTS * 3, SIZES, silent)
    return samples, audit_numbers(samples)


def prompt_of(state):
    return PROMPTS[state.prompt % len(PROMPTS)].ids


def inside(numbers, value, slack=1.6):
    """Whether a value is in an interval that is `slack` times as wide (99.8% instead of 95%)."""
    half = slack * (numbers["high"] - numbers["low"]) / 2
    return abs(value - (numbers["high"] + numbers["low"]) / 2) <= half + 1e-9


def test_the_probabilities_of_all_responses_add_up_to_1(enumerated):
    for prompt in PROMPTS:
        assert enumerated.after(prompt.ids, ())[2] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [ALGORITHM, pytest.param(BOOTSTRAPPED, marks=pytest.mark.slow)],
    ids=["plain", "bootstrapped"],
)
def test_monte_carlo_returns_have_the_enumerated_mean_and_variance(learner, algorithm):
    exact = Enumerated(learner, algorithm)
    samples, _ = audit(learner, algorithm=algorithm)
    differences, ratios = [], []
    for state in samples.states:
        expected, variance = exact.moments(prompt_of(state), state.tokens)
        differences.append((state.returns.mean() - expected, np.sqrt(variance / 64)))
        ratios.append((state.returns.var(ddof=1), variance))
        for action in state.actions:
            told, spread = exact.moments(
                prompt_of(state), (*state.tokens, action.token), len(state.tokens)
            )
            error = np.sqrt(spread / len(action.returns))
            assert abs(action.returns.mean() - told) < 5 * error + 0.05
    off, errors = np.array(differences).T
    assert len(off) > 55
    # Where nearly all returns are alike, one rare response is many standard errors.
    assert (np.abs(off) < 4 * errors + 0.05).all()
    assert np.sum(off**2) == pytest.approx(np.sum(errors**2), rel=0.4)
    found, exactly = np.array(ratios).sum(axis=0)
    assert found == pytest.approx(exactly, rel=0.1)


@pytest.mark.slow
def test_the_errors_of_an_untrained_critic_are_those_by_enumeration(learner, enumerated, truth):
    samples, numbers = audit(learner)
    errors = np.array([s.value - truth[prompt_of(s), s.tokens] for s in samples.states])
    at = np.array([s.position for s in samples.states])
    assert inside(numbers["level"], errors.mean())
    assert inside(numbers["rmse"], np.sqrt(np.mean(errors**2)))
    for row in numbers["positions"]:
        own = errors[(at >= row["first"]) & (at <= row["last"])]
        assert inside(row["bias"], own.mean())
    exact = np.array([truth[prompt_of(s), s.tokens] for s in samples.states])
    within = np.mean([enumerated.moments(prompt_of(s), s.tokens)[1] for s in samples.states])
    explained = 1 - (np.var(errors) + within) / (np.var(exact) + within)
    assert numbers["variance"]["explained"] == pytest.approx(explained, abs=0.1)
    possible = np.var(exact) / (np.var(exact) + within)
    assert numbers["variance"]["possible"] == pytest.approx(possible, abs=0.05)


@pytest.mark.slow
def test_bias_and_variance_of_advantages_are_those_by_enumeration(learner, enumerated, truth):
    samples, numbers = audit(learner)
    units = [(s, a) for s in samples.states for a in s.actions if a.is_sampled]
    assert numbers["advantages"]["units"] == len(units) > 55
    for row, lam in zip(numbers["advantages"]["by_lam"], LAMBDAS, strict=True):
        biases, spreads, of_returns = [], [], []
        for state, action in units:
            place = prompt_of(state), state.tokens
            q, _ = enumerated.moments(place[0], (*place[1], action.token), len(place[1]))
            expected, variance = enumerated.expected_gae(*place, action.token, lam)
            biases.append(expected - (q - truth[place]))
            spreads.append(variance)
            of_returns.append(expected + state.value - q)
        assert inside(row["mean_bias"], np.mean(biases))
        assert inside(row["bias"], np.sqrt(np.mean(np.square(biases))))
        without = row["bias_of_returns"]["value"]
        assert without == pytest.approx(np.sqrt(np.mean(np.square(of_returns))), rel=0.1, abs=1e-3)
        assert row["deviation"] == pytest.approx(np.sqrt(np.mean(spreads)), rel=0.12, abs=1e-6)
        total = np.sqrt(np.mean(np.square(biases)) + np.mean(spreads))
        assert inside(row["error"], total)
    assert numbers["advantages"]["by_lam"][-1]["bias_of_returns"]["value"] == pytest.approx(
        0, abs=1e-6
    )
    assert numbers["advantages"]["by_lam"][0]["bias_of_returns"]["value"] > 0.1


def planted(truth, error):
    return {place: v + error(place) for place, v in truth.items()}


@pytest.mark.slow
def test_a_perfect_critic_is_found_perfect(learner, truth):
    _, numbers = audit(learner, truth)
    assert inside(numbers["level"], 0.0) and numbers["rmse"]["low"] == 0.0
    assert numbers["rmse"]["value"] < 0.1 * np.sqrt(numbers["variance"]["of_single_returns"])
    assert inside(numbers["calibration"]["slope"], 1.0)
    assert inside(numbers["calibration"]["offset"], 0.0)
    assert numbers["follows"]["value"] == pytest.approx(1.0, abs=0.1)
    assert numbers["variance"]["explained"] == pytest.approx(
        numbers["variance"]["possible"], abs=0.02
    )
    assert numbers["ranking"]["clear"]["value"] > 0.95
    rows = numbers["advantages"]["by_lam"]
    assert all(inside(row["mean_bias"], 0.0) for row in rows)
    assert rows[0]["is_best"] and not rows[-1]["is_best"]
    assert rows[0]["correlation"] > 0.97 > rows[-1]["correlation"]


@pytest.mark.slow
def test_a_constant_offset_is_the_level_and_nothing_else(learner, truth):
    _, numbers = audit(learner, planted(truth, lambda place: 0.7))
    assert inside(numbers["level"], 0.7) and numbers["level"]["low"] > 0.5
    assert numbers["parts"]["level"] > 0.9 * numbers["parts"]["total"]
    assert inside(numbers["calibration"]["slope"], 1.0)
    assert numbers["follows"]["value"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_noise_is_what_is_left_after_level_and_position(learner, truth):
    rng = np.random.default_rng(5)
    noise = {place: 0.8 * rng.standard_normal() for place in truth}
    _, numbers = audit(learner, planted(truth, noise.get))
    assert numbers["parts"]["rest"] > 0.6 * numbers["parts"]["total"]
    assert 0.5 < numbers["rmse"]["value"] < 1.1
    assert numbers["calibration"]["slope"]["high"] < 1.0
    assert numbers["follows"]["value"] > 0.6


@pytest.mark.slow
def test_a_critic_that_does_not_see_the_response_follows_nothing(learner, truth):
    blind = {(prompt, prefix): truth[prompt, ()] for prompt, prefix in truth}
    _, numbers = audit(learner, blind)
    assert numbers["follows"]["value"] == pytest.approx(0.0, abs=1e-9)
    first = numbers["positions"][0]
    assert inside(first["bias"], 0.0) and first["rmse"]["low"] == 0.0
    assert numbers["positions"][1]["rmse"]["value"] > 0.3


@pytest.mark.slow
def test_an_error_at_the_first_token_alone_is_one_of_position(learner, truth):
    _, numbers = audit(learner, planted(truth, lambda place: 1.0 if place[1] == () else 0.0))
    assert inside(numbers["positions"][0]["bias"], 1.0)
    assert inside(numbers["positions"][1]["bias"], 0.0)
    assert numbers["parts"]["position"] > 0.4 * numbers["parts"]["total"]
    assert numbers["parts"]["rest"] < 0.1 * numbers["parts"]["total"]


@pytest.mark.slow
def test_results_depend_on_the_seed_and_on_no_size_of_a_batch(learner, monkeypatch):
    few = PROMPTS[:3]
    sizes = dataclasses.replace(SIZES, continuations=8)
    at_once = audit_numbers(sample(audited(learner, ALGORITHM), few, sizes, silent))
    again = audit_numbers(sample(audited(learner, ALGORITHM), few, sizes, silent))
    assert again == at_once
    monkeypatch.setattr(critic_samples, "ROWS", 7)
    small = audited(toy_learner(tokens=16), ALGORITHM, max_rows=3)
    pieces = audit_numbers(sample(small, few, sizes, silent))
    assert pieces["tokens"] == at_once["tokens"]
    assert pieces["level"]["value"] == pytest.approx(at_once["level"]["value"], abs=1e-5)
    assert pieces["rmse"]["value"] == pytest.approx(at_once["rmse"]["value"], abs=1e-5)
    other = audited(learner, ALGORITHM)
    other.generator.rng.manual_seed(99)
    assert audit_numbers(sample(other, few, sizes, silent))["level"] != at_once["level"]


def test_whitened_rewards_have_the_scale_of_the_answers_whatever_is_scored_with_them(learner):
    whitened = dataclasses.replace(ALGORITHM, rewards=LastToken(whiten=True))
    batch, _ = everything(learner, whitened)
    answers = learner.score(
        reward(audited(learner, whitened).generator.generate(PROMPTS, SAMPLING)), whitened
    )
    rewards_of = TokenRewards(whitened, answers)
    assert torch.allclose(rewards_of(answers), whitened.token_rewards(answers).double(), atol=1e-5)
    plain = ALGORITHM.token_rewards(batch).double()[batch.response_mask]
    scaled = rewards_of(batch)[batch.response_mask]
    line = rewards_of.scale * plain + rewards_of.shift
    assert torch.allclose(scaled, line, atol=1e-6) and rewards_of.scale != 1.0


def test_a_running_scale_stays_as_it_was_after_the_step(learner):
    scale = RunningScale(centre=True, count=5, mean=1.0, squares=16.0)
    scaled = dataclasses.replace(ALGORITHM, scores=(scale,), kl=KLInReward(coef=0.0))
    batch, _ = everything(learner, scaled)
    rewards = TokenRewards(scaled, batch)(batch)
    # μ = 1, σ = √(16 / 4) = 2
    assert torch.allclose(rewards.sum(dim=1), (batch.scores.double() - 1) / 2, atol=1e-5)


def test_sums_over_prompts_are_what_varies():
    # Two prompts with the means 1 and 3: 2 ± √((1 + 1) · 4 · 2 / 1) / 4 = 2 ± 1, as if n = 2.
    values, prompts = np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1])
    assert ratio(values, np.ones(4), prompts) == (2.0, pytest.approx(1.0), 2)


def test_the_quantiles_of_student_s_t_are_those_of_tables():
    assert t_quantile(3) == pytest.approx(3.182, abs=0.03)
    assert t_quantile(10) == pytest.approx(2.228, abs=0.001)
    assert t_quantile(10**6) == pytest.approx(1.95996, abs=1e-5)


@pytest.mark.slow
def test_intervals_hold_the_truth_in_19_of_20_audits():
    """The error of V is known state by state here; what varies is the prompts, and the noise of returns."""

    def noisy(position, true, rng, first):
        return true + 0.3 + 0.4 * rng.standard_normal()

    held = {"level": 0, "rmse": 0, "first": 0, "bias at λ = 0": 0}
    for seed in range(200):
        states = made_states(noisy, prompts=12, continuations=8, seed=seed)
        numbers = audit_numbers(Samples(states, 1.0, 0, 0, 0))
        row = numbers["advantages"]["by_lam"][0]
        for name, interval, truth in (
            ("level", numbers["level"], 0.3),
            ("rmse", numbers["rmse"], 0.5),
            ("first", numbers["positions"][0]["bias"], 0.3),
            ("bias at λ = 0", row["mean_bias"], 0.0),
        ):
            held[name] += interval["low"] <= truth <= interval["high"]
    assert all(180 <= count <= 199 for count in held.values()), held


def test_a_small_audit_has_the_scores_as_returns_and_counts_what_it_sampled(learner, monkeypatch):
    """Without a KL penalty and a discount the return from any token on is the response's score."""
    algorithm = dataclasses.replace(
        ALGORITHM, kl=KLInReward(coef=0.0), advantage=Gae(gamma=1.0, lam=0.95)
    )
    sampled, scores = [], {}

    def scored(rollouts):
        answers = reward(rollouts)
        scores.update({(r.prompt.ids, r.response_ids): r.score for r in answers})
        return answers

    made = dataclasses.replace(audited(learner, algorithm), reward=scored)
    generate = made.generator.generate

    def counted(*arguments):
        answers = generate(*arguments)
        sampled.extend(len(r.response_ids) for r in answers)
        return answers

    monkeypatch.setattr(made.generator, "generate", counted)
    sizes = AuditSizes(prefixes=2, continuations=4, seed=0)
    found = sample(made, PROMPTS[:3], sizes, silent)
    assert found.tokens == sum(sampled) and found.unscored == 0 and found.gamma == 1.0
    assert len(found.states) >= 3 and {s.prompt for s in found.states} == {0, 1, 2}
    for state in found.states:
        prompt = prompt_of(state)
        begun = {
            round(s, 4)
            for (p, ids), s in scores.items()
            if p == prompt and ids[: state.position] == state.tokens
        }
        assert {round(float(g), 4) for g in state.returns} <= begun
        assert [action.is_sampled for action in state.actions][:2] in ([True], [True, False])
        for action in state.actions:
            # A = G − V at λ = 1, and r + γ V′ − V at λ = 0
            assert np.allclose(action.advantages[:, -1], action.returns - state.value, atol=1e-5)
            assert np.allclose(action.advantages[0, 0], action.critic - state.value, atol=1e-5)
            if action.ends:
                whole = scores[prompt, (*state.tokens, action.token)]
                assert action.returns == pytest.approx([whole], abs=1e-5)
                assert action.critic == pytest.approx(whole, abs=1e-5)
