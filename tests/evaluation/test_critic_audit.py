"""The audit of a critic on a policy that can be enumerated: six tokens, at most three in a response.

Sampler, learner and reference are the real ones. Every response to every prompt is scored once, so that expected returns,
their variances and the expectation of GAE are sums; the audit must find them within its intervals.
"""

import dataclasses
import itertools
from functools import cache

import numpy as np
import pytest
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.kl import KLInReward
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.rewards import LastToken, RunningScale
from quartet.evaluation import critic_samples
from quartet.evaluation.critic_numbers import audit_numbers, ratio, t_quantile
from quartet.evaluation.critic_samples import (
    LAMBDAS,
    Audited,
    Samples,
    Sizes,
    TokenRewards,
    sample,
)
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import Separate, freeze
from quartet.models.heads import ScalarModel
from quartet.models.language_model import create
from quartet.models.shape import Shape
from quartet.training.learner import Learner
from quartet.training.optim import Optim
from quartet.worlds.tokenizers import word_tokenizer
from tests.support.audits import made_states

GAMMA, LONGEST, EOS, VOCABULARY = 0.9, 3, 1, 6
SAMPLING = Sampling(max_new_tokens=LONGEST, temperature=0.7)
PROMPTS = [Prompt(f"toy:{i}", (3 + i % 3, 3 + i // 3), "") for i in range(9)]
ALGORITHM = dataclasses.replace(
    ALGORITHMS["ppo"],
    advantage=Gae(gamma=GAMMA, lam=0.95),
    kl=KLInReward(coef=0.3),
    scores=(),
)
BOOTSTRAPPED = dataclasses.replace(
    ALGORITHM, advantage=Gae(gamma=GAMMA, lam=0.95, bootstrap_truncated=True)
)
SIZES = Sizes(prefixes=3, continuations=64, seed=3)


@cache
def tokenizer():
    return word_tokenizer(["a", "b"], ".")


def toy_model(seed):
    shape = Shape(type="llama", hidden_size=16, num_layers=1, num_heads=2, max_length=16)
    made = create(shape, tokenizer(), seed)
    with torch.no_grad():  # far from uniform, so that tokens and states differ
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return made


def toy_learner(tokens=2048):
    critic = ScalarModel.from_trunk(toy_model(1), 0, seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return Learner(
        Separate(toy_model(0), critic),
        freeze(toy_model(2)),
        Optim(),
        SAMPLING,
        4,
        micro_batch_tokens=tokens,
    )


def reward(rollouts):
    """A score of the ids alone, from a table."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7))
    scored = []
    for r in rollouts:
        ids = (*r.prompt.ids, *r.response_ids)
        score = sum(float(table[a, b]) for a, b in itertools.pairwise(ids))
        scored.append(dataclasses.replace(r, score=score))
    return scored


class Enumerated:
    """Every response to every prompt, with its probability, and what follows from that."""

    def __init__(self, learner, algorithm, values=None):
        self.batch, self.index = everything(learner, algorithm)
        if values is not None:
            self.batch = self.with_values(self.batch, values)
        self.rewards = algorithm.token_rewards(self.batch).double().numpy()
        self.logprobs = self.batch.old_logprobs.double().numpy()
        self.values = self.batch.values.double().numpy()
        self.final = np.where(
            self.batch.ended.numpy() | (not algorithm.needs_final_values),
            0.0,
            0.0 if self.batch.final_values is None else self.batch.final_values.numpy(),
        )

    @staticmethod
    def with_values(batch, values):
        """The batch as a critic says it who gives V(prompt, tokens so far)."""
        table = torch.zeros_like(batch.values)
        for row in range(len(batch.ids)):
            ids = batch.tokens[row, : batch.lengths[row]].tolist()
            for t in range(2, len(ids)):
                table[row, t] = values[tuple(ids[:2]), tuple(ids[2:t])]
        return dataclasses.replace(batch, values=table)

    def after(self, prompt, prefix):
        """The rows that begin so, and their probabilities given that they do."""
        rows = [
            row
            for (own, ids), row in self.index.items()
            if own == prompt and ids[: len(prefix)] == prefix
        ]
        p = np.exp(self.logprobs[rows, 2 + len(prefix) :].sum(axis=1))
        return rows, p / p.sum(), float(p.sum())

    def returns(self, rows, t, values=None, lam=1.0):
        """By a loop: Σ (γλ)^k δ_k from token t on, with `values`; of rewards alone without them."""
        result = []
        for row in rows:
            total, end = 0.0, int(self.batch.lengths[row])
            for k in range(2 + t, end):
                after = self.final[row] if k + 1 == end else None
                if values is None:
                    delta = self.rewards[row, k] + (GAMMA * after if k + 1 == end else 0.0)
                else:
                    following = after if k + 1 == end else values[row, k + 1]
                    delta = self.rewards[row, k] + GAMMA * following - values[row, k]
                total += (GAMMA * lam) ** (k - 2 - t) * delta
            result.append(total)
        return np.array(result)

    def moments(self, prompt, prefix, t=None):
        """The mean and the variance of the return from token t on, after this prefix."""
        rows, p, _ = self.after(prompt, prefix)
        returns = self.returns(rows, len(prefix) if t is None else t)
        expected = float(p @ returns)
        return expected, float(p @ (returns - expected) ** 2)

    def expected_gae(self, prompt, prefix, token, lam):
        rows, p, _ = self.after(prompt, (*prefix, token))
        estimates = self.returns(rows, len(prefix), self.values, lam)
        expected = float(p @ estimates)
        return expected, float(p @ (estimates - expected) ** 2)


def responses():
    open_ones = [i for i in range(VOCABULARY) if i != EOS]
    prefixes = [p for n in range(LONGEST) for p in itertools.product(open_ones, repeat=n)]
    return [(*p, EOS) for p in prefixes] + list(itertools.product(open_ones, repeat=LONGEST))


def everything(learner, algorithm):
    made, index = [], {}
    generator = NativeGenerator(learner.models.actor, tokenizer(), frozenset({EOS}), 0)
    for prompt in PROMPTS:
        for ids in responses():
            index[prompt.ids, ids] = len(made)
            answer = (list(ids), [0.0] * len(ids), [0.0] * len(ids), [])
            whole = generator.as_rollout(prompt, 0, 0, answer, "", SAMPLING)
            made.append(dataclasses.replace(whole, policy_version=-1))
    return learner.score(reward(made), algorithm), index


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
    """Whether a value is in an interval that is `slack` times as wide (99.8 % instead of 95 %)."""
    half = slack * (numbers["high"] - numbers["low"]) / 2
    return abs(value - (numbers["high"] + numbers["low"]) / 2) <= half + 1e-9


def test_the_probabilities_of_all_responses_add_up_to_1(enumerated):
    for prompt in PROMPTS:
        assert enumerated.after(prompt.ids, ())[2] == pytest.approx(1.0, abs=1e-5)


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
