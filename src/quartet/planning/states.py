"""The recurrent states that a row of a decoder holds beside keys and values, from a config.json.

Mamba 1 and 2 (Gu & Dao 2023, Dao & Gu 2024), gated linear attention and short convolutions keep the
last columns of a convolution, and all but the last a state. Neither grows with the text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATTERN = {"M": "mamba", "*": "attention"}
"""The letters of Nemotron-H's pattern that stand for layers with a cache."""
ALL_MAMBA = {"mamba", "mamba2", "falcon_mamba"}


@dataclass(frozen=True)
class States:
    """What a row holds, summed over the layers of a model."""

    attention_layers: int
    """The layers with keys and values."""
    convolution: int = 0
    """The numbers of convolutions, in the dtype that the model computes in."""
    state: int = 0
    """The numbers of states, in float32."""


def states_of(table: Mapping[str, Any]) -> States:
    """Return what a row of a model with this config.json holds."""
    kinds = layer_kinds(table)
    attending = sum(_attends(kind) for kind in kinds)
    recurrent = sum(kind == "hybrid" or not _attends(kind) for kind in kinds if _caches(kind))
    if not recurrent:
        return States(attending)
    convolution, state = _of_layer(table)
    if (
        table.get("model_type") == "falcon_h1"
    ):  # its multipliers are float32, and what they multiply
        convolution, state = 0, convolution + state
    return States(attending, recurrent * convolution, recurrent * state)


def layer_kinds(table: Mapping[str, Any]) -> list[str]:
    """Return the kind of each layer: attention, a recurrent one, or both ("hybrid")."""
    named: list[str] | None = table.get("layer_types") or table.get("layers_block_type")
    if named:
        return named
    layers = range(table.get("num_hidden_layers") or table.get("n_layer") or 0)
    if table.get("model_type") in ALL_MAMBA:
        return ["mamba" for _ in layers]
    if table.get("model_type") == "falcon_h1":
        return ["hybrid" for _ in layers]
    if pattern := table.get("hybrid_override_pattern"):
        return [PATTERN.get(letter, "mlp") for letter in pattern]
    if period := table.get("attn_layer_period"):
        offset = table.get("attn_layer_offset", 0)
        return ["attention" if i % period == offset else "mamba" for i in layers]
    for key in ("attn_layer_indices", "full_attn_idxs"):
        if key in table:
            return ["attention" if i in (table[key] or ()) else "mamba" for i in layers]
    if table.get("linear_num_value_heads"):
        interval = table.get("full_attention_interval", 4)
        return ["linear_attention" if (i + 1) % interval else "full_attention" for i in layers]
    return ["attention" for _ in layers]


def _attends(kind: str) -> bool:
    return kind == "hybrid" or ("attention" in kind and not kind.startswith("linear"))


def _caches(kind: str) -> bool:
    return kind not in {"mlp", "moe"}


def _of_layer(table: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of the convolution and of the state of one layer."""

    def first(*keys: str, default: int = 0) -> int:
        return next((int(table[key]) for key in keys if table.get(key)), default)

    hidden = first("hidden_size")
    kernel = first("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", default=4)
    if length := first("conv_L_cache"):  # a convolution alone
        return hidden * length, 0
    if value_heads := first("linear_num_value_heads"):
        key_size, value_size = first("linear_key_head_dim"), first("linear_value_head_dim")
        widths = 2 * first("linear_num_key_heads") * key_size + value_heads * value_size
        return widths * kernel, value_heads * key_size * value_size
    inner = first("mamba_d_ssm") or first("mamba_num_heads") * first("mamba_head_dim")
    inner = inner or first("mamba_expand", "expand", default=2) * hidden
    size = first("mamba_d_state", "ssm_state_size", "state_size", default=16)
    groups = first("mamba_n_groups", "mamba_ngroups", "n_groups")  # none in Mamba 1
    return (inner + 2 * groups * size) * kernel, inner * size
