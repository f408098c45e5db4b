"""One GPU: generation and training steps of Qwen2.5 shapes in bf16, against transformers and
against the machine's limits.

    python benchmarks/gpu.py [--shapes 0.5b,1.5b,7b] [--out results/gpu.json]
    python benchmarks/gpu.py --device cpu --shapes tiny        # the same code, small: what a machine without a GPU can check

Needs torch ≥ 2.11, transformers ≥ 5.17 and quartet's own dependencies; weights are random, nothing
is downloaded. Generation: 64 prompts × 8 samples, answers with a mean of a third of 512 tokens. The
bandwidth limit of a decoding step is the time to read the weights and the keys and values once. MFU
counts 6 operations per weight and token trained, 2 per token scored.
"""

import argparse
import copy
import dataclasses
import functools
import json
import time
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    StoppingCriteriaList,
)

import ours
import workload as w
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.sampler import Sampler
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.models.actor_critic import Separate, freeze
from quartet.models.heads import ScalarModel
from quartet.models.trunk import checkpoint_blocks
from quartet.planning.memory import Sizes, activation_bytes
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.training.learner import Learner
from quartet.training.optim import Optim


@dataclasses.dataclass(frozen=True)
class Qwen:
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

    def config(self, **more):
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
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads)


SHAPES = {
    "tiny": Qwen(64, 2, 4, 2, 128, vocabulary=512, limit=24, prompts=4, samples=2, training_rows=4),
    "0.5b": Qwen(896, 24, 14, 2, 4864),
    "1.5b": Qwen(1536, 28, 12, 2, 8960),
    "7b": Qwen(3584, 28, 28, 4, 18944, vocabulary=152_064, tied=False, training_rows=16),
}


class Clock:
    """Seconds of a piece of work, the device's queue included."""

    def __init__(self, device):
        self.device = device

    def __call__(self, work):
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def limits(device, clock):
    """What a plain bf16 product and a plain copy reach."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    product = min(clock(lambda: a @ b)[0] for _ in range(8))
    copied = min(clock(lambda: y.copy_(x))[0] for _ in range(8))
    return {"tflops": 2 * n**3 / product / 1e12, "gb_s": 2 * x.numel() / copied / 1e9}


def asked_of(shape):
    size = w.Size(
        shape.hidden,
        shape.layers,
        shape.heads,
        shape.vocabulary,
        shape.limit,
        shape.prompts * shape.samples,
    )
    return ours.prompts(size, shape.prompts, 64, 192), size


def generation(shape, model, device, clock, reach):
    asked, size = asked_of(shape)
    rows = shape.prompts * shape.samples
    made = ours.generator(model, size, rows)
    made.lengths = made.lengths.to(device)
    sampling = Sampling(max_new_tokens=shape.limit)
    clock(
        lambda: made.generate(
            asked[:2], dataclasses.replace(sampling, max_new_tokens=8), shape.samples
        )
    )
    seconds, rollouts = clock(lambda: made.generate(asked, sampling, shape.samples))
    tokens = sum(len(r.response_ids) for r in rollouts)
    # Each step reads the weights once, and the keys and values of the rows that are left.
    lengths = torch.tensor([len(r.response_ids) for r in rollouts])
    prompt = torch.tensor([len(r.prompt.ids) for r in rollouts])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    read = 0.0
    for t in range(int(lengths.max())):
        left = lengths > t
        read += weights + float((prompt[left] + t).sum()) * shape.kv_bytes_per_token
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "bandwidth_limit_s": read / reach["gb_s"] / 1e9,
        "share_of_limit": read / reach["gb_s"] / 1e9 / seconds,
        "transformers_s": theirs(shape, model, asked, lengths.tolist(), device, clock),
    }


def theirs(shape, model, asked, lengths, device, clock):
    """transformers' generate, every row until the last has ended."""
    from peers import StopAt, left_padded

    ids, mask = left_padded([list(p.ids) for p in asked for _ in range(shape.samples)])
    stop = StopAt(lengths, ids.shape[1])
    stop.lengths = stop.lengths.to(device)
    settings = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
        "pad_token_id": w.PAD,
    }

    def work():
        with torch.no_grad():
            return model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=shape.limit,
                stopping_criteria=StoppingCriteriaList([stop]),
                **settings,
            )

    return clock(work)[0]


def continuous(shape, model, clock):
    """transformers' continuous batching, everybody writing the mean number of tokens."""
    from transformers import GenerationConfig

    asked, size = asked_of(shape)
    mean = round(sum(w.response_lengths(size.limit, size.rows)) / size.rows)
    config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=mean, eos_token_id=-1, pad_token_id=w.PAD
    )
    rows = [list(p.ids) for p in asked for _ in range(shape.samples)]
    seconds, _ = clock(
        lambda: model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
    )
    return {"seconds": seconds, "tokens_per_s": mean * len(rows) / seconds}


def step(shape, model, device, clock, reach, preset):
    """Two steps of PPO or GRPO, phase by phase; the second counts."""
    algorithm = ALGORITHMS[preset]
    asked, size = asked_of(shape)
    samples = shape.samples if algorithm.needs_group else 1
    prompts = asked[: max(shape.training_rows // samples, 1)]
    rows = len(prompts) * samples
    actor = checkpoint_blocks(copy.deepcopy(model).requires_grad_(True))
    critic = None
    if algorithm.needs_critic:
        torch.manual_seed(1)
        classifier = AutoModelForSequenceClassification.from_config(
            shape.config(num_labels=1), dtype=model.dtype
        )
        critic = ScalarModel(checkpoint_blocks(classifier.to(device)))
    reference = freeze(model) if algorithm.needs_reference else None
    judge = TextReward("length", lambda _, response: float(len(response)))
    rewards = [
        Weighted(
            judge if critic is None else ModelReward(freeze(copy.deepcopy(critic)), 16_384), 1.0
        )
    ]
    epochs = 1 if critic is None else 4
    tokens_per_pass = 16_384
    sampling = Sampling(max_new_tokens=shape.limit)
    learner = Learner(
        Separate(actor, critic),
        reference,
        Optim(lr=1e-6, epochs=epochs),
        sampling,
        steps=2,
        micro_batch_tokens=tokens_per_pass,
    )
    made = ours.generator(actor, size, rows)
    made.lengths = made.lengths.to(device)
    collector = Collector(Sampler(prompts, len(prompts), 0), made, rewards, samples)
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = {}
        took["generate and reward"], collected = clock(
            lambda: collector.collect(algorithm, sampling)
        )
        took["score"], batch = clock(
            functools.partial(learner.score, collected.rollouts, algorithm)
        )
        took["update"], _ = clock(
            functools.partial(learner.update, algorithm.experience(batch), algorithm)
        )
        made.load_weights(learner.weights())
    tokens = int(batch.lengths.sum())
    parameters = sum(p.numel() for p in actor.parameters())
    models = 1 if critic is None else 2
    trained = 6 * parameters * tokens * epochs * models
    sizes = Sizes(shape.hidden, shape.layers, shape.intermediate, shape.kv_heads / shape.heads)
    frozen = parameters * 2 * ((reference is not None) + (critic is not None))
    predicted = frozen + models * (
        parameters * 8 + activation_bytes(sizes, True) / 2 * min(tokens, tokens_per_pass)
    )
    return {
        "phases": took,
        "tokens": tokens,
        "mfu_update": trained / took["update"] / reach["tflops"] / 1e12,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "predicted_gb": predicted / 1e9,
        "sampler_agrees": learner.sampler_agrees,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="0.5b,1.5b,7b")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    device = torch.device(a.device)
    clock = Clock(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = {
        "device": name,
        "torch": torch.__version__,
        "limits": limits(device, clock),
        "shapes": {},
    }
    print(json.dumps({k: found[k] for k in ("device", "torch", "limits")}), flush=True)
    for shape_name in a.shapes.split(","):
        shape, rows = SHAPES[shape_name], {}
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).eval()
        works = {
            "generation": lambda: generation(shape, model, device, clock, found["limits"]),  # noqa: B023
            "continuous batching": lambda: continuous(shape, model, clock),  # noqa: B023
            "ppo": lambda: step(shape, model, device, clock, found["limits"], "ppo"),  # noqa: B023
            "grpo": lambda: step(shape, model, device, clock, found["limits"], "grpo"),  # noqa: B023
        }
        if device.type != "cuda":
            del works["continuous batching"]  # it wants all the memory of a CPU's machine
        for what, work in works.items():
            try:
                rows[what] = work()
            except (
                RuntimeError,
                ValueError,
                AttributeError,
            ) as error:  # one piece that fails leaves the others standing
                rows[what] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            print(shape_name, what, json.dumps(rows[what]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        found["shapes"][shape_name] = rows
        if a.out:
            a.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
