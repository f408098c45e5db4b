"""Models with a recurrent state: which are known, sampled from, refused; sampler and learner; adapters; a whole run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.generation.decoders import make_decoder
from quartet.generation.plain import PlainDecoder
from quartet.models.adapters import POLICY, add_adapter, merged_state
from quartet.models.language_model import ModelError, save
from quartet.models.loading import fill
from quartet.models.lora import Lora
from quartet.models.quantize import quantize
from quartet.models.recurrent import SAMPLED, is_recurrent, why_not_sampled
from quartet.models.skeleton import skeleton
from quartet.worlds import make_world
from tests.support.decoding import check_logprobs, check_rows
from tests.support.small_models import small_model
from tests.support.tiny_run import make_run

RECURRENT = "qwen3_next qwen3_5_text lfm2 mamba mamba2 jamba falcon_h1 recurrent_gemma rwkv bamba"
ATTENDING = "llama gemma3_text gpt2 opt cohere2 qwen3_moe gpt_oss deepseek_v3 mixtral phi"
SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALONE = {
    key: SHAPE[key]
    for key in ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")
}
ALONE |= {"state_size": 8, "num_hidden_layers": 3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
CASES = {
    "bamba": SHAPE | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": SHAPE | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "head_dim": 8},
    "falcon_mamba": ALONE,
    "granitemoehybrid": SHAPE | MAMBA | {
        "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
    },
    "jamba": SHAPE | EXPERTS | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "lfm2": SHAPE | CONV | {"block_ff_dim": 48, "block_multiple_of": 8},
    "lfm2_moe": SHAPE | CONV | EXPERTS | {"num_dense_layers": 1},
    "mamba": ALONE,
    "mamba2": ALONE | {"head_dim": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "nemotron_h": SHAPE | {
        "hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 2, "chunk_size": 8, "head_dim": 8,
    },
    "olmo_hybrid": SHAPE | LINEAR,
    "qwen3_5_moe_text": SHAPE | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": SHAPE | LINEAR,
    "qwen3_next": SHAPE | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 24},
    "zamba2": SHAPE | {
        "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True, "mamba_ngroups": 1, "attention_head_dim": 16,
    },
}  # fmt: skip
FEW = ("lfm2", "mamba", "qwen3_5_text")
EACH = pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
)
NEAR = {"atol": 1e-3, "rtol": 1e-3}
"""A state is summed in chunks by a forward pass and token by token by a decoder."""


def language_model(kind, **more):
    return small_model(kind, CASES[kind] | more, 0.05)


@pytest.mark.parametrize("kind", [*RECURRENT.split(), *ATTENDING.split()])
def test_recurrent_models_are_known_by_their_config(kind):
    layers = {"layer_types": ["conv"] * 32} if kind == "lfm2" else {}
    config = AutoConfig.for_model(kind, **layers)
    assert is_recurrent(config) == (kind in RECURRENT.split())


def test_every_architecture_that_is_sampled_from_has_a_case():
    assert CASES.keys() == SAMPLED
    for kind, settings in CASES.items():
        config = AutoConfig.for_model(kind, **settings)
        assert is_recurrent(config) and why_not_sampled(config) is None


@EACH
def test_rows_together_have_the_logits_of_each_alone(kind):
    """Prompts of three lengths, two samples each, of which some end."""
    made = language_model(kind)
    decoder = PlainDecoder(made)
    check_rows(made, decoder, NEAR)
    assert decoder.free_rows() == 0
    decoder.keep(torch.zeros(3, dtype=torch.bool))
    assert decoder.free_rows() > 0
    again = decoder.prefill([[7, 12]], 1)  # states of earlier rows are gone
    torch.testing.assert_close(
        again[0], made(input_ids=torch.tensor([[7, 12]])).logits[0, -1], **NEAR
    )


@EACH
def test_the_samplers_logprobs_are_the_learners_also_under_an_adapter(kind):
    made = language_model(kind)
    for adapted in (False, True):
        if adapted:
            add_adapter(made, Lora(rank=4), POLICY, 0)
            for p in made.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, 0.0, 0.05)
        check_logprobs(made, 12, NEAR)


def test_another_recurrent_model_is_refused_by_name():
    sizes = {**ALONE, "num_hidden_layers": 2, "attention_hidden_size": 32}
    sizes.pop("state_size")
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes))
    with pytest.raises(ModelError, match="rwkv keeps a recurrent state"):
        PlainDecoder(made)


def test_states_that_padding_changes_are_found_out(monkeypatch):
    """As if a version of transformers no longer kept padding out of the states."""
    from transformers.models.lfm2 import modeling_lfm2

    monkeypatch.setattr(modeling_lfm2, "apply_mask_to_padding_states", lambda states, _: states)
    with pytest.raises(ModelError, match="lfm2 keeps a recurrent state, which padding changes in"):
        make_decoder(language_model("lfm2"), 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_a_run_of_three_stages(kind, tmp_path, monkeypatch):
    """Reward model and critic are of the same architecture, and PPO's ratios begin at 1."""
    monkeypatch.chdir(tmp_path)
    words = make_world("reviews", 0, None).tokenizer()
    made = language_model(
        kind, vocab_size=len(words), pad_token_id=words.pad_token_id, bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    save(made, words, tmp_path / "lm")
    run = make_run(
        tmp_path / "runs", "reviews", f'policy.model="{tmp_path / "lm"}"', "run.steps=2",
        'recipe=["sft","reward_model","ppo"]', "sft.steps=3", "sft.batch_size=8",
    )  # fmt: skip
    assert max(run.series["ppo"].columns["sampler_mismatch"]) < 1e-4
    assert (run.path / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["falcon_h1", "mamba"])
def test_adapters_and_4_bits_leave_out_layers_whose_weight_is_read_by_itself(kind):
    """Every adapter that is there gets a gradient, and 4 bits compute."""
    whole = language_model(kind)
    made = add_adapter(quantize(skeleton(whole.config)), Lora(rank=4), POLICY, seed=0)
    made = fill(made, whole.state_dict(), torch.device("cpu"), "here")
    for p in made.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0.0, 0.05)
    tokens = torch.randint(3, 40, (2, 9))
    made(tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
    for name, p in made.named_parameters():
        assert not p.requires_grad or float(p.grad.abs().max()) > 0, name
    plain = language_model(kind)
    plain.load_state_dict(merged_state(made))
    torch.testing.assert_close(made(tokens).logits, plain(tokens).logits, atol=1e-5, rtol=1e-5)
