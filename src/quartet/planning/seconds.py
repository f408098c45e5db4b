"""How long a run takes on this machine's CPUs: the operations of each stage over a rate."""

import os
from dataclasses import dataclass

from quartet.config.tables import Config, SharedCritic
from quartet.io.cores import computing_threads
from quartet.planning.memory import reward_model_parameters, sizes
from quartet.runs.rounds import round_of

START_SECONDS = 15.0
"""Seconds until the first stage begins."""
RATES = {0: 32e9, 256: 50e9}
"""Operations per second of one core by the least width of a model, with all that is no product.
Measured with models of 128, 512 and 640, on cores that reach 94e9 in a large product."""
FORWARD, TRAINED, UNDER_ADAPTER = 2, 6, 5
"""Operations of a token for each number of a matrix: forwards; with the gradients of both factors;
and where the matrix is frozen, which leaves 4 and the products of the adapter."""
HEAD_TRAINED, HEAD_FROZEN = 8, 4
"""The same of a head with its log-probs: a trained one computes logits twice."""


@dataclass(frozen=True)
class _Model:
    """What a token costs in a policy."""

    blocks: float
    """Numbers of the matrices in its blocks that a token meets."""
    head: float
    is_adapted: bool

    def trained(self, tokens: float, answers: float) -> float:
        """Return the operations of training on so many tokens, of which so many are answers, the
        tokens that are predicted."""
        blocks, head = (UNDER_ADAPTER, HEAD_FROZEN) if self.is_adapted else (TRAINED, HEAD_TRAINED)
        return blocks * self.blocks * tokens + head * self.head * answers

    def scored(self, tokens: float, answers: float = 0.0) -> float:
        """Return those of a forward pass."""
        return FORWARD * (self.blocks * tokens + self.head * answers)


def seconds(
    config: Config, policy: int, row: tuple[float, float], tokens: dict[str, float]
) -> float:
    """Return the expected seconds of a run. `policy` are the policy's parameters, `row` the tokens
    of a prompt and of a response, and `tokens` those of each stage (`Plan.tokens`)."""
    shape = sizes(config)
    idle = shape.idle_parameters if shape is not None else 0
    blocks = min(shape.matrix_parameters, policy) if shape is not None else policy - idle
    head = 0.0 if shape is None else min(shape.vocabulary * shape.hidden or policy - blocks, policy)
    model = _Model(float(blocks), float(head), config.policy.adapter is not None)
    own_scorer = config.reward_model.model is not None and "reward_model" in config.recipe
    scorer = _Model(float(reward_model_parameters(config, policy) or policy), 0.0, False)
    scorer = scorer if own_scorer else model
    answered = row[1] / sum(row)
    work = 0.0
    for name, count in tokens.items():
        stage, _ = round_of(name)
        if name.endswith("generated"):
            # The prompts of a group are computed once.
            group = 2 if config.has_online_pairs else config.rollout.samples_per_prompt
            prompts = count / row[1] * row[0] / group
            work += model.scored(count + prompts, count)
        elif stage == config.rl_stage:
            work += _rl(config, model, scorer, count, answered)
        elif stage in config.reward_models:
            work += scorer.trained(count, 0.0)
        elif stage == config.preference_stage:
            work += model.trained(count, answered * count)
            if config.preference.loss.needs_reference:
                work += model.scored(count, answered * count)
            if config.has_online_pairs:
                work += _rewarded(config, scorer, count)
        else:
            work += model.trained(count, answered * count)
    return START_SECONDS + work / (rate(shape.hidden if shape is not None else 0) * usable_cores())


def _rl(config: Config, model: _Model, scorer: _Model, count: float, answered: float) -> float:
    """Return the operations of updates on so many tokens, counted once per epoch, and of scoring
    before them."""
    algorithm = config.algorithm
    scored = count / config.optim.epochs
    work = model.trained(count, answered * count)
    if algorithm and algorithm.needs_critic and not isinstance(config.critic, SharedCritic):
        work += model.trained(count, 0.0)
        work += model.scored(scored)
    if algorithm and algorithm.needs_reference:
        work += model.scored(scored, answered * scored)
    return work + _rewarded(config, scorer, scored)


def _rewarded(config: Config, scorer: _Model, count: float) -> float:
    """Return the operations of the run's reward models on so many tokens."""
    if config.reward_model_source is None:
        return 0.0
    return max(len(config.reward_models), 1) * scorer.scored(count)


def usable_cores() -> int:
    """Return the cores that a run keeps busy; threads beyond them add nothing."""
    return min(computing_threads(), os.cpu_count() or 1)


def rate(hidden: int) -> float:
    """Return the operations per second of one core for models of a width."""
    return RATES[max(width for width in RATES if width <= hidden)]
