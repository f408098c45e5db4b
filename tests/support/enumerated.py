"""A policy that can be enumerated: six tokens, at most three in a response. Sampler, learner, critic and reference are the real
ones, on models of some hundred weights; every response to every prompt is scored once, so that expectations are sums."""

import dataclasses
import itertools
from functools import cache

import numpy as np
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.kl import KLInReward
from quartet.algorithms.presets import ALGORITHMS
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
