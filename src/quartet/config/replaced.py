"""What the command line replaces of a file: one value may make others of the file meaningless."""

import dataclasses
from typing import Any

from quartet.algorithms.presets import ALGORITHMS
from quartet.config.errors import Table, where
from quartet.stages.kinds import KINDS

COMMAND_LINE = "command line"
"""The origin of a value that a `key=value` word gives."""


def rl_stage_of(recipe: Any) -> str | None:
    """Return the RL stage of a recipe as it is written; None if it has none."""
    stages = [recipe] if isinstance(recipe, str) else recipe if isinstance(recipe, list) else []
    return next((stage for stage in stages if isinstance(stage, str) and stage in ALGORITHMS), None)


def replace_created_policy(table: Table, origins: dict[str, str]) -> None:
    """Drop the model that a file creates, and its tokenizer, where the command line names one."""
    if origins.get("policy.model") != COMMAND_LINE or "create" not in table["policy"]:
        return
    for name in ("create", "tokenizer"):
        keys = [key for key in origins if f"{key}.".startswith(f"policy.{name}.")]
        if all(origins[key] != COMMAND_LINE for key in keys):
            table["policy"].pop(name, None)
            for key in keys:
                del origins[key]


def replace_preset(table: Table, origins: dict[str, str], old: str | None) -> tuple[str, ...]:
    """Put the preset that the command line names in place of `old`, that of the file's recipe.

    The file's settings of parts that have another type in the new preset are dropped; the result
    has a sentence about each. Parts whose type is written, in the file or on the command line, are
    kept, and so are parts of the same type.
    """
    algorithm = table.get("algorithm")
    if old is None or not isinstance(algorithm, dict):
        return ()
    new, stages = rl_stage_of(table.get("recipe")), table["recipe"]
    if origins.get("recipe") == COMMAND_LINE:
        if origins.get("algorithm.preset", COMMAND_LINE) != COMMAND_LINE:
            del algorithm["preset"], origins["algorithm.preset"]
    elif origins.get("algorithm.preset") == COMMAND_LINE:
        new = rl_stage_of(algorithm["preset"])
        if new is not None:
            stages = [stages] if isinstance(stages, str) else stages
            table["recipe"] = [new if stage == old else stage for stage in stages]
            origins["recipe"] = COMMAND_LINE
    return () if new in {None, old} else tuple(_drop_parts(algorithm, origins, old, str(new)))


def replace_trained_reward(table: Table, origins: dict[str, str]) -> tuple[str, ...]:
    """Make the reward model that a file's run trains an ensemble, where the command line asks for
    several (`reward_model.members`) and does not name the reward's type. The result has a sentence
    about each such reward."""
    settings, rewards = table.get("reward_model"), table.get("reward")
    if origins.get("reward_model.members") != COMMAND_LINE or not isinstance(rewards, list):
        return ()
    members = settings.get("members") if isinstance(settings, dict) else None
    if not isinstance(members, int) or members < 2:
        return ()
    notes = []
    for number, reward in enumerate(rewards):
        key = f"reward.{number}.type"
        is_trained = isinstance(reward, dict) and reward.get("type") == "model"
        if not is_trained or "model" in reward or origins.get(key) == COMMAND_LINE:
            continue
        reward["type"] = "ensemble"
        notes.append(
            f'{where(key, origins)}: {key} is "ensemble" here, the mean of the {members} reward '
            "models that the run trains (reward_model.members)."
        )
        origins[key] = COMMAND_LINE
    return tuple(notes)


def _drop_parts(algorithm: Table, origins: dict[str, str], old: str, new: str) -> list[str]:
    """Drop the file's settings of parts whose type changes, and return a sentence for each."""
    before, after = (_types(dataclasses.asdict(ALGORITHMS[name])) for name in (old, new))
    notes = []
    for name, value in list(algorithm.items()):
        key = f"algorithm.{name}"
        keys = [k for k in origins if k == key or k.startswith(f"{key}.")]
        if (
            not isinstance(value, dict)
            or "type" in value
            or before.get(name) == after.get(name)
            or any(origins[k] == COMMAND_LINE for k in keys)
        ):
            continue
        notes.append(
            f"{where(key, origins)}: {key} is left out: it is for {before.get(name)} of {old}, "
            f"and {new} has {after.get(name)}."
        )
        del algorithm[name]
        for k in keys:
            del origins[k]
    return notes


def _types(preset: Table) -> dict[str, str]:
    """Return the type of each part of a preset, in quotes; of a list, those of its members."""
    return {
        name: ", ".join(
            f'"{part["type"]}"' for part in (value if isinstance(value, tuple) else [value])
        )
        or "none"
        for name, value in preset.items()
        if isinstance(value, dict | tuple)
    }


def replace_length(table: Table, origins: dict[str, str]) -> None:
    """Drop a file's number of steps where the command line gives a stage's length in epochs, and
    the reverse."""
    for kind in KINDS:
        if kind.optim is None or kind.steps != f"{kind.optim}.steps":
            continue  # optim.epochs is no length of the RL stage
        steps, epochs = kind.steps, f"{kind.optim}.epochs"
        for given, other in ((steps, epochs), (epochs, steps)):
            is_given = origins.get(given) == COMMAND_LINE
            if is_given and other in origins and origins[other] != COMMAND_LINE:
                del table[kind.optim][other.rpartition(".")[2]], origins[other]
