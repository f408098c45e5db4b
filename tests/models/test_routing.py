"""What is recorded of routers: every architecture against transformers' own loss, on both paths, shared prompts, checkpoints,
shards, adapters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.output_capturing import OutputRecorder

from quartet.models.adapters import POLICY, AdapterView, add_adapter
from quartet.models.forward import forward_positions, has_linear_head
from quartet.models.fused import has_fused_forward
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.logprobs import predicting_positions
from quartet.models.lora import Lora
from quartet.models.packing import pack
from quartet.models.routing import (
    BALANCED,
    _recordable,
    recorded_routing,
    recorder_of,
    why_not_balanced,
)
from quartet.models.trunk import checkpoint_blocks
from quartet.training.parallelize import parallelize
from tests.models import test_recurrent
from tests.models.test_families import mesh  # noqa: F401
from tests.models.test_plain_path import HEADS, SHAPE, WINDOW
from tests.support.small_models import small_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
CASES = {
    "ernie4_5_moe": SHAPE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    "flex_olmo": SHAPE | EXPERTS,
    "gpt_oss": SHAPE | HEADS | WINDOW | LOCAL,
    "granitemoe": SHAPE | LOCAL,
    "granitemoehybrid": test_recurrent.CASES["granitemoehybrid"],
    "jamba": test_recurrent.CASES["jamba"],
    "minimax_m2": SHAPE | HEADS | LOCAL,
    "mixtral": SHAPE | LOCAL,
    "olmoe": SHAPE | EXPERTS,
    "phimoe": SHAPE | LOCAL,
    "qwen2_moe": SHAPE | EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": test_recurrent.CASES["qwen3_5_moe_text"],
    "qwen3_moe": SHAPE | HEADS | EXPERTS,
    "qwen3_next": test_recurrent.CASES["qwen3_next"],
}  # fmt: skip
CASES = {
    kind: settings
    for kind, settings in CASES.items()
    if "router_logits" in _recordable(AutoConfig.for_model(kind))
}
"""The lowest version of transformers says of some architectures not where their router logits are."""
FEW = ("gpt_oss", "jamba", "qwen3_moe")
EACH = pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
)
NEAR = {"atol": 1e-4, "rtol": 1e-4}


def language_model(kind="qwen3_moe", **more):
    return small_model(kind, CASES[kind] | more, 0.2)


def rows(shared=0):
    """Right-padded rows of 17, 9 and 12 tokens, whose responses begin behind 4, or `shared`, tokens."""
    torch.manual_seed(1)
    tokens, lengths = torch.randint(3, 40, (3, 17)), torch.tensor([17, 9, 12])
    tokens[:, :shared] = tokens[0, :shared]
    positions = torch.arange(17)
    return tokens, (positions >= max(shared, 4)) & (positions < lengths[:, None]), lengths


def recorded(made, tokens, mask):
    with recorded_routing(made.base_model) as recorder:
        forward_positions(made, tokens, mask)
    return recorder.routing


def theirs(made, tokens, lengths):
    """transformers' loss of the tokens that predict another one."""
    read = torch.arange(tokens.shape[1]) < lengths[:, None] - 1
    output = made(input_ids=tokens, attention_mask=read.long(), output_router_logits=True)
    return output.aux_loss


def test_every_balanced_architecture_has_a_case():
    untold = {kind for kind in BALANCED if kind not in CASES}
    assert CASES.keys() <= BALANCED and untold <= {"granitemoe", "granitemoehybrid"}
    for kind, settings in CASES.items():
        assert why_not_balanced(AutoConfig.for_model(kind, **settings)) is None


@EACH
def test_the_loss_is_that_of_transformers(kind):
    made = language_model(kind)
    tokens, mask, lengths = rows()
    routing = recorded(made, tokens, mask)
    assert has_linear_head(made)
    expected = theirs(made, tokens, lengths)
    torch.testing.assert_close(routing.loss(), expected, **NEAR)
    assert float(routing.counts.sum()) == int((lengths - 1).sum())
    routers = [
        p for name, p in made.named_parameters() if "gate.weight" in name or "router" in name
    ]
    pairs = [torch.autograd.grad(x, routers, allow_unused=True) for x in (routing.loss(), expected)]
    assert any(a is not None and a.abs().max() > 1e-5 for a in pairs[0])
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **NEAR)


def test_an_architecture_whose_routers_transformers_does_not_name_is_spoken_of(monkeypatch):
    made = language_model("qwen3_moe")
    monkeypatch.setattr(type(made.base_model), "_can_record_outputs", None)
    assert "does not say what the routers of qwen3_moe give" in str(why_not_balanced(made.config))
    with recorded_routing(made.base_model) as recorder:
        forward_positions(made, *rows()[:2])
    assert recorder.routing is None


def test_a_router_of_a_class_with_other_uses_is_told_by_its_name(monkeypatch):
    """transformers 5.17 has Jamba's routers as plain linear maps of one name."""
    made = language_model("qwen3_moe")
    tokens, mask, _ = rows()
    expected = recorded(made, tokens, mask).logits
    base = type(made.base_model)
    named = OutputRecorder(torch.nn.Module, index=0, layer_name="mlp.gate")
    monkeypatch.setattr(base, "_can_record_outputs", {"router_logits": named})
    found = recorded(made, tokens, mask).logits
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_prompt_that_rows_share_counts_for_each_of_them(kind):
    made = language_model(kind)
    tokens, mask, lengths = rows(shared=8)
    is_fused = has_fused_forward(made.base_model, 17)
    assert is_fused == (kind == "qwen3_moe")
    routing = recorded(made, tokens, mask)
    if is_fused:
        assert len(routing.counts) < int((lengths - 1).sum()) and routing.counts.max() == 3
    torch.testing.assert_close(routing.loss(), theirs(made, tokens, lengths), **NEAR)
    share = routing.loads().sum(1) / routing.counts.sum()
    torch.testing.assert_close(share, torch.full_like(share, 2.0))


def test_rows_that_are_not_packed_leave_their_padding_out():
    """With little padding the rectangle is computed as it is."""
    made = language_model()
    tokens, _, _ = rows()
    lengths = torch.tensor([17, 17, 16])
    positions = torch.arange(17)
    mask = (positions >= 4) & (positions < lengths[:, None])
    assert pack(tokens, predicting_positions(mask)).places is None
    torch.testing.assert_close(
        recorded(made, tokens, mask).loss(), theirs(made, tokens, lengths), **NEAR
    )


def gradients(made, tokens, mask):
    with recorded_routing(made.base_model) as recorder:
        outputs = forward_positions(made, tokens, mask)
    made.zero_grad()
    (outputs.hidden.square().mean() + recorder.routing.loss()).backward()
    grads = [p.grad for p in made.parameters() if p.grad is not None]
    return [getattr(g, "full_tensor", lambda g=g: g)() for g in grads]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_checkpoints_change_no_gradient(kind):
    tokens, mask, _ = rows()
    plain = gradients(language_model(kind), tokens, mask)
    again = gradients(checkpoint_blocks(language_model(kind)), tokens, mask)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_shards_change_no_gradient(kind, mesh):  # noqa: F811
    tokens, mask, _ = rows()
    plain = gradients(language_model(kind), tokens, mask)
    for a, b in zip(
        gradients(parallelize(language_model(kind), mesh), tokens, mask), plain, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_recorded_does_not_change_what_is_computed():
    made = language_model()
    tokens, mask, _ = rows()
    before = forward_positions(made, tokens, mask).hidden
    with recorded_routing(made.base_model):
        assert torch.allclose(forward_positions(made, tokens, mask).hidden, before, atol=1e-6)
    assert recorder_of(made.base_model) is None
    assert not any(module._forward_hooks for module in made.modules())


def test_a_reward_model_and_an_adapter_are_recorded_too():
    tokens, mask, lengths = rows()
    made = language_model()
    scalar = ScalarModel.from_trunk(made, 0, 0)
    with recorded_routing(scalar.trunk) as recorder:
        scalar.values(tokens, mask)
    expected = theirs(made, tokens, lengths)
    torch.testing.assert_close(recorder.routing.loss(), expected, **NEAR)
    adapted = AdaptedScalar(add_adapter(made, Lora(rank=2), POLICY, 0), POLICY, 0, 0)
    with recorded_routing(adapted.trunk) as recorder:
        adapted.values(tokens, mask)
    torch.testing.assert_close(recorder.routing.loss(), expected, **NEAR)
    with recorded_routing(made.base_model) as recorder:
        forward_positions(AdapterView(made, None), tokens, mask)
    torch.testing.assert_close(recorder.routing.loss(), expected, **NEAR)


def test_nothing_is_recorded_of_dense_and_compiled_models_and_without_gradients():
    tokens, mask, _ = rows()
    made = language_model()
    with torch.no_grad():
        assert recorded(made, tokens, mask) is None
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)).eval()
    assert recorded(dense, tokens, mask) is None
    made.base_model.layers[0].fused_layer = None  # as compile_blocks leaves it
    assert recorded(made, tokens, mask) is None


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("llama", {}, "llama is none of the mixtures"),
        ("deepseek_v3", {}, "deepseek_v3 is none of the mixtures"),
        ("granitemoehybrid", {"num_local_experts": 0}, "this granitemoehybrid has no experts"),
    ],
)
def test_why_a_load_is_not_balanced(kind, more, why):
    assert why in why_not_balanced(AutoConfig.for_model(kind, **more))
