"""What a run will take, worked out before anything heavy is loaded."""

import os
from dataclasses import dataclass

from quartet.config.tables import Config, SharedCritic, TrainTokenizer
from quartet.planning.memory import FLOAT, adapter_parameters, phases, policy_parameters
from quartet.worlds import WORLDS

FLOPS_PER_CPU = 22e9
"""What models of a million parameters reach per CPU core, generation included, measured on 2.5 GHz
server cores."""


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and seconds. What the config does not tell (the size of a model on a hub) is
    None."""

    models: dict[str, int | None]
    """Parameters by role; only the models that the run needs."""
    row_tokens: tuple[float, float]
    """Expected tokens of a prompt and of a response."""
    optimizer_steps: dict[str, int]
    tokens: dict[str, float]
    """Tokens that each stage trains on, epochs counted; for RL also those it generates."""
    memory: dict[str, float] | None
    """Expected resident bytes in each phase."""
    disk: float | None
    seconds: float | None

    @property
    def peak(self) -> float | None:
        return max(self.memory.values()) if self.memory else None


def plan(config: Config) -> Plan:
    """The models, tokens, memory, disk and time of a run on this machine's CPUs."""
    policy = policy_parameters(config, vocabulary(config))
    models = _models(config, policy)
    row = row_tokens(config)
    steps, tokens = _work(config, row)
    return Plan(
        models=models,
        row_tokens=row,
        optimizer_steps=steps,
        tokens=tokens,
        memory=phases(config, models, policy, sum(row)) if policy else None,
        disk=_disk(config, models) if policy else None,
        seconds=_seconds(config, policy, tokens) if policy else None,
    )


def _models(config: Config, policy: int | None) -> dict[str, int | None]:
    algorithm = config.algorithm
    models = {"policy": policy}
    if (adapter := adapter_parameters(config)) is not None:
        return models | _adapters(config, adapter, policy)
    if algorithm and algorithm.needs_critic:
        models[
            "critic (head on the policy's trunk)"
            if isinstance(config.critic, SharedCritic)
            else "critic"
        ] = policy
    if config.reward_model_source or "reward_model" in config.recipe:
        models["reward model"] = policy
    if (algorithm and algorithm.needs_reference) or (
        config.preference_stage and config.preference.loss.needs_reference
    ):
        models["reference"] = policy
    return models


def _adapters(config: Config, adapter: int, policy: int | None) -> dict[str, int | None]:
    """What stands on the policy's trunk, which is the reference, and what has a trunk of its
    own."""
    roles: dict[str, int | None] = {"adapter": adapter}
    if (
        config.algorithm
        and config.algorithm.needs_critic
        and not isinstance(config.critic, SharedCritic)
    ):
        roles["critic (adapter)"] = adapter
    if "reward_model" in config.recipe:
        roles["reward model (adapter)"] = adapter
    elif config.reward_model_source:
        roles["reward model"] = policy
    return roles


def vocabulary(config: Config) -> int | None:
    """How many tokens the policy knows, where it can be known before it is loaded."""
    if isinstance(config.policy.tokenizer, TrainTokenizer):
        return config.policy.tokenizer.vocab_size
    if config.policy.create is not None and config.data.world is not None:
        return WORLDS[config.data.world](config.seed).vocabulary
    return None


def row_tokens(config: Config) -> tuple[float, float]:
    """A world knows; of files it is assumed that prompts and responses fill a third of what they
    may."""
    if config.data.world is not None:
        prompt, response = WORLDS[config.data.world](config.seed).typical_tokens
        return float(prompt), float(response)
    return config.data.max_prompt_tokens / 3, config.rollout.max_new_tokens / 3


def _answers(config: Config) -> int:
    return config.run.steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def _work(config: Config, row: tuple[float, float]) -> tuple[dict[str, int], dict[str, float]]:
    steps: dict[str, int] = {}
    tokens: dict[str, float] = {}
    for stage in config.recipe:
        if stage == "sft":
            steps[stage] = config.sft.steps
            tokens[stage] = config.sft.steps * config.sft.batch_size * sum(row)
        elif stage == "reward_model":
            steps[stage] = config.reward_model.steps
            tokens[stage] = (
                config.reward_model.steps * config.reward_model.batch_size * 2 * sum(row)
            )
        elif stage == config.preference_stage:
            steps[stage] = config.preference.steps
            tokens[stage] = config.preference.steps * config.preference.batch_size * 2 * sum(row)
        elif stage == config.rl_stage:
            steps[stage] = config.run.steps * config.optim.epochs * config.optim.minibatches
            tokens[f"{stage}, generated"] = _answers(config) * row[1]
            tokens[stage] = _answers(config) * sum(row) * config.optim.epochs
    return steps, tokens


def _disk(config: Config, models: dict[str, int | None]) -> float:
    """Model folders, about 25 bytes per token of rollouts, and three numbers per trained parameter
    (itself, Adam's two) for each checkpoint that is kept and for the one being written."""
    folders = ("sft" in config.recipe) + sum(
        role.partition(" (")[0] in {"policy", "critic", "reward model"} for role in models
    )
    written = (
        _answers(config) * sum(row_tokens(config)) / config.run.keep_every if config.rl_stage else 0
    )
    learners = (
        2
        if config.algorithm
        and config.algorithm.needs_critic
        and not isinstance(config.critic, SharedCritic)
        else 1
    )
    kept = (
        0
        if config.policy.adapter
        else config.run.keep_last + (config.run.keep_best is not None) + 1
    )
    return FLOAT * (models["policy"] or 0) * (folders + 3 * learners * kept) + 25 * written


def _seconds(config: Config, policy: int, tokens: dict[str, float]) -> float:
    """6 operations per parameter and trained token, 2 for each token that is generated or
    scored."""
    work = 0.0
    for name, count in tokens.items():
        if name == config.rl_stage:
            learners = 2 if config.algorithm and config.algorithm.needs_critic else 1
            scored = count / config.optim.epochs
            work += policy * (6 * learners * count + 2 * 4 * scored)
        else:
            work += policy * (2 if name.endswith("generated") else 6) * count
    cpus = os.cpu_count() or 1
    return 15 + work / (FLOPS_PER_CPU * cpus)


def in_words(plan: Plan) -> str:
    """One line: the models, the peak of memory, the time."""
    words = [
        f"{role} {count / 1e6:.1f} M" if count else f"{role} ?"
        for role, count in plan.models.items()
    ]
    if plan.peak:
        words.append(f"peak ≈ {plan.peak / 1e6:,.0f} MB")
    if plan.seconds:
        words.append(f"≈ {duration(plan.seconds)}")
    return " · ".join(words)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
