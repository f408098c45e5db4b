"""The language model in a model that also reads images (Gemma 3, Qwen3.5, …), by itself.

What is for images would be held by every role, be saved in every checkpoint, and never be used.
"""

import copy
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from quartet.models.skeleton import skeleton


def text_config(config: Any) -> Any:
    """Return the config of the language model; that of any other model is returned as it is."""
    text = config.get_text_config()
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text = copy.deepcopy(text)
    # The head in the folder is that of the whole model.
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a model that generates text."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or text_config(config) is config:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def language_part(model: Any) -> Any:
    """Return the language model, with the same weights; any other model is returned as it is."""
    config = text_config(model.config)
    if config is model.config:
        return model
    language_model, kind = skeleton(config), MODEL_MAPPING[type(config)]
    trunk = next(module for module in model.modules() if isinstance(module, kind))
    setattr(language_model, language_model.base_model_prefix, trunk)
    language_model.set_output_embeddings(model.get_output_embeddings())
    language_model.generation_config = model.generation_config
    return language_model
