"""The models that a config names: folders and hub ids."""

import dataclasses
from pathlib import Path

from quartet import files
from quartet.config.errors import in_short
from quartet.models.language_model import ModelError
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import EnsembleSource, ModelSource, StepsSource

LONGEST_ID = 200
"""Characters of a name that can be one of the hub, which allows 96."""


def with_resolved_models(source: RewardSource) -> RewardSource:
    """Return the reward source with the absolute paths of its models."""
    match source:
        case ModelSource(model=model):
            return dataclasses.replace(source, model=resolved_model("reward.model", model))
        case StepsSource(model=model):
            return dataclasses.replace(source, model=str(resolved_model("reward.model", model)))
        case EnsembleSource(models=tuple(models)):
            resolved = (str(resolved_model("reward.models", model)) for model in models)
            return dataclasses.replace(source, models=tuple(resolved))
    return source


def resolved_model(key: str, model: str | None) -> str | None:
    """Return a model's folder as an absolute path, so that it stays the same when `runs/latest`
    changes. A hub id, `name` or `owner/name`, is returned as it is. `key` is named in errors."""
    if model is None:
        return None
    if files.exists(model):
        if not Path(model).is_dir():
            raise ModelError(f'{key} = "{model}": is a file. Name the folder of a model.')
        return str(Path(model).resolve())
    is_id = len(model) <= LONGEST_ID and model.count("/") <= 1
    if not is_id or model.startswith((".", "/", "~")):
        raise ModelError(f"{key} = {in_short(model)}: no such folder.")
    return model
