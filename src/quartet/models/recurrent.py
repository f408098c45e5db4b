"""Models with a recurrent state: what they keep of the past is more than keys and values.

Linear attention, a state-space layer or a convolution over tokens has a state of its own, which
every token changes, padding too if nothing keeps it out. Training needs no care: rows are padded on
the right, after all that is read. Sampling pads prompts on the left. transformers sets padding to
zero before it reaches the states of the architectures in `SAMPLED`, and its cache can reorder them.
"""

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

SAMPLED = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "zamba2",
}
"""The recurrent architectures of which each was sampled from and compared with a plain forward
(`tests/models/test_recurrent.py`)."""


def is_recurrent(config: Any) -> bool:
    """Return whether a model keeps a recurrent state."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    if any("attention" not in kind or kind.startswith("linear") for kind in kinds):
        return True
    known = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(each), None) for each in (config, text)]
    return any(getattr(kind, "_is_stateful", False) for kind in known)


def is_read_by_weight(parent: Any, name: str) -> bool:
    """Return whether other code reads the weight of this linear layer of a Mamba mixer, and does
    not call the layer: what stands in its place, an adapter or 4 bits, would not be seen."""
    return name in {"out_proj", "dt_proj"} and hasattr(parent, "D")


def why_not_sampled(config: Any) -> str | None:
    """Return why Quartet does not sample from a model, as a sentence without its end; None where it
    does."""
    kind = config.get_text_config().model_type
    if not is_recurrent(config) or kind in SAMPLED:
        return None
    return (
        f"{kind} keeps a recurrent state, and Quartet does not know how padding changes it, so it "
        "cannot sample from such a model"
    )
