"""Rules about data, paths and the policy."""

from pathlib import Path

from quartet.config.rules.base import rule
from quartet.config.tables import Config

CHECKED_WORLDS = ("sums", "guess")
"""Worlds whose answers are right or wrong; they have no comparisons to learn from."""


@rule
def data_train_lists_a_file(config: Config) -> str | None:
    if config.data.train is None or config.data.files:
        return None
    return "data.train: is empty. Name a file."


@rule
def paths_are_not_empty(config: Config) -> str | None:
    paths = {
        "data.train": config.data.files,
        "data.eval": (config.data.eval,),
        "data.texts": (config.data.texts,),
        "policy.model": (config.policy.model,),
        "reward_model.model": (config.reward_model.model,),
        "reference.model": (config.reference.model,),
    }
    for key, named in paths.items():
        if "" in named:
            return f"{key}: is empty. Name a file or folder."
    return None


@rule
def run_name_is_no_path(config: Config) -> str | None:
    name = config.run.name
    if name is None or (
        name.strip() and Path(name).name == name and name[0] != "." and name.isprintable()
    ):
        return None
    return f"run.name = {name!r}: is a name, not a path; letters, digits and dashes."


@rule
def policy_has_one_origin(config: Config) -> str | None:
    if (config.policy.model is None) != (config.policy.create is None):
        return None
    return (
        "policy.model: name a folder or hub id, or describe a new model in policy.create; exactly "
        "one of the two."
    )


@rule
def data_have_one_origin(config: Config) -> str | None:
    if (config.data.world is None) != (config.data.train is None):
        return None
    return "data.train: name a file, or an embedded world in data.world; exactly one of the two."


@rule
def adapter_excludes_frozen_layers(config: Config) -> str | None:
    if config.policy.adapter is None or not config.policy.frozen_layers:
        return None
    return "policy.frozen_layers: an adapter freezes all layers already. Take one of the two out."


@rule
def some_layers_are_trained(config: Config) -> str | None:
    shape, frozen = config.policy.create, config.policy.frozen_layers
    if shape is None or frozen < shape.num_layers:
        return None
    return f"policy.frozen_layers = {frozen}: the model has {shape.num_layers} layers."


@rule
def every_file_has_a_weight(config: Config) -> str | None:
    weights, files = config.data.weights, config.data.files
    if weights is None:
        return None
    if len(weights) == len(files) and all(w >= 0 for w in weights) and any(weights):
        return None
    return (
        f"data.weights = {list(weights)}: needs one number ≥ 0 for each of {len(files)} files in "
        "data.train."
    )


@rule
def new_model_needs_a_tokenizer(config: Config) -> str | None:
    policy = config.policy
    if policy.create is None or policy.tokenizer is not None or config.data.world is not None:
        return None
    return (
        'policy.tokenizer: a new model needs one. Write tokenizer = { type = "train" } or name a '
        "folder."
    )


@rule
def reward_model_needs_comparisons(config: Config) -> str | None:
    if config.data.world not in CHECKED_WORLDS or "reward_model" not in config.recipe:
        return None
    return (
        f"recipe: the world {config.data.world} has no comparisons to train a reward model on, its "
        "answers are checked."
    )


@rule
def labelled_texts_have_a_file(config: Config) -> str | None:
    needs = config.data.world == "labelled_texts"
    if needs == (config.data.texts is not None):
        return None
    if needs:
        return (
            "data.texts: the world labelled_texts needs a file with columns text and label. Use "
            'data.texts = "reviews.jsonl".'
        )
    return 'data.texts: only data.world = "labelled_texts" reads it.'
