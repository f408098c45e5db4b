"""The plan's memory on a GPU, term by term, against the bytes that the program allocates on a device that is only pretended."""

import dataclasses
import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.generation.decoders import make_decoder
from quartet.generation.sampling import Sampling, draw
from quartet.models.actor_critic import freeze
from quartet.models.adapters import POLICY, add_adapter
from quartet.models.exact_kl import HeadInput, head_exact_kl
from quartet.models.forward import masked_logprobs
from quartet.models.loading import fill
from quartet.models.logprobs import head_statistics
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.quantize import NF4Linear, quantize
from quartet.models.skeleton import skeleton
from quartet.planning.gpu_memory import (
    TRANSIENT,
    Workload,
    bucket,
    decoder_weights,
    load_peak,
    memory_between_updates,
    native_generation,
    training_memory,
)
from quartet.planning.hardware import GPUS, CannotFit
from quartet.planning.memory import Sizes
from quartet.training.optim import Optimizer, OptimizerConfig
from tests.support.pretended_device import COUNTS, CUDA, on_device, pretended

DTYPES = {2: torch.bfloat16, 4: torch.float32}
LORA = Lora(rank=8)
VOCABULARY, ROWS, WIDTH = 1024, 16, 64
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = AutoConfig.for_model(
    "llama", vocab_size=VOCABULARY, num_key_value_heads=2, intermediate_size=320, max_position_embeddings=512,
    tie_word_embeddings=False, **SHAPE,
)  # fmt: skip
MODEL = Sizes(128, 4, 320, heads_share=1 / 2)
BESIDE = 2 * VOCABULARY * 128 + 9 * 128


def work(**changes):
    """One learner on one GPU, whose micro-batch is `ROWS` rows of `WIDTH` tokens, of which one predicts nothing."""
    plain = Workload(
        parameters=int(MODEL.matrix_parameters) + BESIDE,
        model=MODEL,
        beside=BESIDE,
        learners=1,
        frozen=0,
        rows=ROWS,
        prompt=4.0,
        response=40.0,
        longest=40,
        epochs=1,
        micro_tokens=ROWS * (WIDTH - 1),
        checkpointing=False,
        vocabulary=VOCABULARY,
    )
    return dataclasses.replace(plain, **changes)


ADAPTER = LORA.parameters(128, 4, 320, 1 / 2)
KINDS = {
    "full": work(),
    "full, fp32": work(number=4),
    "lora": work(adapter=ADAPTER),
    "nf4": work(adapter=ADAPTER, in_4_bits=True),
}
SLOW_NF4 = pytest.param("nf4", marks=pytest.mark.slow)


def whole():
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()


def in_4_bits(dtype):
    """A policy on the CPU."""
    made = compute_in(add_adapter(quantize(skeleton(CONFIG)), LORA, POLICY, seed=0), dtype)
    return fill(made, whole().state_dict(), torch.device("cpu"), "here")


def policy(kind):
    """A policy on the device, as a run has it."""
    dtype = DTYPES[KINDS[kind].number]
    if kind.startswith("full"):
        return compute_in(on_device(whole()), dtype)
    if kind == "nf4":
        return on_device(in_4_bits(dtype))
    return on_device(compute_in(add_adapter(whole(), LORA, POLICY, seed=0), dtype))


def alive():
    gc.collect()
    return COUNTS.alive


def trained(made):
    return [p for p in made.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind != "nf4"), SLOW_NF4])
def test_weights_gradients_and_moments(kind):
    planned = training_memory(KINDS[kind], 1)
    with pretended():
        before = alive()
        made = policy(kind)
        weights = alive() - before
        optimizer = Optimizer(trained(made), OptimizerConfig(), 10)
        for p in optimizer.parameters:
            p.grad = torch.zeros_like(p)
        for stepper in optimizer.torch_optimizers:
            stepper.step()
        everything = alive() - before
    held = 4 * KINDS[kind].trained + planned["trunk"]
    if kind.startswith("full"):
        held = 4 * KINDS[kind].parameters
    assert weights == pytest.approx(held, rel=0.1)
    assert everything == pytest.approx(planned["actor"] + planned["trunk"], rel=0.1)
    assert everything - weights == pytest.approx(12 * KINDS[kind].trained, rel=0.1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("full")])
def test_activations_rounded_weights_and_logits(kind):
    planned = training_memory(KINDS[kind], 1)
    tokens = torch.randint(4, 20, (ROWS, WIDTH))
    mask = torch.arange(WIDTH).expand(ROWS, WIDTH) > 0
    with pretended() as counts:
        made = policy(kind)
        masked_logprobs(made, tokens, mask)  # compares both forwards, once
        before = alive()
        counts.reset_peak()
        result = masked_logprobs(made, tokens, mask)
        kept, peak = alive() - before, counts.peak - before
        del result
    held = planned["activations"] + planned.get("rounded weights", 0.0)
    assert kept == pytest.approx(held, rel=0.1)
    assert peak == pytest.approx(held + planned["logits"], rel=0.1)


@pytest.mark.slow
def test_adapters_on_4_bits_get_the_gradients_of_the_cpu():
    tokens = torch.randint(4, 20, (2, 8))
    mask = torch.arange(8).expand(2, 8) > 0

    found = []
    with pretended():
        for place in (lambda made: made, on_device):
            torch.manual_seed(0)
            made = place(in_4_bits(torch.bfloat16))
            masked_logprobs(made, tokens, mask).sum().backward()
            found.append(torch.cat([p.grad.cpu().flatten() for p in trained(made)]))
    here, there = found
    assert (here - there).norm() < 0.05 * here.norm() and here.norm() > 0


@pytest.mark.slow
def test_quantizing_on_the_device_leaves_nothing_behind_for_the_cpu():
    weight = torch.randn(64, 64)
    layers = [NF4Linear(torch.nn.Linear(64, 64, device="meta")) for _ in range(2)]
    with pretended():
        layers[0].store(weight.to(CUDA))
        there = layers[0].dequantized().cpu()
    layers[1].store(weight)
    assert torch.equal(layers[1].dequantized(), there)


def test_logits_of_a_large_vocabulary_come_in_chunks():
    """256 positions and 32,768 words: four chunks of 2 M logits."""
    planned = training_memory(work(micro_tokens=256, vocabulary=32_768), 1)["logits"]
    assert planned == 3 * 4 * 2**21
    with pretended() as counts:
        hidden = torch.randn(256, 8).to(CUDA)
        weight = torch.randn(32_768, 8).to(CUDA)
        tokens = torch.zeros(256, dtype=torch.long).to(CUDA)
        before = alive()
        counts.reset_peak()
        head_statistics(hidden, weight, None, tokens, 1.0)
        assert counts.peak - before == pytest.approx(planned, rel=0.1)


def test_logits_of_two_models_meet_in_an_exact_kl():
    planned = training_memory(work(micro_tokens=256, vocabulary=32_768, exact_kl=True), 1)
    with pretended() as counts:
        policy, reference = (
            HeadInput(torch.randn(256, 8).to(CUDA), torch.randn(32_768, 8).to(CUDA))
            for _ in range(2)
        )
        policy.hidden.requires_grad_()
        before = alive()
        counts.reset_peak()
        head_exact_kl(policy, reference, 1.0).sum().backward()
        assert counts.peak - before == pytest.approx(planned["logits"], rel=0.1)


LARGE = {"vocab_size": 16_384, "hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 320}
"""Embeddings of 34 MB in float32: they are nearly all of the model."""


def peak_of_a_micro_batch(made, counts):
    """The bytes of a micro-batch beside weights, gradients and moments, and those of its gradients that are kept."""
    tokens = torch.randint(4, 20, (8, 33))
    mask = torch.arange(33).expand(8, 33) > 0
    masked_logprobs(made, tokens, mask).sum().backward()  # compares both forwards, once
    before = alive()
    counts.reset_peak()
    masked_logprobs(made, tokens, mask).sum().backward()
    assert alive() == before, "gradients were there already"
    return counts.peak - before


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("kind", ["tied", "own head", "adapter"])
def test_gradients_of_large_embeddings(kind, number):
    """A whole gradient is beside the one that is kept; under an adapter there is none."""
    tied = kind != "own head"
    config = AutoConfig.for_model(
        "llama", num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=tied, **LARGE,
    )  # fmt: skip
    model = Sizes(512, 2, 320, heads_share=1 / 2)
    beside = (1 if tied else 2) * 16_384 * 512 + 5 * 512
    planned = training_memory(
        work(
            parameters=int(model.matrix_parameters) + beside,
            model=model,
            beside=beside,
            micro_tokens=8 * 32,
            vocabulary=16_384,
            number=number,
            adapter=LORA.parameters(512, 2, 320, 1 / 2) if kind == "adapter" else None,
        ),
        1,
    )
    with pretended() as counts:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if kind == "adapter":
            made = on_device(compute_in(add_adapter(made, LORA, POLICY, seed=0), DTYPES[number]))
        else:
            made = compute_in(on_device(made), DTYPES[number])
        found = peak_of_a_micro_batch(made, counts)
    assert ("gradients of embeddings" in planned) == (kind != "adapter")
    assert found == pytest.approx(
        sum(planned[role] for role in TRANSIENT & planned.keys()), rel=0.1
    )


def test_frozen_models():
    with pretended():
        before = alive()
        made = on_device(compute_in(freeze(whole()), torch.bfloat16))
        held = alive() - before
        del made
    planned = training_memory(work(frozen=1), 1)["reference, reward model"]
    assert held == pytest.approx(planned, rel=0.1)


def decoding(made, counts):
    """The bytes of a decoder's weights and cache, and what drawing a token needs for a moment."""
    make_decoder(made, 44)  # compares both forwards, once
    before = alive()
    decoder = make_decoder(made, 44)
    weights = alive() - before
    logits = decoder.prefill([[5, 6, 7, 8]] * ROWS, 1)
    cache = alive() - before - weights - logits.nbytes
    before = alive()
    counts.reset_peak()
    draw(logits, Sampling(max_new_tokens=40), torch.full((ROWS,), 0.5, device=CUDA))
    return weights, cache, counts.peak - before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", SLOW_NF4])
def test_decoder_cache_and_drawing(kind):
    planned = native_generation(KINDS[kind], GPUS["h100"], 1).memory
    with pretended() as counts:
        made = policy(kind)
        with torch.inference_mode():  # as a generator does
            weights, cache, drawing = decoding(made, counts)
    # what turns queries and keys, and the order of their rows in each joined matrix; no role of its own
    tables = 2 * 4 * 52 * 8 * 16 + 4 * (128 + 2 * 64) * 8
    assert weights == pytest.approx(decoder_weights(KINDS[kind]), rel=0.1, abs=tables)
    assert cache == pytest.approx(planned["keys and values"], rel=0.1)
    assert drawing == pytest.approx(planned["drawing tokens"], rel=0.1)


# --- by hand


def test_a_cache_has_powers_of_two():
    assert [bucket(n, 8) for n in (0.5, 8.0, 9.0, 33.0)] == [8, 8, 16, 64]
    copies = native_generation(work(rows=9, longest=300), GPUS["h100"], 1)
    assert copies.rows == 9
    # 16 slots of 512 columns; 4 layers, 64 numbers of 2 bytes for keys and as many for values
    assert copies.memory["keys and values"] == 16 * 512 * 4 * 2 * 64 * 2


def test_a_sharded_policy_is_sampled_from_with_a_whole_copy():
    alone, many = (native_generation(work(), GPUS["h100"], ranks) for ranks in (1, 8))
    assert many.memory["weights"] == alone.memory["weights"] + 2 * work().parameters
    assert many.rows == ROWS / 8
    big = work(parameters=60_000_000_000)
    with pytest.raises(CannotFit, match="generation: 120 GB of weights"):
        native_generation(big, GPUS["h100"], 1)


def test_the_peak_of_loading():
    """Alone, the last frozen model comes in float32; in parts, one tensor comes whole."""
    plain = work(learners=2, frozen=2)
    size = plain.parameters
    assert load_peak(plain, 1) == (2 * 4 + 2 * 2 + 2) * size
    assert load_peak(work(), 1) == 4 * size
    assert load_peak(KINDS["lora"], 1) == 4 * size
    assert load_peak(plain, 8) == 12 * size / 8 + 4 * VOCABULARY * 128
    assert load_peak(KINDS["nf4"], 1) < 2 * size
    between = memory_between_updates(training_memory(plain, 1), plain)
    assert between == (2 * 12 + 2 * 2) * size, "gradients are gone"
