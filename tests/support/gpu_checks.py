"""What `tests/test_gpu.py` asks a GPU: a few seconds each, on small models with the sizes that choose kernels.

`tests/training/test_gpu_checks.py` goes through the same functions on a pretended device, so that a mistake in them costs no time on a
rented machine.
"""

import copy
import dataclasses

import torch

from quartet.generation.decoders import make_decoder
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling, draw
from quartet.generation.slots import SlotDecoder
from quartet.models.adapters import POLICY, add_adapter
from quartet.models.forward import masked_logprobs
from quartet.models.loading import fill
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.quantize import quantize
from quartet.models.skeleton import skeleton
from quartet.models.trunk import checkpoint_blocks
from quartet.training.batch import collate
from quartet.training.optim import Optimizer, OptimizerConfig
from tests.support.pretended_device import CUDA, on_device
from tests.support.small_models import small_model
from tests.support.world import prompts, tokenizer

BF16 = torch.bfloat16
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
KINDS = {
    "grouped heads with biases": ("qwen2", {}),
    "windows, heads of 256": (
        "gemma3_text",
        {
            "head_dim": 256, "sliding_window": 16, "query_pre_attn_scalar": 256,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "a wide vocabulary, caps": (
        "gemma2",
        {"head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64, "vocab_size": 66_000},
    ),
    "experts": (
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}  # fmt: skip
IN_4_BITS = "an adapter on 4 bits"


def there(module, pretends):
    """The module on the device, which is only pretended or not."""
    return on_device(module) if pretends else module.to(CUDA)


def policy(kind, pretends):
    """A policy that computes in bfloat16 on the device."""
    if kind == IN_4_BITS:
        made = small_model("llama", SHAPE, 0.05)
        with torch.random.fork_rng(devices=[]):
            base = add_adapter(quantize(skeleton(made.config)), Lora(rank=4), POLICY, seed=0)
        for name, p in base.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        base = fill(compute_in(base, BF16), made.state_dict(), torch.device("cpu"), "here")
        return there(base, pretends)
    name, more = KINDS[kind]
    return compute_in(there(small_model(name, SHAPE | more, 0.05), pretends), BF16)


def decoded(model, steps=270):
    """The logits of some steps of a decoder: rows leave and come, the cache is lengthened, fewer slots are computed."""
    found = []
    with torch.inference_mode():
        decoder = make_decoder(model, 320)
        assert isinstance(decoder, SlotDecoder), "another decoder is taken: see the warnings"
        vocabulary, rows = 500, 20
        decoder.prefill([[3 + i, 40, 5 * i] for i in range(5)], 4)
        for step in range(steps):
            tokens = (torch.arange(rows, device=CUDA) * 31 + 7 * step) % vocabulary
            logits = decoder.step(tokens)
            if step % 30 == 3:
                found.append(logits.cpu().clone())
            if step == 40:
                decoder.keep(torch.arange(rows, device=CUDA) % 3 == 0)
                rows = 7
            if step == 90:
                decoder.prefill([list(range(30))], 2)
                rows = 9
    return found


def off(found, expected):
    """How far two lists of logits are apart, relative to their length."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def sampler_gap(model, num_prompts=16, tokens=32):
    """The mean and the largest |ratio − 1| of the sampler's probabilities and the learner's, of four responses to each prompt."""
    generator = NativeGenerator(model, tokenizer(), frozenset({1}), seed=0)
    few = [dataclasses.replace(p, ids=(*p.ids, 400, 17)) for p in prompts(num_prompts)]
    batch = collate(generator.generate(few, Sampling(max_new_tokens=tokens), 4))
    mask = batch.response_mask
    with torch.no_grad():
        ours = masked_logprobs(model, batch.tokens, mask).cpu()[mask]
    ratios = (ours - batch.rollout_logprobs[mask]).expm1().abs()
    return float(ratios.mean()), float(ratios.max())


def gradient_cosine(kind, pretends):
    """The cosine between the gradient in bfloat16 on the device and that in float32 on a CPU. Rows share their prompts, and blocks
    are computed again for the gradient."""
    name, more = KINDS[kind]
    plain = small_model(name, SHAPE | more, 0.05)
    rounded = checkpoint_blocks(compute_in(there(copy.deepcopy(plain), pretends), BF16))
    tokens = torch.arange(6 * 50).reshape(6, 50) * 37 % 500
    tokens[:3, :30], tokens[3:, :20] = tokens[0, :30].clone(), tokens[3, :20].clone()
    mask = torch.arange(50).expand(6, 50) >= torch.tensor([30] * 3 + [20] * 3)[:, None]
    vectors = []
    for model in (plain, rounded):
        masked_logprobs(model, tokens, mask).sum().backward()
        vectors.append(torch.cat([p.grad.cpu().flatten() for p in model.parameters()]))
    return float(torch.nn.functional.cosine_similarity(*vectors, dim=0))


def share_drawn_alike(vocabulary=262_144, rows=64):
    """The share of rows for which the device draws the token that a CPU draws, and how far log-probs and entropies are apart."""
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, vocabulary, generator=rng)
    noise = torch.rand(rows, generator=rng)
    here, there = (
        draw(logits.to(place), Sampling(), noise.to(place)) for place in (torch.device("cpu"), CUDA)
    )
    same = here.tokens == there.tokens.cpu()
    apart = max(
        float((here.logprobs - there.logprobs.cpu())[same].abs().max()),
        float((here.entropies - there.entropies.cpu()).abs().max()),
    )
    return float(same.float().mean()), apart


def steps_apart(optimizer, pretends):
    """How far three steps of an optimizer on the device and on a CPU leave the weights apart, in units of what they moved."""
    plain = small_model("llama", SHAPE, 0.05)
    models = [plain, there(copy.deepcopy(plain), pretends)]
    config, moved = OptimizerConfig(lr=1e-3, optimizer=optimizer), []
    for model in models:
        start = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        stepper = Optimizer([*model.parameters()], config, 10, matrices)
        rng = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=rng).to(p.device)
            stepper.clip()
            stepper.step()
            stepper.load_state(stepper.state())
        moved.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]) - start)
    return float((moved[0] - moved[1]).norm() / moved[0].norm())
