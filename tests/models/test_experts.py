"""Models with mixtures of experts: what decoders hold, where adapters go, what is refused and planned, and a whole run."""

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.config.toml import read_settings
from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.fused import RoutedExperts
from quartet.generation.slots import SlotDecoder
from quartet.models.adapters import POLICY, AdapterError, adapters_of, add_adapter, named_layers
from quartet.models.experts import expert_mlp, grouped_experts, has_grouped_product, held_mlp
from quartet.models.language_model import ModelError, save
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.quantize import QuantizeError, quantize
from quartet.models.skeleton import skeleton
from quartet.planning.memory import folder_sizes
from quartet.planning.plan import plan
from quartet.recipes import recipe_path
from quartet.runs.charts import charts
from quartet.worlds import make_world
from tests.support.decoding_cost import cost_of_a_token
from tests.support.pretended_device import on_device, pretended
from tests.support.tiny_run import make_run
from tests.support.world import tokenizer

ABSENT = object()
HIDDEN, INNER, EXPERTS, CHOSEN, LAYERS = 32, 24, 6, 2, 2


def mixture(words=None, kind="qwen3_moe", **more):
    """A model with random weights, for the tokens of this tokenizer."""
    words = words or tokenizer()
    shape = {
        "vocab_size": len(words), "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": INNER,
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "max_position_embeddings": 256, "norm_topk_prob": True,
        "pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id,
        "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{k: v for k, v in (shape | more).items() if v is not ABSENT}),
        dtype=torch.float32,
    ).eval()


def test_an_mlp_of_experts_is_the_weighted_sum_of_those_that_its_router_chooses():
    mlp = mixture().base_model.layers[0].mlp
    with torch.no_grad():
        torch.nn.init.normal_(mlp.gate.weight)
    x = torch.randn(5, HIDDEN)
    chances = (x @ mlp.gate.weight.T).softmax(-1)
    by_hand = torch.zeros_like(x)
    for token in range(5):
        best = chances[token].topk(CHOSEN)
        for weight, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ x[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            by_hand[token] += weight * (mlp.experts.down_proj[expert] @ inner)
    torch.testing.assert_close(expert_mlp(mlp, x), by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_few_kernels_give_the_experts_outputs(num_tokens):
    """Also where experts get no token."""
    experts = mixture().base_model.layers[0].mlp.experts
    x, logits = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, EXPERTS)
    weights, chosen = logits.softmax(-1).topk(CHOSEN)
    ours = grouped_experts(experts, torch.arange(EXPERTS), x, chosen, weights)
    torch.testing.assert_close(ours, experts(x, chosen, weights), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_decoded_token_of_a_mixture_costs_few_kernels_and_hardly_a_wait(kind):
    """Ceilings, to be lowered when they are beaten. Routers and experts are 25 of the 35 of a layer."""
    layers = 6
    with pretended() as counts:
        made = compute_in(on_device(mixture(kind=kind, num_hidden_layers=layers)), torch.bfloat16)
        assert isinstance(make_decoder(made, 60), SlotDecoder)
        kernels, waits = cost_of_a_token(made, counts)
    assert kernels <= 35 * layers + 43 and waits <= 0.13


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, False),
        ("cuda", torch.float32, False),
        ("mps", torch.bfloat16, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_the_grouped_product_is_taken_where_torch_makes_it(device, dtype, expected):
    assert has_grouped_product(torch.device(device), dtype) is expected


def test_a_decoder_shares_the_experts_and_rounds_trained_ones_once():
    made = mixture()
    experts = made.base_model.layers[0].mlp.experts
    held = held_mlp(made.base_model.layers[0].mlp).experts
    assert held.gate_up_proj.data_ptr() == experts.gate_up_proj.data_ptr()
    decoder = make_decoder(compute_in(made, torch.bfloat16), 20)
    assert isinstance(decoder, RowDecoder)
    routed = decoder.blocks[0].down
    assert isinstance(routed, RoutedExperts)
    weight = routed.mlp.experts.gate_up_proj
    assert weight.dtype == torch.bfloat16 and weight is routed.mlp.experts.gate_up_proj
    assert experts._parameters["gate_up_proj"].dtype == torch.float32
    assert torch.equal(weight, experts.gate_up_proj)


@pytest.mark.parametrize("more", [{}, {"decoder_sparse_step": 2}], ids=["all", "every second"])
def test_adapters_are_on_the_projections_of_attention(more):
    made = add_adapter(mixture(**more), Lora(rank=2), POLICY, 0)
    assert adapters_of(made) == {POLICY}
    assert {name.rpartition(".")[2] for name in named_layers(made)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert len(named_layers(made)) == 4 * LAYERS
    with pytest.raises(AdapterError, match="the model has no layer gate_proj. It has k_proj, o_pr"):
        add_adapter(mixture(**more), Lora(rank=2, targets=("gate_proj",)), POLICY, 0)


def test_four_bits_are_refused():
    with pytest.raises(
        QuantizeError, match="the experts of qwen3_moe, nearly all of its weights, are no linear"
    ):
        quantize(skeleton(mixture().config))


def test_the_planner_counts_the_experts_of_a_token(tmp_path):
    made = mixture()
    save(made, tokenizer(), tmp_path)
    sizes = folder_sizes(str(tmp_path))
    assert sizes is not None and sizes.is_fused
    assert sizes.intermediate == CHOSEN * INNER
    of_one_expert = 3 * HIDDEN * INNER
    adapter = add_adapter(made, Lora(rank=2), POLICY, 0)
    counted = Lora(rank=2).parameters(HIDDEN, LAYERS, None)
    assert counted == sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert sizes.idle_parameters == LAYERS * (EXPERTS - CHOSEN) * of_one_expert
    words = [f'policy.model="{tmp_path}"', "policy.adapter.type=lora", "policy.adapter.rank=2"]
    planned = plan(read_settings(recipe_path("reviews"), words).config)
    assert planned.models["adapter (attention only, no experts)"] == counted
    # Mixtral has no width of its own for experts.
    mixtral = mixture(kind="mixtral", moe_intermediate_size=ABSENT)
    save(mixtral, tokenizer(), tmp_path)
    sizes = folder_sizes(str(tmp_path))
    assert sizes is not None and sizes.intermediate == CHOSEN * 48


@pytest.mark.slow
def test_a_run_trains_every_expert_and_samples_what_it_scores(tmp_path, monkeypatch):
    """From a saved folder to a saved folder, with reward model and critic of the same architecture."""
    monkeypatch.chdir(tmp_path)
    words = make_world("reviews", 0, None).tokenizer()
    save(mixture(words), words, tmp_path / "lm")
    before = load_file(tmp_path / "lm" / "model.safetensors")
    run = make_run(
        tmp_path / "runs", "reviews", f'policy.model="{tmp_path / "lm"}"', "run.steps=2",
        'recipe=["sft","reward_model","ppo"]', "sft.steps=3", "sft.batch_size=8",
        "policy.router_aux_loss_coef=0.01",
    )  # fmt: skip
    after = load_file(run.path / "policy" / "model.safetensors")
    experts = [name for name in after if ".experts." in name]
    assert experts and before.keys() == after.keys()
    for name in experts:
        assert not torch.equal(before[name], after[name]), name
    assert max(run.series["ppo"].columns["sampler_mismatch"]) < 1e-4
    for stage, roles in {
        "sft": ["experts"],
        "reward_model": ["experts"],
        "ppo": ["experts", "critic_experts"],
    }.items():
        for role in roles:
            columns = run.series[stage].columns
            assert all(1.5 < x < EXPERTS for x in columns[f"{role}/balance_loss"])
            assert all(CHOSEN / EXPERTS <= x <= 1 for x in columns[f"{role}/largest_share"])
    assert pq.read_table(run.path / "rollouts" / "000002.parquet").num_rows
    titles = [chart.title for chart, _ in charts(run.series["ppo"])]
    assert "Largest share of one expert" in titles and "Load-balancing loss" in titles


def test_balancing_a_load_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match="policy.router_aux_loss_coef = 0.01: llama is none of the mi"
    ):
        make_run(tmp_path, "reviews", "policy.router_aux_loss_coef=0.01")
