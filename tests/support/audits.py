"""Audits of critics with planted errors, from states whose expected returns are known: nothing is sampled by a model."""

import json
from pathlib import Path

import numpy as np

from quartet.evaluation.critic_numbers import audit_numbers
from quartet.evaluation.critic_samples import LAMBDAS, Action, Samples, State

POSITIONS = (0, 2, 5, 9)
LAST = 12


def made_states(value, prompts=40, continuations=32, seed=0):
    """A martingale: the expected return of a response is a walk with steps of deviation 0.5 at POSITIONS. `value(position,
    true, rng, first)` is the critic's, `first` the expected return before the first token."""
    rng = np.random.default_rng(seed)
    states = []
    for prompt in range(prompts):
        first = true = 1.0 + rng.standard_normal()
        for position in POSITIONS:
            true = true if position == 0 else true + 0.5 * rng.standard_normal()
            v = value(position, true, rng, first)
            state = State(
                prompt, tuple(range(position)), LAST, v, true + rng.standard_normal(continuations)
            )
            for token in range(3):
                after = true + 0.5 * rng.standard_normal()
                critic = value(position + 1, after, rng, first)
                returns = after + 0.9 * rng.standard_normal(continuations)
                mixed = np.array(LAMBDAS) * returns[:, None] + (1 - np.array(LAMBDAS)) * critic
                state.actions.append(Action(token, token == 0, False, critic, returns, mixed - v))
            states.append(state)
    return states


def made_audit(value=lambda position, true, rng, first: true, step=8, **sizes):
    """The content of a file of results."""
    states = made_states(value, **sizes)
    samples = Samples(states, 1.0, 4 * len(states) * 32, 0, 50_000)
    return {
        "format": 1,
        "stage": "ppo",
        "step": step,
        "seed": 0,
        "prefixes": len(POSITIONS),
        "continuations": 32,
        "candidates": 3,
        "compared": ["the score of the reward, given to tokens by last_token"],
        "gamma": 1.0,
        "lam": 0.95,
        **audit_numbers(samples),
    }


def write_audit(run: Path, audit) -> Path:
    folder = run / "critic_audits"
    folder.mkdir(exist_ok=True)
    path = folder / f"ppo-{audit['step']:06d}.json"
    path.write_text(json.dumps(audit))
    return path
