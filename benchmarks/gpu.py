"""One GPU: generation and training steps of Qwen2.5 shapes in bf16, against transformers and
against the machine's limits.

    python benchmarks/gpu.py [--shapes 0.5b,1.5b,7b] [--out results/gpu.json]
    python benchmarks/gpu.py --device cpu --shapes tiny        # the same code without a GPU

With --out, what was measured is written after each work, and a command that was stopped goes on
behind it; what failed, of which the traceback is printed, is measured again with --again. On a
machine that is lent for minutes, in this order:

    timeout 300 pytest -v tests/test_gpu.py                                       # does it run?
    timeout 240 python benchmarks/gpu.py --shapes 0.5b --out results/gpu.json     # and all presets
    timeout 540 python benchmarks/gpu.py --shapes 0.5b,1.5b,7b --out results/gpu.json

Needs torch ≥ 2.11, transformers ≥ 5.17 and quartet's own dependencies; weights are random, nothing
is downloaded. Generation: 64 prompts × 8 samples, answers with a mean of a third of 512 tokens. The
bandwidth limit of a decoding step is the time to read the weights and the keys and values once. MFU
counts 6 operations per weight and token trained; a prompt that the responses of a group share is
computed once, and counts once.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

import ours
import workload as w
from attempts import attempt, earlier, is_lost
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.update import TrustRegion
from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout
from quartet.generation import slots
from quartet.generation.decoders import make_decoder
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.models.actor_critic import Separate, freeze
from quartet.models.forward import masked_logprobs
from quartet.models.heads import ScalarModel
from quartet.models.padding import response_mask, right_pad
from quartet.models.precision import compute_in
from quartet.models.trunk import checkpoint_blocks
from quartet.planning.gpu_memory import (
    Workload,
    memory_between_updates,
    native_generation,
    training_memory,
)
from quartet.planning.hardware import GPUS, CannotFit
from quartet.planning.memory import Sizes
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Reward, Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.tensors import Tensor
from quartet.training.learner import Learner
from quartet.training.optim import Optim

TOKENS_PER_PASS = 16_384
Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Qwen:
    """The shape of a Qwen2 model, and how much it is asked to do."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 151_936
    tied: bool = True
    limit: int = 512
    prompts: int = 64
    samples: int = 8
    training_rows: int = 64

    def config(self, **more: Any) -> Any:
        return AutoConfig.for_model(
            "qwen2",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=2048,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=w.EOS,
            pad_token_id=w.PAD,
            **more,
        )

    @property
    def size(self) -> w.Size:
        rows = self.prompts * self.samples
        return w.Size(self.hidden, self.layers, self.heads, self.vocabulary, self.limit, rows)

    @property
    def asked(self) -> list[Prompt]:
        return ours.prompts(self.size, self.prompts, 64, 192)

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads)


SHAPES = {
    "tiny": Qwen(64, 2, 4, 2, 128, vocabulary=512, limit=24, prompts=4, samples=2, training_rows=4),
    "0.5b": Qwen(896, 24, 14, 2, 4864),
    "1.5b": Qwen(1536, 28, 12, 2, 8960),
    "7b": Qwen(3584, 28, 28, 4, 18944, vocabulary=152_064, tied=False, training_rows=16),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device that is measured, and what it reaches in a plain bf16 product and a plain copy."""

    device: torch.device
    tflops: float
    gb_s: float

    @classmethod
    def measured(cls, device: torch.device) -> "Machine":
        n = 8192 if device.type == "cuda" else 256
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        x = torch.empty(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        product = min(seconds_of(lambda: a @ b, device)[0] for _ in range(8))
        copied = min(seconds_of(lambda: y.copy_(x), device)[0] for _ in range(8))
        return cls(device, 2 * n**3 / product / 1e12, 2 * x.numel() / copied / 1e9)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        return seconds_of(work, self.device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a piece of work, the device's queue included, and its result."""
    wait_for(device)
    started = time.perf_counter()
    result = work()
    wait_for(device)
    return time.perf_counter() - started, result


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def generation(shape: Qwen, model: Any, machine: Machine) -> Numbers:
    """Measure generation by Quartet and by transformers against the limit of the bandwidth."""
    asked, size = shape.asked, shape.size
    generator = ours.FixedLengthGenerator(model, size, size.rows)
    sampling = Sampling(max_new_tokens=shape.limit)
    short = dataclasses.replace(sampling, max_new_tokens=8)
    machine.timed(lambda: generator.generate(asked[:2], short, shape.samples))
    seconds, rollouts = machine.timed(lambda: generator.generate(asked, sampling, shape.samples))
    lengths = [len(r.response_ids) for r in rollouts]
    limit = bytes_read(shape, model, [len(r.prompt.ids) for r in rollouts], lengths)
    limit_seconds = limit / machine.gb_s / 1e9
    decoder = type(make_decoder(model, 64)).__name__
    rows = [list(p.ids) for p in asked for _ in range(shape.samples)]
    theirs, _ = machine.timed(lambda: w.transformers_generate(model, rows, lengths, shape.limit))
    return {
        "decoder": decoder,
        "cuda_graphs": decoder == "SlotDecoder" and not slots._NOT_RECORDED,
        "tokens": sum(lengths),
        "seconds": seconds,
        "tokens_per_s": sum(lengths) / seconds,
        "bandwidth_limit_s": limit_seconds,
        "share_of_limit": limit_seconds / seconds,
        "transformers_s": theirs,
    }


def bytes_read(shape: Qwen, model: Any, prompts: list[int], responses: list[int]) -> float:
    """Return the bytes that decoding has to read: each step the weights once, and the keys and
    values of the rows that are left."""
    prompt, response = torch.tensor(prompts), torch.tensor(responses)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not shape.tied:  # of a table of embeddings that is no head, a row per token is read
        weights -= model.get_input_embeddings().weight.nbytes
    total = 0.0
    for t in range(int(response.max())):
        left = response > t
        total += weights + float((prompt[left] + t).sum()) * shape.kv_bytes_per_token
    return total


def continuous(shape: Qwen, model: Any, machine: Machine) -> Numbers:
    """Measure transformers' continuous batching; every row writes the mean number of tokens."""
    if machine.device.type != "cuda":
        return {"skipped": "it takes all the memory of a machine without a GPU"}
    size = shape.size
    mean = round(sum(w.response_lengths(size.limit, size.rows)) / size.rows)
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=mean, eos_token_id=-1, pad_token_id=w.PAD
    )
    rows = [list(p.ids) for p in shape.asked for _ in range(shape.samples)]
    seconds, answers = machine.timed(
        lambda: model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
    )
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    if tokens != mean * len(rows):  # it returns what it has where its thread fails
        raise RuntimeError(f"{tokens:,} tokens of {mean * len(rows):,} were generated")
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def step(shape: Qwen, model: Any, machine: Machine, preset: str) -> Numbers:
    """Measure two steps of PPO or GRPO, phase by phase; the second counts."""
    algorithm = ALGORITHMS[preset]
    if too_large := why_too_large(shape, model, algorithm, machine.device):
        return {"skipped": too_large}
    learner = make_learner(shape, model, algorithm, machine.device)
    collector = make_collector(shape, learner, algorithm)
    for _ in range(2):
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        phases = {}
        phases["generate and reward"], collected = machine.timed(
            functools.partial(collector.collect, algorithm, learner.sampling)
        )
        phases["score"], batch = machine.timed(
            functools.partial(learner.score, collected.rollouts, algorithm)
        )
        phases["update"], _ = machine.timed(
            functools.partial(learner.update, algorithm.experience(batch), algorithm)
        )
        collector.load_weights(learner.weights())
    tokens = int(batch.lengths.sum()) - repeated_tokens(collected.rollouts)
    parameters = sum(p.numel() for p in learner.models.actor.parameters())
    models = 1 + algorithm.needs_critic
    operations = 6 * parameters * tokens * learner.optim.epochs * models
    on_gpu = machine.device.type == "cuda"
    return {
        "phases": phases,
        "tokens": tokens,
        "mfu_update": operations / phases["update"] / machine.tflops / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "predicted_gb": predicted_gb(
            shape, algorithm, parameters, len(collected.rollouts), machine.device
        ),
        "sampler_agrees": learner.sampler_agrees,
    }


def repeated_tokens(rollouts: Sequence[Rollout]) -> int:
    """Return the tokens of prompts that rows take from an earlier row: all but the last."""
    rows = Counter(r.prompt.ids for r in rollouts)
    return sum((count - 1) * (len(ids) - 1) for ids, count in rows.items())


def make_learner(shape: Qwen, model: Any, algorithm: Algorithm, device: torch.device) -> Learner:
    """Return a learner whose actor is a copy of the model, with float32 master weights, and whose
    reference is the model."""
    actor = checkpoint_blocks(copy.deepcopy(model).float().requires_grad_(True))
    compute_in(actor, torch.bfloat16)
    critic = None
    if algorithm.needs_critic:
        torch.manual_seed(1)
        with device:  # seven billion random numbers take minutes on a CPU
            classifier = AutoModelForSequenceClassification.from_config(
                shape.config(num_labels=1), dtype=torch.float32
            )
        critic = ScalarModel(checkpoint_blocks(classifier)).compute_in(torch.bfloat16)
    return Learner(
        Separate(actor, critic),
        freeze(model) if algorithm.needs_reference else None,
        Optim(lr=1e-6, epochs=4 if algorithm.needs_critic else 1),
        Sampling(max_new_tokens=shape.limit),
        steps=2,
        micro_batch_tokens=TOKENS_PER_PASS,
    )


def make_collector(shape: Qwen, learner: Learner, algorithm: Algorithm) -> Collector:
    """Return a collector that scores by a copy of the critic, or by length where there is none."""
    samples = shape.samples if algorithm.needs_group else 1
    prompts = shape.asked[: max(shape.training_rows // samples, 1)]
    models = learner.models
    assert isinstance(models, Separate)
    reward: Reward = TextReward("length", lambda _, response: float(len(response)))
    if models.critic is not None:
        reward = ModelReward(freeze(copy.deepcopy(models.critic)), TOKENS_PER_PASS)
    return Collector(
        Sampler(prompts, len(prompts), 0),
        ours.FixedLengthGenerator(models.actor, shape.size, len(prompts) * samples),
        [Weighted(reward, 1.0)],
        samples,
    )


def predicted_gb(
    shape: Qwen, algorithm: Algorithm, parameters: int, rows: int, device: torch.device
) -> dict[str, float | None]:
    """Return the peaks of an update and of generation by the formulas of `quartet plan --on`;
    None where the plan says that it does not fit. On a CPU, those of an H100."""
    sizes = Sizes(shape.hidden, shape.layers, shape.intermediate, shape.kv_heads / shape.heads)
    prompt = sum(len(p.ids) for p in shape.asked) / shape.prompts
    response = sum(w.response_lengths(shape.limit, rows)) / rows
    work = Workload(
        parameters=parameters,
        model=sizes,
        beside=parameters - int(sizes.matrix_parameters),
        learners=1 + algorithm.needs_critic,
        frozen=1 + algorithm.needs_critic,  # the model that the actor is a copy of is kept anyway
        rows=rows,
        prompt=prompt,
        response=response,
        longest=shape.limit,
        epochs=1,
        micro_tokens=min(int(rows * (prompt + response)), TOKENS_PER_PASS),
        checkpointing=True,
        vocabulary=shape.vocabulary,
    )
    update = training_memory(work, 1)
    between = memory_between_updates(update, work)
    gpu = GPUS["h100"]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        gpu = dataclasses.replace(gpu, memory=memory)
    generation = None
    with contextlib.suppress(CannotFit):
        held = native_generation(work, gpu, 1, between).memory
        generation = (between + sum(held.values())) / 1e9
    return {"update": sum(update.values()) / 1e9, "generation": generation}


def why_too_large(
    shape: Qwen, model: Any, algorithm: Algorithm, device: torch.device
) -> str | None:
    """Return a sentence where the weights, gradients and moments alone are more than the GPU has:
    to find that out takes minutes. None where they fit, and on a CPU."""
    if device.type != "cuda":
        return None
    parameters = sum(p.numel() for p in model.parameters())
    needed = predicted_gb(shape, algorithm, parameters, shape.training_rows, device)["update"]
    there = torch.cuda.get_device_properties(device).total_memory / 1e9
    if needed is None or needed < there:
        return None
    return f"an update takes {needed:.0f} GB by the plan, and the GPU has {there:.0f}"


@torch.no_grad()
def correctness(shape: Qwen, model: Any, machine: Machine) -> Numbers:
    """Compare log-probs of the same tokens: ours and transformers', in bf16 and in float32; and
    those of the sampler with the learner's."""
    del machine
    asked, size = shape.asked[:4], shape.size
    generator = NativeGenerator(model, w.tokenizer(size), frozenset({w.EOS}), seed=0)
    rollouts = generator.generate(asked, Sampling(max_new_tokens=min(shape.limit, 64)))
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts])
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts])
    mask = response_mask(starts, lengths, tokens.shape[1])
    exact = copy.deepcopy(model).float()
    found = {
        "ours bf16": masked_logprobs(model, tokens, mask)[mask],
        "transformers bf16": transformers_logprobs(model, tokens)[mask[:, 1:]],
        "ours fp32": masked_logprobs(exact, tokens, mask)[mask],
    }
    truth = transformers_logprobs(exact, tokens)[mask[:, 1:]]
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    errors = {name: (x.cpu() - truth.cpu()).abs() for name, x in found.items()}
    errors["sampler against learner"] = (found["ours bf16"].cpu() - sampled).abs()
    return {n: {"mean": float(e.mean()), "max": float(e.max())} for n, e in errors.items()}


def transformers_logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Return the log-probs of the tokens of right-padded rows, but for the first, [B, T - 1]."""
    there = tokens.to(model.device)
    logits = model(input_ids=there, use_cache=False).logits[:, :-1].float()
    chosen: Tensor = logits.log_softmax(-1).gather(-1, there[:, 1:, None])[..., 0]
    return chosen


def presets(machine: Machine) -> Numbers:
    """Measure two steps of every first-order method, of a tiny model, as `step` does."""
    tiny = SHAPES["tiny"]
    made = make_model(tiny, machine.device)
    first_order = [n for n, a in ALGORITHMS.items() if not isinstance(a.update, TrustRegion)]
    return {
        name: attempt(functools.partial(step, preset=name), tiny, made, machine)
        for name in first_order
    }


def waits(shape: Qwen, model: Any, machine: Machine) -> Numbers:
    """Count how often the host waits for the device, as torch sees it: per decoded token, and per
    update of a GRPO step."""
    if machine.device.type != "cuda":
        return {"skipped": "only CUDA tells"}
    algorithm = ALGORITHMS["grpo"]
    learner = make_learner(shape, model, algorithm, machine.device)
    collector = make_collector(shape, learner, algorithm)

    def counted(work: Callable[[], Any]) -> tuple[int, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(w.message) for w in caught), result

    for _ in range(2):  # the first step also checks and captures
        collecting, collected = counted(lambda: collector.collect(algorithm, learner.sampling))
        batch = learner.score(collected.rollouts, algorithm)
        experience = algorithm.experience(batch)
        updating, _ = counted(functools.partial(learner.update, experience, algorithm))
        collector.load_weights(learner.weights())
    longest = max(len(r.response_ids) for r in collected.rollouts)
    return {"per_decoded_token": collecting / longest, "per_update": updating}


WORKS: dict[str, Callable[[Qwen, Any, Machine], Numbers]] = {
    "correctness": correctness,
    "generation": generation,
    "ppo": functools.partial(step, preset="ppo"),
    "grpo": functools.partial(step, preset="grpo"),
    "waits": waits,
    "continuous batching": continuous,
}
"""What is measured for each shape. Continuous batching comes last: it gives the model another kind
of attention meanwhile, and might leave it there."""


def make_model(shape: Qwen, device: torch.device) -> Any:
    """Return a bf16 model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="0.5b,1.5b,7b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="measure again what failed")
    arguments = parser.parse_args()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results = earlier(arguments.out, name_of_device)
    machine = Machine.measured(device)
    results |= {
        "device": name_of_device,
        "torch": torch.__version__,
        "limits": {"tflops": machine.tflops, "gb_s": machine.gb_s},
    }
    print(json.dumps({k: results[k] for k in ("device", "torch", "limits")}), flush=True)

    def keep(*what: str) -> None:
        """Print what was measured last, and write all that was measured so far."""
        print(*what, json.dumps(functools.reduce(dict.__getitem__, what, results)), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if is_lost(device):
            raise SystemExit(f"{' '.join(what)}: the GPU refuses all work since. Run this again.")

    for name in arguments.shapes.split(","):
        measured = results["shapes"].setdefault(name, {})
        if arguments.again:
            measured = {what: n for what, n in measured.items() if "failed" not in n}
            results["shapes"][name] = measured
        left = [what for what in WORKS if what not in measured]
        model = make_model(SHAPES[name], device) if left else None
        for what in left:
            measured[what] = attempt(WORKS[what], SHAPES[name], model, machine)
            keep("shapes", name, what)
        del model
        if "presets" not in results:
            results["presets"] = presets(machine)
            keep("presets")


if __name__ == "__main__":
    main()
