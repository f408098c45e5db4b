"""Rules about rewards and what they are read from."""

from quartet.config.rules.base import rule
from quartet.config.tables import Config
from quartet.generation.source import Native
from quartet.rewards.sources import (
    EnsembleSource,
    EnvironmentSource,
    GoldSource,
    JudgeSource,
    ModelSource,
    is_trained_here,
)

CHECKED_WORLDS = ("sums", "guess")
"""Worlds whose answers are right or wrong; they have no comparisons to learn from."""


def has_teacher(config: Config) -> bool:
    """Return whether an RL stage learns from a named model's log-probs (`reference.model`), for
    which it needs no reward."""
    algorithm = config.algorithm
    if config.rl_stage is None or algorithm is None or config.reference.model is None:
        return False
    return algorithm.needs_reference and getattr(algorithm.kl, "coef", 1.0) > 0


@rule
def teacher_is_named(config: Config) -> str | None:
    algorithm = config.algorithm
    if config.rl_stage is None or algorithm is None or not algorithm.needs_teacher:
        return None
    if config.reference.model is None:
        return (
            f"reference.model: {config.rl_stage} learns from a teacher, token by token. Name its "
            "folder or hub id; it must have the policy's tokenizer."
        )
    if has_teacher(config):
        return None
    return (
        f"algorithm.kl.coef = 0: {config.rl_stage} learns from the KL to its teacher, which this "
        "turns off. Typical: 1."
    )


@rule
def learning_needs_a_reward(config: Config) -> str | None:
    if config.rewarded_stage is None or config.reward or has_teacher(config):
        return None
    return (
        f'reward: {config.rewarded_stage} needs one. Add [[reward]] with type = "model" and model '
        '= a folder, or type = "exact".'
    )


@rule
def reward_model_has_an_origin(config: Config) -> str | None:
    unnamed = next((r for r in config.reward if is_trained_here(r)), None)
    if unnamed is None or "reward_model" in config.recipe or not config.reads("reward"):
        return None
    key, folders = (
        ("model", "model's folder")
        if isinstance(unnamed, ModelSource)
        else ("models", "models' folders")
    )
    return (
        f"reward.{key}: name the reward {folders}, or put reward_model before "
        f"{config.rewarded_stage or 'the others'} in the recipe."
    )


@rule
def reward_is_what_is_trained(config: Config) -> str | None:
    if "reward_model" not in config.recipe:
        return None
    members = config.reward_model.members
    for source in filter(is_trained_here, config.reward):
        if isinstance(source, ModelSource) and members > 1:
            return (
                f'reward.type = "model": the run trains {members} reward models. Use type = '
                '"ensemble", or name the folder of one in reward.model.'
            )
        if isinstance(source, EnsembleSource):
            if members == 1:
                return (
                    'reward.models: the run trains one reward model. Use type = "model", or set '
                    "reward_model.members to 2 or more."
                )
            if (problem := source.weights_problem(members)) is not None:
                return f"reward.{problem}."
    return None


@rule
def other_backbone_is_whole(config: Config) -> str | None:
    if config.reward_model.model is None or not config.launch.shard:
        return None
    return (
        "launch.shard: a reward model on a backbone of its own is held whole by each rank, and "
        "cannot be trained beside models in parts. Leave out reward_model.model, or train the "
        "reward model in a run without launch.shard and name its folder in reward.model."
    )


@rule
def rewards_have_different_names(config: Config) -> str | None:
    names = [r.called for r in config.reward]
    for name in names:
        if names.count(name) > 1:
            return (
                f"reward.name: two rewards are called {name}. Give each a name of its own, "
                'name = "…".'
            )
    return None


@rule
def some_reward_counts(config: Config) -> str | None:
    if config.rewarded_stage is None or any(r.weight for r in config.reward):
        return None
    if has_teacher(config):  # rewards of weight 0 are only watched
        return None
    return "reward.weight: is 0 for every reward, so there is nothing to learn from."


@rule
def pairwise_judge_needs_two_answers(config: Config) -> str | None:
    pairwise = any(
        isinstance(r, JudgeSource) and r.mode == "pairwise" and r.weight for r in config.reward
    )
    if not pairwise or config.rl_stage is None or config.rollout.samples_per_prompt >= 2:
        return None
    return (
        'reward.mode = "pairwise": compares answers to the same prompt, so '
        "rollout.samples_per_prompt must be ≥ 2."
    )


@rule
def gold_reward_needs_a_world(config: Config) -> str | None:
    if config.data.world is not None or not any(isinstance(r, GoldSource) for r in config.reward):
        return None
    return 'reward.type: "gold" is known in an embedded world only.'


@rule
def preference_stage_needs_comparisons(config: Config) -> str | None:
    world = config.data.world
    if world not in CHECKED_WORLDS or not config.preference_stage or config.rewarded_stage:
        return None
    return f"recipe: the world {world} has no comparisons to learn from; its answers are checked."


@rule
def environment_reward_needs_an_environment(config: Config) -> str | None:
    if config.has_episodes or not any(isinstance(r, EnvironmentSource) for r in config.reward):
        return None
    return (
        'reward.type: "environment" needs an environment. Add [environment] with function = '
        '"file.py:Name".'
    )


@rule
def greedy_baseline_needs_one_turn(config: Config) -> str | None:
    if config.algorithm is None or not config.algorithm.needs_greedy or not config.has_episodes:
        return None
    return (
        "environment: an algorithm that compares with a greedy answer is not written for several "
        "turns."
    )


@rule
def continuations_need_the_native_generator(config: Config) -> str | None:
    if config.algorithm is None or not config.algorithm.num_continuations:
        return None
    advantage = config.algorithm.advantage.type
    if config.has_episodes:
        return (
            f'environment: advantage.type = "{advantage}" goes on from the middle of responses, '
            "and an environment cannot be brought into that state. Use another advantage."
        )
    if isinstance(config.generator, Native):
        return None
    return (
        f'generator.type = "{config.generator.type}": advantage.type = "{advantage}" goes on from '
        "the middle of responses, which only the native generator does. Take the table out."
    )
