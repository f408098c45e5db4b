"""Architectures that are not in the table, through transformers' own forward and cache: padding changes nothing."""

import pytest
import torch

from quartet.generation.decoders import make_decoder
from quartet.generation.plain import PlainDecoder
from quartet.models.architectures import why_not_fused
from quartet.models.forward import masked_logprobs
from quartet.models.trunk import checkpoint_blocks, hidden_states
from tests.support.decoding import check_rows
from tests.support.small_models import small_model

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS, WINDOW = {"head_dim": 8}, {"sliding_window": 5}
CHOICE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = CHOICE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
CASES = {
    "cohere2": {},
    "deepseek_v3": ROUTED | {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "ernie4_5": {},
    "exaone4": WINDOW,
    "gemma4_text": HEADS | WINDOW | {
        "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4": HEADS,
    "glm4_moe": HEADS | ROUTED,
    "gpt_oss": HEADS | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": HEADS,
    "minimax_m2": HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral3": HEADS,
    "phi": {},
    "seed_oss": HEADS,
}  # fmt: skip
FEW = ("gemma4_text", "gpt_oss")
EACH = pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
)
NEAR = {"atol": 5e-5, "rtol": 1e-4}


def language_model(kind):
    return small_model(kind, SHAPE | CASES[kind], 0.05)


@EACH
def test_rows_decoded_together_have_the_logits_of_each_alone(kind):
    made = language_model(kind)
    assert why_not_fused(made.config) is not None
    decoder = make_decoder(made, 40)
    assert isinstance(decoder, PlainDecoder)
    check_rows(made, decoder, NEAR)


@EACH
def test_rows_trained_together_have_the_hidden_states_of_each_alone(kind):
    trunk = language_model(kind).base_model
    tokens = torch.randint(3, 40, (3, 13))
    lengths = torch.tensor([13, 4, 8])
    mask = torch.arange(13) < lengths[:, None]
    together = hidden_states(trunk, tokens * mask, mask).split(lengths.tolist())
    for row, ours in enumerate(together):
        ids = tokens[row : row + 1, : lengths[row]]
        torch.testing.assert_close(
            ours, trunk(input_ids=ids, use_cache=False).last_hidden_state[0], **NEAR
        )


@pytest.mark.parametrize("kind", ["biogpt", "xglm", "llama"])
def test_activation_checkpoints_turn_on_no_dropout_and_set_no_random_numbers_back(
    kind, monkeypatch
):
    """transformers makes them in training mode, and the blocks of the first two have dropout that goes by their own flag; llama has the
    fused forward. The global generators are also those of a user's code in other threads."""

    def refuse(*_):
        raise AssertionError("random numbers are set back")

    sizes = {"d_model": 32, "attention_heads": 4, "num_layers": 4, "ffn_dim": 48, "dropout": 0.1}
    made = small_model(kind, SHAPE | (sizes if kind == "xglm" else {}), 0.1)
    tokens, mask = torch.arange(3, 30).reshape(3, 9), torch.arange(9).expand(3, 9) > 4
    monkeypatch.setattr(torch, "set_rng_state", refuse)
    found = []
    for model in (made, checkpoint_blocks(made)):
        logprobs = masked_logprobs(model, tokens, mask)
        gradients = torch.autograd.grad(logprobs.sum(), [*model.parameters()], allow_unused=True)
        found.append([logprobs.detach(), *(g for g in gradients if g is not None)])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)
