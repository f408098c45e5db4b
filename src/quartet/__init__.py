"""Quartet: RLHF for language models, from a laptop to a cluster.

Every public name is imported when it is first used: `import quartet` costs nothing and loads no
torch. docs/api.md lists the names with one line each.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "api.critic": "CriticAudit critic_audit",
    "api.evaluate": "evaluate",
    "api.record": "record",
    "api.run": "RunInterrupted TrainingRun",
    "api.sweep": "sweep",
    "api.train": "train",
    "algorithms.advantages": "Advantage Normalize",
    "algorithms.aggregation": "Aggregation",
    "algorithms.algorithm": "Algorithm",
    "algorithms.correction": "Correction",
    "algorithms.entropy": "Entropy",
    "algorithms.groups": "Groups",
    "algorithms.kl": "KL",
    "algorithms.policy_loss": "PolicyLoss Surrogate",
    "algorithms.preference": "PREFERENCES PreferenceLoss RewardModelLoss",
    "algorithms.presets": "ALGORITHMS",
    "algorithms.rewards": "Rewards ScoreShape",
    "algorithms.value_loss": "ValueLoss",
    "data.prompt_sampling": "PromptSampling",
    "data.records": "Comparison Demonstration",
    "data.row_shape": "RowShape",
    "data.sampler": "Sampler",
    "errors": "QuartetError",
    "experience": "Batch Experience Prompt Rollout pack_ids",
    "generation.native": "NativeGenerator",
    "generation.protocol": "Generator Weights",
    "generation.sampling": "Sampling",
    "generation.source": "GeneratorContext GeneratorSource",
    "loops.collect": "Collector",
    "loops.custom": "StageContext",
    "loops.progress": "Progress",
    "loops.rl": "Step rl",
    "loops.source": "StageSource",
    "models.actor_critic": "Separate Shared freeze",
    "models.heads": "ScalarModel ValueHead",
    "models.language_model": "load_model load_tokenizer save stop_ids",
    "parts": "Field",
    "recording.metric": "Metric",
    "rewards.functions": "TextReward",
    "rewards.protocol": "Reward Weighted",
    "rewards.reward_model": "ModelReward",
    "rewards.source": "RewardContext RewardSource",
    "runs.reader": "Run",
    "training.learner": "Learner",
    "training.metrics": "rl_metrics",
    "training.optim": "Optim",
    "training.token_losses": "RowTokens",
    "training.update": "Update",
    "walkthrough": "explain",
}
_ORIGINS = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [*sorted(_ORIGINS)]  # noqa: PLE0604 (names as text, made from the table)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _ORIGINS:
        raise AttributeError(f"module 'quartet' has no attribute '{name}'")
    return getattr(importlib.import_module(f"quartet.{_ORIGINS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
