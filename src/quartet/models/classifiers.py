"""Classifiers of transformers with one number as their output: their classes, which some
architectures do not have, their configs, and how they are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification

from quartet.models.language_model import (
    OWN_CODE,
    UNLOADABLE,
    ModelError,
    check_finite,
    first_line,
    read_config,
)

OWN_CLASSIFIER = "quartet_classifier"
"""The key of config.json that says that `define_classifier` made the class."""


def load_classifier(auto: Any, folder: str | Path, device: torch.device | None) -> Any:
    """Return the sequence or token classifier of a Hugging Face folder or hub id, by its Auto
    class. Raises ModelError for a folder without the head, which transformers would initialise at
    random."""
    define_classifier(read_config(folder))
    try:
        model, report = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **OWN_CODE
        )
    except UNLOADABLE as error:
        raise ModelError(
            f"{folder}: cannot be loaded as a reward model ({first_line(error)})."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{folder}: has no weights for {missing[0]}, so it is no trained model for "
            f"{auto.__name__.removeprefix('AutoModelFor')}."
        )
    check_finite(folder, model)
    return model.to(device).eval()


def define_classifier(config: Any) -> None:
    """Have `AutoModelForSequenceClassification` know the architecture of a config in this process.

    transformers has no sequence classifier for some causal models (Granite, Cohere, OLMo 3). Theirs
    is the trunk under a linear layer `score`, as its other classifiers are. Raises ModelError where
    transformers has no single trunk.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    trunk = MODEL_MAPPING.get(kind, None)
    if not isinstance(trunk, type) or config.is_encoder_decoder:
        raise ModelError(
            f"transformers has no sequence classifier for the architecture {config.model_type}, "
            "and no trunk to make one of, so it cannot be a reward model or a critic of its own. "
            'Use critic = { type = "shared" } and a reward that is no model.'
        )
    base = next(each for each in trunk.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = f"{trunk.__name__.removesuffix('Model')}ForSequenceClassification"
    body = {"__module__": __name__}
    classifier = type(name, (GenericForSequenceClassification, base), body)
    # `exist_ok`: without it transformers keeps its own configs from being registered
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:  # transformers 5.17 does so even then
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content[kind] = classifier


def auto_class(folder: str | Path) -> Any:
    """Return the Auto class that a folder of a scalar model is loaded with."""
    kinds = read_config(folder).architectures or [""]
    per_token = kinds[0].endswith("ForTokenClassification")
    return AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification


def new_classifier(
    language_model: Any, pad_token_id: int | None, make: Callable[[Any, Any], Any]
) -> Any:
    """Return a sequence classifier with one label for the trunk of a language model's config.
    `make` makes it from its config and Auto class. Raises ModelError where there can be none."""
    config = AutoConfig.for_model(
        **one_label(language_model, "reward") | {"pad_token_id": pad_token_id}
    )
    define_classifier(config)
    model = make(config, AutoModelForSequenceClassification)
    if type(model).__module__ == __name__:
        setattr(model.config, OWN_CLASSIFIER, True)
    return model


def with_weights(config: Any, auto: Any) -> Any:
    """Return a new model of an Auto class, with random weights in float32."""
    return auto.from_config(config, dtype=torch.float32)


def one_label(config: Any, name: str) -> dict[str, Any]:
    """Return the keys of a config with one label of this name."""
    return {**config.to_dict(), "id2label": {0: name}, "label2id": {name: 0}}
