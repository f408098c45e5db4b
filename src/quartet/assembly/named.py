"""The models that a config names: folders and hub ids."""

import dataclasses
from pathlib import Path

from quartet.models.language_model import ModelError
from quartet.rewards.source import RewardSource
from quartet.rewards.sources import EnsembleSource, ModelSource, StepsSource


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
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f'{key} = "{model}": no such folder.')
    return model
