"""`quartet.train`: a run, from Python."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.api.inputs import inputs_of, naming_rows
from quartet.config.toml import ConfigError, settings_of_table

if TYPE_CHECKING:
    from quartet.api.run import TrainingRun
else:
    TrainingRun = Any  # its module imports torch


def train(
    recipe: str | Sequence[str] | None = None,
    *,
    policy: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    prompts: Any = None,
    eval_data: Any = None,
    reward: Any = None,
    steps: int | None = None,
    seed: int | None = None,
    folder: str | Path | None = None,
    name: str | None = None,
    resume: str | os.PathLike[str] | bool | None = None,
    accept: Sequence[str] = (),
    **settings: Any,
) -> TrainingRun:
    """Return a run, checked and ready. It starts when it is iterated over, or by `finish()`.

    It is the run that a TOML file with these settings gives: the same stages, record, doctor,
    checkpoints and studio.

    Args:
        recipe: a stage such as "ppo", "sft" or "dpo", several in order, the name of a recipe such
            as "sums", or a TOML file.
        policy: a run (its last policy), a folder, a hub id, a model of transformers (with
            `tokenizer`), or a [policy] table. A model given as an object is copied: the run trains
            the copy.
        tokenizer: a folder or hub id; the tokenizer itself where the policy is an object.
        data: what the stages read: a file, a list of prompts (texts or lists of messages) or of
            dicts, a `datasets.Dataset`, or a [data] table such as {"world": "sums"}. `prompts` is
            another name for it.
        eval_data: the same, held out. Left out, a tenth of `data` is held out.
        reward: a function (docs/rewards.md says what it is given), a reward model (a folder, a hub
            id or the model itself), an object with `score(rollouts)`, a type such as "exact", a
            [[reward]] table, or a list of these, each alone or as (reward, weight). Functions and
            objects run in this process.
        steps: how many steps the last stage that learns has.
        seed: of everything random.
        folder: where run folders are made, "runs" by default.
        name: the name of the run folder, behind the date.
        resume: a run or its folder to go on with, or True for the latest. Rewards that were objects
            must be given again.
        accept: settings that may differ from those of the run that is resumed.
        **settings: any table or dotted key of the TOML file: optim={"lr": 1e-6},
            **{"rollout.max_new_tokens": 64}.

    Raises:
        QuartetError: for settings that cannot work, files that cannot be read, and models that
            cannot be loaded. Nothing has been written then but stored inputs.
    """
    if prompts is not None and data is not None:
        raise ConfigError("prompts: is another name for data. Give one of the two.")
    data = prompts if data is None else data
    named = {
        "policy": policy,
        "tokenizer": tokenizer,
        "data": data,
        "eval_data": eval_data,
        "reward": reward,
        "steps": steps,
        "seed": seed,
        "folder": folder,
        "name": name,
    }
    arguments = {key: value for key, value in named.items() if value is not None}
    if resume is not None and resume is not False:
        if recipe is not None:
            raise ConfigError("recipe: the run that is resumed has one. Leave it out.")
        path = Path(folder or "runs") / "latest" if resume is True else Path(resume)
        return _resumed(path, arguments, settings, accept)
    if recipe is None:
        raise ConfigError('recipe: name a stage, such as quartet.train("ppo", …).')
    inputs = inputs_of(recipe, arguments, settings)
    checked = settings_of_table(inputs.table, inputs.name, "quartet.train")
    from quartet.api.run import TrainingRun  # imports torch, which mistakes need not wait for

    with naming_rows():
        return TrainingRun(checked, inputs.objects)


def _resumed(
    path: Path, arguments: Mapping[str, Any], settings: Mapping[str, Any], accept: Sequence[str]
) -> TrainingRun:
    """Return the run of a folder, to go on with changed settings."""
    if not (path / "events.jsonl").is_file():
        raise ConfigError(f"resume: {path} is no run folder.")
    from quartet.api.run import TrainingRun

    return TrainingRun.resumed(path, arguments, settings, accept)
