"""Recurrent states in the plan, against the caches that decoders really hold."""

from collections import Counter

import pytest
import torch

from quartet.generation.plain import PlainDecoder
from quartet.models.precision import compute_in
from quartet.planning.memory import folder_sizes, row_cache_bytes
from quartet.planning.states import States, layer_kinds, states_of
from tests.models.test_recurrent import CASES, language_model


def held_bytes(decoder):
    """What the cache of a decoder holds: keys, values, convolutions, states."""
    tensors = {}
    for layer in decoder.cache.layers:
        for value in vars(layer).values():
            for each in value.values() if isinstance(value, dict) else [value]:
                if isinstance(each, torch.Tensor):
                    tensors[each.data_ptr()] = each.nbytes
    return sum(tensors.values())


@pytest.mark.parametrize(
    ("table", "kinds", "states"),
    [
        # Mamba 2.8B: 2 × 2560 channels, 4 columns, 16 numbers of state each, 64 layers.
        (
            {"model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16},
            {"mamba": 64},
            States(0, 64 * 5120 * 4, 64 * 5120 * 16),
        ),
        # As the config.json files of the hub name layers: Jamba, Bamba, Nemotron-H, Qwen3-Next, LFM2.
        (
            {
                "model_type": "jamba", "hidden_size": 8, "num_hidden_layers": 8, "attn_layer_period": 8,
                "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
            },
            {"mamba": 7, "attention": 1},
            States(1, 7 * 16 * 4, 7 * 16 * 16),
        ),
        (
            {
                "model_type": "bamba", "hidden_size": 8, "num_hidden_layers": 4, "attn_layer_indices": [2],
                "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1,
            },
            {"mamba": 3, "attention": 1},
            States(1, 3 * (16 + 2 * 16) * 4, 3 * 16 * 16),
        ),
        (
            {
                "model_type": "nemotron_h", "hidden_size": 8, "hybrid_override_pattern": "M-M*", "conv_kernel": 4,
                "mamba_num_heads": 3, "mamba_head_dim": 5, "ssm_state_size": 7, "n_groups": 2,
            },
            {"mamba": 2, "mlp": 1, "attention": 1},
            States(1, 2 * (15 + 28) * 4, 2 * 15 * 7),
        ),
        (
            {
                "model_type": "qwen3_next", "hidden_size": 8, "num_hidden_layers": 8, "linear_num_key_heads": 2,
                "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
            },
            {"linear_attention": 6, "full_attention": 2},
            States(2, 6 * (2 * 6 + 20) * 4, 6 * 4 * 3 * 5),
        ),
        (
            {"model_type": "lfm2", "hidden_size": 8, "num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 3},
            {"mamba": 2, "attention": 1},
            States(1, 2 * 8 * 3, 0),
        ),
        ({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}, {"attention": 2}, States(2)),
    ],
    ids=lambda x: x.get("model_type") if isinstance(x, dict) else "",
)  # fmt: skip
def test_states_by_hand(table, kinds, states):
    assert Counter(layer_kinds(table)) == kinds
    assert states_of(table) == states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(CASES))
def test_a_row_takes_what_the_plan_says(kind, dtype, tmp_path):
    made = compute_in(language_model(kind).requires_grad_(False), dtype)
    made.config.save_pretrained(tmp_path)
    sizes = folder_sizes(str(tmp_path))
    assert sizes is not None and sizes.states is not None
    decoder = PlainDecoder(made)
    decoder.prefill([[5, 9, 21, 33, 4], [7, 8, 12, 3, 6]], 2)
    decoder.step(torch.tensor([4, 5, 6, 7]))
    assert 4 * row_cache_bytes(sizes, 6, dtype.itemsize) == held_bytes(decoder)
