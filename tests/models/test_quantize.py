"""A base in 4 bits under adapters: what its numbers are, that they train, and what is saved."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from quartet.distributed.sharding import full_state_dict
from quartet.generation.decoders import RowDecoder, make_decoder
from quartet.generation.fused import LinearsInTurn
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.adapters import (
    CRITIC,
    POLICY,
    AdapterView,
    adapter_parameters,
    add_adapter,
    merged_state,
)
from quartet.models.forward import masked_logprobs
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import save
from quartet.models.loading import fill
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.quantize import NF4Linear, QuantizeError, quantize
from quartet.models.skeleton import skeleton
from tests.support.world import model, prompts, tokenizer

LORA = Lora(rank=4)
TOKENS = torch.arange(4, 20)[None].repeat(2, 1)
MASK = torch.arange(16)[None].repeat(2, 1) > 4
# The 16 levels of NF4 (Dettmers et al. 2023, appendix E).
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
    ]
)


def quantized(dtype: torch.dtype = torch.float32, kind: str = "llama"):
    whole = model(kind)
    made = add_adapter(quantize(skeleton(whole.config)), LORA, POLICY, seed=0)
    return fill(compute_in(made, dtype), whole.state_dict(), torch.device("cpu"), "here")


def noisy(made, seed: int = 0, size: float = 0.2):
    """The model with an adapter that changes it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(made, POLICY):
            p.copy_(size * torch.randn(p.shape, generator=rng))
    return made


def test_each_block_of_64_is_16_levels_of_its_largest_magnitude():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    layer = NF4Linear(torch.nn.Linear(64, 32, bias=False, device="meta"))
    layer.store(weight)
    largest = weight.abs().amax(dim=1, keepdim=True)
    nearest = (weight / largest)[..., None].sub(LEVELS).abs().argmin(dim=-1)
    by_hand = LEVELS[nearest] * largest
    # The magnitudes are rounded to 8 bits, which a few numbers between two levels notice.
    close = (layer.dequantized() - by_hand).abs() < 0.02 * largest
    assert close.float().mean() > 0.995
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().T)
    assert layer.weight.numel() == weight.numel() / 2 and layer.weight.dtype == torch.uint8


def test_layers_in_4_bits_without_an_adapter_are_saved_whole():
    whole = model()
    some = Lora(rank=4, targets=("q_proj", "up_proj"))
    made = add_adapter(quantize(skeleton(whole.config)), some, POLICY, seed=0)
    made = noisy(fill(made, whole.state_dict(), torch.device("cpu"), "here"))
    plain = model()
    plain.load_state_dict(merged_state(made))
    torch.testing.assert_close(made(TOKENS).logits, plain(TOKENS).logits, atol=1e-5, rtol=1e-5)
    decoder = make_decoder(made, 20)
    assert isinstance(decoder, RowDecoder)
    [logits] = decoder.prefill([TOKENS[0].tolist()], 1)
    torch.testing.assert_close(logits, plain(TOKENS).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_the_model_is_the_one_with_its_rounded_weights():
    made = noisy(quantized())
    plain = model()
    plain.load_state_dict(merged_state(made))
    torch.testing.assert_close(
        masked_logprobs(made, TOKENS, MASK), masked_logprobs(plain, TOKENS, MASK)
    )
    plain.load_state_dict(merged_state(quantized()))  # the adapter starts at 0
    torch.testing.assert_close(
        masked_logprobs(AdapterView(made, None), TOKENS, MASK), masked_logprobs(plain, TOKENS, MASK)
    )
    assert (masked_logprobs(plain, TOKENS, MASK) - masked_logprobs(model(), TOKENS, MASK)).any()


def test_adapters_get_the_gradients_that_they_have_on_the_rounded_weights():
    made = noisy(quantized())
    rounded = merged_state(quantized())
    plain = model()
    plain.load_state_dict(rounded)
    plain = noisy(add_adapter(plain, LORA, POLICY, seed=0))
    for each in (made, plain):
        masked_logprobs(each, TOKENS, MASK).sum().backward()
    pairs = zip(adapter_parameters(made, POLICY), adapter_parameters(plain, POLICY), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)


def test_only_the_linear_layers_of_blocks_are_in_4_bits():
    made = quantized(torch.bfloat16)
    kinds = {n for n, m in made.named_modules() if isinstance(m, NF4Linear)}
    assert len(kinds) == 7 * 2 and all(n.endswith("base_layer") for n in kinds)
    assert made.get_output_embeddings().weight.dtype == torch.bfloat16
    [layer] = [m for m in made.modules() if isinstance(m, NF4Linear)][:1]
    assert layer.dequantized().dtype == torch.bfloat16
    assert {p.dtype for p in adapter_parameters(made, POLICY)} == {torch.float32}


def test_four_roles_stand_on_one_trunk():
    made = noisy(quantized())
    held = {p.data_ptr() for p in made.parameters()}
    critic = AdaptedScalar(add_adapter(made, LORA, CRITIC, seed=1), CRITIC, 0, seed=0)
    reference = AdapterView(made, None)
    (masked_logprobs(made, TOKENS, MASK).sum() + critic.values(TOKENS, MASK).sum()).backward()
    for adapter in (POLICY, CRITIC):
        assert all(p.grad is not None for p in adapter_parameters(made, adapter))
    assert masked_logprobs(reference, TOKENS, MASK).requires_grad is False
    assert {p.data_ptr() for p in made.parameters() if p.dtype == torch.uint8} <= held


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_it_is_saved_merged_in_bfloat16_and_the_adapter_by_itself(tmp_path):
    made = noisy(quantized())
    save(made, tokenizer(), tmp_path / "policy")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        masked_logprobs(whole.float(), TOKENS, MASK),
        masked_logprobs(made, TOKENS, MASK),
        atol=0.05,
        rtol=0.05,
    )
    plain = model()
    plain.load_state_dict(merged_state(quantized()))
    theirs = PeftModel.from_pretrained(plain, tmp_path / "policy" / "adapter")
    torch.testing.assert_close(
        masked_logprobs(theirs.base_model.model, TOKENS, MASK), masked_logprobs(made, TOKENS, MASK)
    )


def test_a_reward_model_on_it_is_saved_whole(tmp_path):
    made = quantized()
    scalar = AdaptedScalar(add_adapter(made, LORA, CRITIC, seed=1), CRITIC, 0, seed=0)
    with torch.no_grad():
        for p in adapter_parameters(made, CRITIC):
            p.add_(0.1)
    scalar.save(tmp_path, tokenizer())
    whole = ScalarModel.load(tmp_path)
    lengths = torch.tensor([16, 9])
    torch.testing.assert_close(
        whole.scores(TOKENS, lengths), scalar.scores(TOKENS, lengths), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_sampled_has_the_log_probs_of_the_learner(dtype):
    """By the decoders that own their cache, without a merged copy of any weight."""
    made = noisy(quantized(dtype), size=0.05)
    decoder = make_decoder(made, 32)
    assert isinstance(decoder, RowDecoder)
    assert all(isinstance(block.qkv, LinearsInTurn) for block in decoder.blocks)
    generator = NativeGenerator(made, tokenizer(), frozenset({1}), 0)
    [rollout, *_] = generator.generate(prompts(4), Sampling(max_new_tokens=8))
    ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
    mask = torch.arange(ids.shape[1])[None] >= len(rollout.prompt.ids)
    learnt = masked_logprobs(made, ids, mask)[mask]
    bound = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(learnt, torch.tensor(rollout.logprobs), atol=bound, rtol=bound)


def test_layers_of_another_kind_are_refused():
    with pytest.raises(QuantizeError, match="gpt2 has no linear layers"):
        quantize(skeleton(model("gpt2").config))


def test_its_weights_are_named_as_they_were():
    names = {n for n in full_state_dict(quantized()) if "lora_" not in n}
    assert {n.replace(".base_layer.", ".") for n in names} == {*model().state_dict()}
