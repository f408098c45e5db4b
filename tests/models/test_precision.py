"""bfloat16 with float32 master weights: what is rounded, what is not, and that training moves as in float32."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from quartet.distributed.sharding import local_tensor
from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.fused import FusedBlock
from quartet.models import logprobs
from quartet.models.adapters import CRITIC, POLICY, add_adapter, freeze_layers, frozen_copy
from quartet.models.elementwise import normed
from quartet.models.forward import masked_logprobs
from quartet.models.fused import _projected, blocks_in, has_fused_forward, layers_of, rotations
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import save
from quartet.models.logprobs import head_logits, head_statistics
from quartet.models.lora import Lora
from quartet.models.precision import compute_dtype, compute_in, label_layer
from quartet.training.parallelize import parallelize
from tests.distributed.test_offload import two_ranks
from tests.models.test_llama import FAMILY, language_model, ragged
from tests.support.small_models import small_model
from tests.support.world import model, tokenizer

BF16, FP32 = torch.bfloat16, torch.float32


def in_bf16(kind="llama", seed=0):
    return compute_in(model(kind, seed), BF16)


def loss_of(policy):
    tokens = torch.arange(24).view(2, 12) % 20
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return -masked_logprobs(policy, tokens, mask).sum() / mask.sum()


# --- what is rounded


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_parameters_and_gradients_stay_float32_and_are_read_in_bfloat16(kind):
    policy = in_bf16(kind)
    before = {name: p.clone() for name, p in model(kind).named_parameters()}
    for name, p in policy.named_parameters():
        assert p.dtype == FP32 and torch.equal(p, before[name])
    assert compute_dtype(policy) == BF16
    block = next(
        m for m in policy.modules() if isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__
    )
    assert block.weight.dtype == BF16 and block._parameters["weight"].dtype == FP32
    loss = loss_of(policy)
    assert loss.dtype == FP32
    loss.backward()
    assert {p.grad.dtype for p in policy.parameters()} == {FP32}
    assert {t.dtype for t in policy.state_dict().values()} == {FP32}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_float32_up_to_rounding(kind):
    exact, rounded = model(kind), in_bf16(kind)
    losses = [loss_of(exact), loss_of(rounded)]
    torch.testing.assert_close(losses[1], losses[0], atol=2e-2, rtol=1e-2)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / p.grad.norm().clamp(min=1e-3)
        assert error < 0.05, name


def test_adapters_in_parts_get_gradients_though_the_precision_is_set_again():
    """As where the adapter of a critic is taken up on a trunk that FSDP holds."""
    with two_ranks() as mesh:
        policy = compute_in(add_adapter(model(), Lora(rank=2), POLICY, seed=0), BF16)
        parallelize(policy, mesh)
        frozen = {
            name: local_tensor(p).clone()
            for name, p in policy.named_parameters()
            if not p.requires_grad
        }
        compute_in(policy, BF16)
        loss_of(policy).backward()
        now = dict(policy.named_parameters())
        assert all(torch.equal(local_tensor(now[name]), p) for name, p in frozen.items())
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.dtype == FP32 for p in trained)


def test_what_is_not_trained_is_held_in_bfloat16():
    policy = model()
    freeze_layers(policy, 1)
    compute_in(policy, BF16)
    for name, p in policy.named_parameters():
        assert p.dtype == (FP32 if p.requires_grad else BF16), name
    reference = frozen_copy(policy, BF16)
    assert {p.dtype for p in reference.parameters()} == {BF16}
    # They compute with the same numbers, so the policy starts at its reference to the bit.
    assert torch.equal(loss_of(reference), loss_of(policy))


def test_a_reference_can_be_more_precise_than_the_policy():
    policy = in_bf16()
    reference = frozen_copy(policy, FP32)
    assert torch.equal(loss_of(reference), loss_of(model())) and compute_dtype(policy) == BF16


def test_an_adapter_is_float32_on_a_base_in_bfloat16_also_the_second():
    policy = compute_in(add_adapter(model(), Lora(rank=2), POLICY, 0), BF16)
    compute_in(add_adapter(policy, Lora(rank=2), CRITIC, 1), BF16)
    critic = AdaptedScalar(policy, CRITIC, None, 0)
    for name, p in policy.named_parameters():
        assert p.dtype == (FP32 if "lora_" in name else BF16), name
    (loss_of(policy) + critic.values(*rows()).sum()).backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained} == {FP32} and len(trained) == 2 * 2 * 14


def rows():
    tokens = torch.arange(24).view(2, 12) % 20
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :3] = False
    return tokens, mask


def test_scores_and_values_are_float32_numbers():
    """A bfloat16 number has three digits: scores of 10.3 and 10.33 would be equal."""
    policy = model()
    scalar = ScalarModel.from_trunk(policy, None, seed=0)
    scalar.head.weight.data *= 1e-3
    scalar.centre = -10.0
    exact = copy.deepcopy(scalar).values(*rows())
    scalar.requires_grad_(False).compute_in(BF16)
    assert scalar.head.weight.dtype == FP32
    values = scalar.values(*rows())
    mask = rows()[1]
    assert values.dtype == FP32 and len(values[mask].unique()) > 9
    torch.testing.assert_close(values, exact, atol=1e-3, rtol=0)


def test_a_classifier_of_transformers_own_forward_gives_float32_labels():
    config = AutoConfig.for_model(
        "bert", vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    classifier = AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    tokens = torch.arange(10).view(2, 5)
    exact = classifier(tokens).logits
    compute_in(classifier, BF16, label_layer(classifier))
    logits = classifier(tokens).logits
    assert logits.dtype == FP32 and classifier.bert.embeddings.word_embeddings.weight.dtype == BF16
    torch.testing.assert_close(logits, exact, atol=2e-2, rtol=0)


def test_logits_of_bfloat16_numbers_are_not_rounded():
    hidden, weight = torch.randn(5, 64, dtype=BF16), torch.randn(7, 64, dtype=BF16)
    bias = torch.randn(7, dtype=BF16)
    exact = hidden.double() @ weight.double().t() + bias.double()
    logits = head_logits(hidden, weight, bias)
    assert logits.dtype == FP32
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-5)
    logprobs, entropy = head_statistics(
        hidden, weight, bias, torch.arange(5), 0.7, chunk_elements=10
    )
    expected = (exact / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs.double(), expected.diagonal()[:5], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=1e-5
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers of a tensor that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == FP32:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("size", [4, 12, 13])
def test_a_large_head_in_bfloat16_is_converted_a_chunk_at_a_time(monkeypatch, size):
    """Of 13 tokens, in chunks of `size`: the logits are the largest tensor in float32, not the head."""
    monkeypatch.setattr(logprobs, "CHUNK_COLUMNS", size)
    hidden, weight = torch.randn(3, 64, dtype=BF16), torch.randn(13, 64, dtype=BF16)
    hidden.requires_grad_()
    with LargestTensor() as largest:
        logits = head_logits(hidden, weight, None)
    exact = hidden.double() @ weight.double().t()
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=1e-5)
    assert largest.numbers == max(size * 64, 3 * 64)
    outer = torch.randn(3, 13)
    (found,) = torch.autograd.grad((logits * outer).sum(), hidden)
    expected = outer.double() @ weight.double()
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


def test_gradients_through_a_head_in_bfloat16_are_those_of_float32_up_to_rounding():
    """A head that is not trained adds the gradient up in its forward pass, chunk by chunk."""
    hidden, weight = torch.randn(6, 64, dtype=BF16), torch.randn(400, 64, dtype=BF16)
    tokens, outer = torch.randint(400, (6,)), torch.randn(6)
    found = []
    for dtype, trained in ((torch.float64, True), (BF16, True), (BF16, False)):
        h = hidden.to(dtype).requires_grad_()
        w = weight.to(dtype).requires_grad_(trained)
        logprobs, _ = head_statistics(h, w, None, tokens, 0.7, chunk_elements=6 * 50)
        found.append(torch.autograd.grad((logprobs * outer).sum(), h)[0].double())
    exact, trained, frozen = found
    for rounded in (trained, frozen):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


# --- both forwards


@FAMILY
def test_the_fused_forward_and_the_decoder_are_taken_in_bfloat16_too(name):
    policy = compute_in(language_model(name), BF16)
    assert has_fused_forward(policy.base_model, 33)
    decoder = make_decoder(policy, 40)
    assert isinstance(decoder, RowDecoder) and decoder.caches[0].dtype == BF16
    tokens, _ = ragged()
    logits = decoder.prefill([tokens[1, :20].tolist()], 1)
    for position in range(20, 25):
        logits = decoder.step(tokens[1, position : position + 1])
    theirs = policy(input_ids=tokens[1:2, :25]).logits[0, -1].float()
    assert logits.dtype == FP32
    assert (logits[0] - theirs).norm() / theirs.norm() < 0.05


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "olmo2"])
@torch.no_grad()
def test_queries_and_keys_are_rounded_in_the_decoder_where_the_learner_rounds_them(kind):
    """A norm is rounded once, behind its weights. A second time put Gemma 3 270M's sampler 2.1% from its learner, not 1.5%."""
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 32,
    }
    shape |= {"intermediate_size": 48} | ({} if kind == "olmo2" else {"head_dim": 16})
    policy = small_model(kind, shape, 0.1)
    for name, p in policy.named_parameters():
        if "norm" in name:
            p.add_(0.5 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1)))
    trunk = compute_in(policy, BF16).base_model
    [layer], [block] = layers_of(trunk), blocks_in(trunk)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2)).to(BF16)
    turns = rotations(trunk, torch.arange(30), layer.rotation)
    h = (
        x
        if layer.row.before_attention is None
        else normed(block.input_layernorm, x, layer.row.norm)
    )
    queries, keys, _ = _projected(block.self_attn, layer, h, turns)
    ones = torch.ones(30, 2, 8, dtype=turns.dtype)
    factors = torch.cat([turns.expand(-1, 6, -1), ones], dim=1)
    heads = FusedBlock(block, layer, 16).project_qkv(x, factors)
    differ = (heads[:, :6] != torch.cat([queries, keys], dim=1)).float().mean()
    assert differ < 0.02, f"{differ:.1%} of the numbers differ"


def test_a_forward_that_computes_something_else_is_not_taken(monkeypatch):
    policy = compute_in(language_model("llama"), BF16)
    monkeypatch.setattr(policy.base_model.layers[0].self_attn, "scaling", 1.0)
    assert has_fused_forward(policy.base_model, 33)  # both read it
    other = compute_in(language_model("llama"), BF16)
    real = other.base_model.forward
    monkeypatch.setattr(other.base_model, "forward", lambda **k: _scaled(real(**k), 1.2))
    assert not has_fused_forward(other.base_model, 33)


def _scaled(output, factor):
    output.last_hidden_state = output.last_hidden_state * factor
    return output


# --- training


def test_ten_steps_at_a_small_learning_rate_move_the_masters_as_in_float32():
    """Weights that were kept in bfloat16 would mostly stand still."""
    moved = {}
    for kind in ("fp32", "bf16", "plain"):
        policy = model() if kind == "fp32" else in_bf16() if kind == "bf16" else model().to(BF16)
        before = [p.detach().clone() for p in policy.parameters()]
        adam = torch.optim.AdamW(policy.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(10):
            loss_of(policy).backward()
            adam.step()
            adam.zero_grad()
        moved[kind] = torch.cat(
            [
                (p.detach() - b).float().flatten()
                for p, b in zip(policy.parameters(), before, strict=True)
            ]
        )
    assert (moved["fp32"] != 0).float().mean() > 0.9
    assert (moved["bf16"] != 0).float().mean() > 0.9
    assert (moved["plain"] != 0).float().mean() < 0.02
    cosine = torch.nn.functional.cosine_similarity(moved["bf16"], moved["fp32"], dim=0)
    assert cosine > 0.9
    ratio = moved["bf16"].norm() / moved["fp32"].norm()
    assert 0.95 < ratio < 1.05


def test_a_policy_is_saved_in_float32_and_loads_as_it_was(tmp_path):
    policy = in_bf16()
    save(policy, tokenizer(), tmp_path / "full")
    adapted = compute_in(add_adapter(model(), Lora(rank=2), POLICY, 0), BF16)
    save(adapted, tokenizer(), tmp_path / "adapted")
    for name in ("full", "adapted"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "float32"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {p.dtype for p in loaded.parameters()} == {FP32}
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    for p, q in zip(full.parameters(), policy.parameters(), strict=True):
        assert torch.equal(p, q)
