"""The compositions of published systems against their objectives, written out once more with plain numbers.

Each function of numbers below is a system's own recipe, constants typed from its paper or code, and shares nothing with
`src/quartet`: token rewards, GAE, whitening, the clipped losses and their means, one response after the other.
"""

import dataclasses
import math

import pytest
import torch

from quartet.algorithms.algorithm import Forward
from quartet.algorithms.presets import ALGORITHMS, FAMILIES
from tests.support.world import ragged_batch

LENGTHS = [4, 1, 9, 2, 6]
SCORES = [7.0, -0.5, 0.3, -12.0, 2.0]  # two of them beyond a clip of 5, one beyond 10


def batch():
    made = ragged_batch(LENGTHS, SCORES)
    return dataclasses.replace(made, ended=torch.tensor([True, True, False, True, True]))


def rows_of(table):
    """The response tokens of each row as plain numbers."""
    return [row[1 : 1 + n].tolist() for row, n in zip(table, LENGTHS, strict=True)]


def now():
    """What the models say after some updates."""
    rng = torch.Generator().manual_seed(5)
    made = batch()
    moved = 0.5 * torch.randn(made.old_logprobs.shape, generator=rng, dtype=torch.float64)
    return made.old_logprobs + moved, made.values + 0.6 * moved


def mean(values):
    return sum(values) / len(values)


def std(values, ddof):
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - ddof))


def flat(rows):
    return [x for row in rows for x in row]


def clip(x, low, high):
    return max(low, min(x, high))


def ppo(
    beta,
    scores,
    *,
    lam=0.95,
    value_weight,
    eps=0.2,
    value_clip=0.2,
    white=None,
    advantage_clip=math.inf,
    whiten_rewards=False,
    monte_carlo=False,
):
    """actor + value_weight · critic of a PPO for text. `white` is the whitening's ddof, None for no whitening."""
    made = batch()
    old, ref, values = rows_of(made.old_logprobs), rows_of(made.ref_logprobs), rows_of(made.values)
    new, new_values = (rows_of(table) for table in now())
    rewards = [
        [-beta * (o - r) for o, r in zip(*row, strict=True)] for row in zip(old, ref, strict=True)
    ]
    for row, score in zip(rewards, scores, strict=True):
        row[-1] += score
    if whiten_rewards:
        centre, spread = mean(flat(rewards)), std(flat(rewards), 0)
        rewards = [[(r - centre) / spread + centre for r in row] for row in rewards]
    advantages, returns = [], []
    for r, v in zip(rewards, values, strict=True):
        if monte_carlo:
            row = [sum(r[t:]) - v[t] for t in range(len(r))]
        else:
            row, last = [0.0] * len(r), 0.0
            for t in reversed(range(len(r))):
                following = v[t + 1] if t + 1 < len(v) else 0.0
                last = r[t] + following - v[t] + lam * last
                row[t] = last
        advantages.append(row)
        returns.append([a + x for a, x in zip(row, v, strict=True)])
    if white is not None:
        centre, spread = mean(flat(advantages)), std(flat(advantages), white)
        advantages = [
            [clip((a - centre) / spread, -advantage_clip, advantage_clip) for a in row]
            for row in advantages
        ]
    actor, critic = [], []
    for n, o, a, w, v, g in zip(
        *(flat(x) for x in (new, old, advantages, new_values, values, returns)), strict=True
    ):
        ratio = math.exp(n - o)
        actor.append(max(-a * ratio, -a * clip(ratio, 1 - eps, 1 + eps)))
        critic.append(0.5 * max((w - g) ** 2, (clip(w, v - value_clip, v + value_clip) - g) ** 2))
    return mean(actor) + value_weight * mean(critic)


def clipped(limit):
    return [clip(s, -limit, limit) for s in SCORES]


def unended(value):
    return [*SCORES[:2], value, *SCORES[3:]]


def running(limit):
    return [clip(s / std(SCORES, 1), -limit, limit) for s in SCORES]


SYSTEMS = {
    "lm_human_preferences": lambda: ppo(
        0.15, SCORES, value_weight=0.1, white=0, whiten_rewards=True
    ),
    "summarize_from_feedback": lambda: ppo(0.05, unended(-1.0), value_weight=0.1, white=0),
    "instructgpt": lambda: ppo(0.02, SCORES, value_weight=0.1, white=0),
    "deepspeed_chat": lambda: ppo(0.1, clipped(5), value_weight=1.0),
    "trl_ppo": lambda: ppo(0.05, SCORES, value_weight=0.1, white=1),
    "trlx": lambda: ppo(0.001, clipped(10), value_weight=1.0, white=1),
    "moss_ppo_max": lambda: ppo(0.02, running(10), value_weight=1.0, white=0, advantage_clip=0.5),
    "minimal": lambda: ppo(
        1.0, SCORES, value_weight=0.1, eps=math.inf, value_clip=math.inf, monte_carlo=True
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_preset_is_the_systems_objective(name):
    algorithm = ALGORITHMS[name]
    made = algorithm.experience(batch())
    logprobs, values = now()
    terms = algorithm.loss(
        made, Forward(logprobs, torch.zeros_like(logprobs), values), algorithm.denominators(made)
    )
    assert sum(terms.values()).item() == pytest.approx(SYSTEMS[name](), rel=1e-6)


def test_every_system_is_here():
    assert set(SYSTEMS) == set(FAMILIES["systems"])
