"""Quartet: RLHF for language models, from a laptop to a cluster.

Every public name is imported when it is first used: `import quartet` costs nothing and loads no torch. docs/api.md lists the
names with one line each.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet.algorithms.advantages import Advantage as Advantage
    from quartet.algorithms.advantages import Normalize as Normalize
    from quartet.algorithms.aggregation import Aggregation as Aggregation
    from quartet.algorithms.algorithm import Algorithm as Algorithm
    from quartet.algorithms.correction import Correction as Correction
    from quartet.algorithms.entropy import Entropy as Entropy
    from quartet.algorithms.groups import Groups as Groups
    from quartet.algorithms.kl import KL as KL
    from quartet.algorithms.policy_loss import PolicyLoss as PolicyLoss
    from quartet.algorithms.policy_loss import Surrogate as Surrogate
    from quartet.algorithms.preference import PREFERENCES as PREFERENCES
    from quartet.algorithms.preference import PreferenceLoss as PreferenceLoss
    from quartet.algorithms.preference import RewardModelLoss as RewardModelLoss
    from quartet.algorithms.presets import ALGORITHMS as ALGORITHMS
    from quartet.algorithms.rewards import Rewards as Rewards
    from quartet.algorithms.rewards import ScoreShape as ScoreShape
    from quartet.algorithms.value_loss import ValueLoss as ValueLoss
    from quartet.data.sampler import Sampler as Sampler
    from quartet.experience import Batch as Batch
    from quartet.experience import Experience as Experience
    from quartet.experience import Prompt as Prompt
    from quartet.experience import Rollout as Rollout
    from quartet.generation.native import NativeGenerator as NativeGenerator
    from quartet.generation.protocol import Generator as Generator
    from quartet.generation.protocol import Weights as Weights
    from quartet.generation.sampling import Sampling as Sampling
    from quartet.loops.collect import Collector as Collector
    from quartet.loops.rl import Step as Step
    from quartet.loops.rl import rl as rl
    from quartet.models.actor_critic import Separate as Separate
    from quartet.models.actor_critic import Shared as Shared
    from quartet.models.actor_critic import freeze as freeze
    from quartet.models.heads import ScalarModel as ScalarModel
    from quartet.models.heads import ValueHead as ValueHead
    from quartet.models.language_model import load_model as load_model
    from quartet.models.language_model import load_tokenizer as load_tokenizer
    from quartet.models.language_model import save as save
    from quartet.models.language_model import stop_ids as stop_ids
    from quartet.parts import Field as Field
    from quartet.rewards.functions import TextReward as TextReward
    from quartet.rewards.protocol import Reward as Reward
    from quartet.rewards.protocol import Weighted as Weighted
    from quartet.rewards.reward_model import ModelReward as ModelReward
    from quartet.runs.reader import Run as Run
    from quartet.training.learner import Learner as Learner
    from quartet.training.learner import Update as Update
    from quartet.training.optim import Optim as Optim

__version__ = "0.1.0"

_MODULES = {
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
    "data.sampler": "Sampler",
    "experience": "Batch Experience Prompt Rollout",
    "generation.native": "NativeGenerator",
    "generation.protocol": "Generator Weights",
    "generation.sampling": "Sampling",
    "loops.collect": "Collector",
    "loops.rl": "Step rl",
    "models.actor_critic": "Separate Shared freeze",
    "models.heads": "ScalarModel ValueHead",
    "models.language_model": "load_model load_tokenizer save stop_ids",
    "parts": "Field",
    "rewards.functions": "TextReward",
    "rewards.protocol": "Reward Weighted",
    "rewards.reward_model": "ModelReward",
    "runs.reader": "Run",
    "training.learner": "Learner Update",
    "training.optim": "Optim",
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
