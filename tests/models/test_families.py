"""Each row of the table of architectures against transformers' own forward: hidden states, gradients, sampling,
adapters, checkpoints, bfloat16."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.slots import SlotDecoder
from quartet.models import fused
from quartet.models.adapters import POLICY, add_adapter
from quartet.models.architectures import ARCHITECTURES, longest_fused, why_not_fused
from quartet.models.forward import forward_positions, has_linear_head, masked_logprobs, statistics
from quartet.models.fused import has_fused_forward, layers_of, packed_hidden_states
from quartet.models.lora import Lora
from quartet.models.packing import pack
from quartet.models.precision import compute_in
from quartet.models.trunk import checkpoint_blocks
from quartet.training.parallelize import parallelize
from tests.models.test_llama import ROWS, disturbed, ragged
from tests.support.decoding import check_logprobs
from tests.support.pretended_device import on_device, pretended

WINDOWS = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_key_value_heads": 2,
}
BASES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
PARTIAL = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    }
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "mistral, window": ("mistral", {"sliding_window": 9, "num_key_value_heads": 2}),
    "qwen2, some windows": ("qwen2", WINDOWS | {"use_sliding_window": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma 2": (
        "gemma2",
        WINDOWS
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma 2 without caps": (
        "gemma2",
        WINDOWS | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma 3": ("gemma3_text", WINDOWS | BASES | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma 3, biases": ("gemma3_text", BASES | {"head_dim": 8, "attention_bias": True}),
    "phi 3": ("phi3", PARTIAL | {"num_key_value_heads": 2}),
    "phi 3, window": ("phi3", {"sliding_window": 6}),
    "phi 3, longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 48,
                "factor": 2.0,
            },
            "original_max_position_embeddings": 48,
            "max_position_embeddings": 96,
        },
    ),
    "mixtral": ("mixtral", EXPERTS | {"num_key_value_heads": 2, "sliding_window": 9}),
    "qwen2-moe": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "qwen3-moe": (
        "qwen3_moe",
        EXPERTS | {"num_key_value_heads": 2, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3-moe, every second": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2, "head_dim": 8}),
    "olmoe": ("olmoe", EXPERTS | {"num_key_value_heads": 2}),
    "olmo 2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo 3": ("olmo3", WINDOWS),
    "granite": (
        "granite",
        {
            "num_key_value_heads": 2,
            "attention_multiplier": 0.21,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "smollm 3": ("smollm3", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]}),
    "stablelm": ("stablelm", PARTIAL | {"num_key_value_heads": 2, "use_qkv_bias": True}),
    "stablelm, parallel": ("stablelm", PARTIAL | {"use_parallel_residual": True}),
    "gpt-neox": ("gpt_neox", PARTIAL),
    "gpt-neox, in series": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "silu"}),
    "gpt-2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt without biases": (
        "opt",
        {
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
    ),
}
EACH = pytest.mark.parametrize("name", list(CASES))
FEW = {"gemma 2", "qwen2-moe", "gemma 3", "phi 3", "gpt-neox", "gpt-2"}
"""Cases that have every trait among them."""
EACH_SLOWLY = pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
"""Few in the default suite, the others after it."""
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(name, **more):
    kind, settings = CASES[name]
    return AutoConfig.for_model(kind, **(SHAPE | settings | more))


def language_model(name, dtype=torch.float32, **more):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config(name, **more), dtype=torch.float32)
    return disturbed(made, dtype)


def nearness(name):
    """How far apart, relative to their length, logits in bfloat16 may be. Rounding may send a token to another expert."""
    return 0.06 if ARCHITECTURES[CASES[name][0]].experts is None else 0.3


def test_every_row_of_the_table_has_a_case():
    covered = {kind for kind, _ in CASES.values()} | {"llama", "qwen3"}  # those of test_llama.py
    assert covered == set(ARCHITECTURES)


@ROWS
@EACH
def test_every_hidden_state_and_every_gradient_is_transformers_own(name, rows):
    """After each block, and the gradient of each parameter."""
    trunk = language_model(name).base_model
    assert has_fused_forward(trunk, 33)
    tokens, asked = rows()
    # every position, so that no hidden state is left out; then only those that are asked for
    ends = torch.where(asked, torch.arange(33), 0).amax(1)
    everything = torch.arange(33) <= ends[:, None]
    theirs = trunk(input_ids=tokens, use_cache=False, output_hidden_states=True)
    seen = []
    blocks = layers_of(trunk)
    real = fused.block_forward

    def spy(*args):
        seen.append(real(*args))
        return seen[-1]

    fused.block_forward = spy
    try:
        ours = packed_hidden_states(trunk, pack(tokens, everything))
    finally:
        fused.block_forward = real
    assert len(seen) == len(blocks)
    for mine, other in zip(seen, theirs.hidden_states[1:-1], strict=False):
        torch.testing.assert_close(mine, other[everything], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours, theirs.last_hidden_state[everything], atol=2e-5, rtol=1e-4)
    ours = packed_hidden_states(trunk, pack(tokens, asked))
    theirs = trunk(input_ids=tokens, use_cache=False).last_hidden_state[asked]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    weights = torch.randn_like(theirs)
    parameters = list(trunk.parameters())
    pairs = zip(
        *(
            torch.autograd.grad((weights * h).sum(), parameters, allow_unused=True)
            for h in (ours, theirs)
        ),
        strict=True,
    )
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=3e-5 * max(1.0, float(b.abs().max())), rtol=1e-3)


@pytest.mark.slow
@EACH_SLOWLY
@pytest.mark.parametrize("kind", [RowDecoder, SlotDecoder])
def test_sampling_gives_the_logits_of_transformers_token_by_token(name, kind):
    """Rows leave, others come, samples share their prompt; texts grow past every window."""
    made = language_model(name)
    assert isinstance(make_decoder(made, 40), RowDecoder)
    ours = kind(made, 40)
    texts = [list(p) for p in torch.randint(40, (3, 14)).tolist() for _ in range(2)]
    texts[2:4] = [texts[2][:3]] * 2
    texts = [list(t) for t in texts]
    logits = ours.prefill([texts[0], texts[2], texts[4]], 2)
    rows = list(range(6))
    for step in range(14):
        for i, row in enumerate(rows):
            alone = made(input_ids=torch.tensor([texts[row]])).logits[0, -1]
            torch.testing.assert_close(logits[i], alone, atol=2e-5, rtol=1e-4)
        if step == 5:
            going = torch.tensor([True, False, True, True, True, False])
            rows = [rows[i] for i in ours.keep(going).tolist()]
        if step == 8:
            texts.append([7, 8, 9])
            rows.append(6)
            ours.prefill([texts[6]], 1)
        tokens = torch.randint(40, (len(rows),))
        for row, token in zip(rows, tokens.tolist(), strict=True):
            texts[row].append(token)
        logits = ours.step(tokens)
    assert max(map(len, texts)) > 25


@EACH_SLOWLY
def test_greedy_answers_are_those_of_generate(name):
    made = language_model(name)
    decoder, prompt = make_decoder(made, 36), [5, 9, 21, 33, 4, 17]
    logits, answer = decoder.prefill([prompt], 1), []
    for _ in range(24):
        answer.append(int(logits.argmax()))
        logits = decoder.step(torch.tensor(answer[-1:]))
    theirs = made.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert answer == theirs[0, len(prompt) :].tolist()


@pytest.mark.slow
@EACH_SLOWLY
def test_the_samplers_logprobs_are_the_learners_also_under_an_adapter(name):
    made = language_model(name)
    for adapted in (False, True):
        if adapted:
            add_adapter(made, Lora(rank=4), POLICY, 0)
            for p in made.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, 0.0, 0.1)
        assert isinstance(make_decoder(made, 40), RowDecoder) and has_linear_head(made)
        check_logprobs(made, 20, {"atol": 1e-5, "rtol": 1e-5})


@EACH_SLOWLY
def test_an_adapters_gradients_are_those_of_transformers_with_checkpoints_too(name):
    made = add_adapter(language_model(name), Lora(rank=4), POLICY, 0)
    adapter = [p for p in made.parameters() if p.requires_grad]
    for p in adapter:
        torch.nn.init.normal_(p, 0.0, 0.1)
    tokens, asked = ragged()
    asked[:, 0] = False

    def ours():
        outputs = forward_positions(made, tokens, asked)
        assert outputs.logits is None
        logprobs, _ = statistics(made, outputs, tokens, asked, 0.9)
        return torch.autograd.grad(logprobs.sum(), adapter)

    plain = ours()  # first: it chooses an attention of transformers that applies the cap
    logits = made(input_ids=tokens, use_cache=False).logits[:, :-1] / 0.9
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    theirs = torch.autograd.grad(logprobs[asked[:, 1:]].sum(), adapter)
    checkpoint_blocks(made)
    for a, b, c in zip(plain, ours(), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * max(1.0, float(b.abs().max())), rtol=1e-4)
        torch.testing.assert_close(a, c, atol=3e-5 * max(1.0, float(c.abs().max())), rtol=1e-3)


@EACH_SLOWLY
def test_in_bfloat16_both_forwards_agree_up_to_rounding_and_so_does_the_decoder(name):
    policy = compute_in(language_model(name), torch.bfloat16)
    assert has_fused_forward(policy.base_model, 33)
    decoder = make_decoder(policy, 40)
    assert isinstance(decoder, RowDecoder) and decoder.caches[0].dtype == torch.bfloat16
    tokens, _ = ragged()
    logits = decoder.prefill([tokens[1, :20].tolist()], 1)
    for position in range(20, 25):
        logits = decoder.step(tokens[1, position : position + 1])
    theirs = policy(input_ids=tokens[1:2, :25]).logits[0, -1].float()
    assert logits.dtype == torch.float32
    assert (logits[0] - theirs).norm() / theirs.norm() < nearness(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gemma 2", "gemma 3", "gpt-2", "gpt-neox", "granite", "olmo 3", "qwen3-moe"]
)
def test_on_a_gpu_that_is_not_there_slots_give_the_logits_of_the_cpu(name):
    """Windows, caps, learned positions: no tensor is left on the other device, and numbers are those of bfloat16."""
    here = compute_in(language_model(name), torch.bfloat16)
    prompt, more = [5, 9, 21, 33, 4, 17, 8, 30, 2, 11], [7, 12, 30]

    def logits(made):
        decoder = make_decoder(made, 20)
        found = [decoder.prefill([prompt, prompt[:4]], 1)]
        found += [decoder.step(torch.tensor([token, token]).to(made.device)) for token in more]
        return type(decoder), [x.cpu() for x in found]

    kind, expected = logits(here)
    with pretended():
        there = compute_in(on_device(language_model(name)), torch.bfloat16)
        other, found = logits(there)
    assert (kind, other) == (RowDecoder, SlotDecoder)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < nearness(name) * b.norm()


# --- what the table does not describe


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gptj", {"n_head": 4, "n_embd": 32}, "architecture gptj"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type = dynamic",
        ),
    ],
)
def test_a_setting_outside_the_table_is_named(kind, settings, reason):
    made = AutoConfig.for_model(kind, **(SHAPE | settings))
    assert reason in why_not_fused(made)


def test_longrope_is_computed_up_to_the_length_at_which_its_frequencies_change():
    trunk = language_model("phi 3, longrope").base_model
    assert longest_fused(trunk.config) == 48
    assert has_fused_forward(trunk, 48) and not has_fused_forward(trunk, 49)


@pytest.mark.parametrize("case", ["mistral, window", "gemma 3"])
def test_a_window_that_the_model_reads_differently_is_found_out(case, monkeypatch):
    """The comparison of both forwards is on fewer tokens than most windows have."""
    made = language_model(case, sliding_window=4096)
    assert has_fused_forward(made.base_model, 10_000) and made.config.sliding_window == 4096
    other = language_model(case, sliding_window=4096)
    real = layers_of
    monkeypatch.setattr(
        "quartet.models.fused.layers_of",
        lambda trunk: tuple(dataclasses.replace(x, window=None) for x in real(trunk)),
    )
    assert not has_fused_forward(other.base_model, 10_000)


# --- sharded


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def logprobs_and_gradients(made):
    torch.manual_seed(1)
    tokens, asked = ragged()
    asked[:, 0] = False
    logprobs = masked_logprobs(made, tokens, asked)
    made.zero_grad()
    logprobs.sum().backward()
    whole = [p.grad for p in made.parameters() if p.grad is not None]
    return [logprobs.detach(), *(getattr(g, "full_tensor", lambda g=g: g)() for g in whole)]


@pytest.mark.slow
@EACH
def test_a_sharded_model_computes_the_same(name, mesh):
    expected = logprobs_and_gradients(language_model(name))
    sharded = parallelize(language_model(name), mesh)
    assert has_fused_forward(sharded.base_model, 33)
    for a, b in zip(logprobs_and_gradients(sharded), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-4)
