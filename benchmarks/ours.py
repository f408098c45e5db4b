"""Quartet's side of the comparisons, through the same objects that `quartet run` makes.

python benchmarks/ours.py WORK SIZE [--repeats N]
"""

import argparse
import functools
import itertools
import time

import torch

import workload as w
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.team import micro_batches
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.loops.reward_model import reward_model as reward_model_loop
from quartet.loops.rl import rl
from quartet.loops.sft import sft as sft_loop
from quartet.models import llama
from quartet.models.actor_critic import Separate, freeze
from quartet.models.heads import ScalarModel
from quartet.models.language_model import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.runtime.machine import keep_freed_memory
from quartet.training.learner import Learner
from quartet.training.optim import Descent, Optim, Optimizer

MICRO_BATCH_TOKENS = 2048


class EndsAsTold(NativeGenerator):
    """Answers end where the workload says, with the end of sequence."""

    lengths: torch.Tensor

    def _ends(self, tokens, rows, written):
        over = written >= self.lengths[rows]
        tokens[over] = w.EOS
        return over


def generator(model, size, count):
    made = EndsAsTold(model, w.tokenizer(size), frozenset({w.EOS}), seed=0)
    made.lengths = torch.tensor(w.response_lengths(size.limit, count))
    return made


def prompts(size, count, *bounds):
    return [
        Prompt(f"p{i}", tuple(ids), w.text(ids))
        for i, ids in enumerate(w.prompts(size, count, *bounds))
    ]


def generation(size, repeats, copies=1):
    made = generator(w.language_model(size), size, size.rows)
    asked = prompts(size, size.rows // copies, *((16, 48) if copies == 1 else (64, 128)))
    found = []

    def work():
        found[:] = made.generate(asked, Sampling(max_new_tokens=size.limit), copies)

    seconds = w.timed(work, repeats)
    w.report(seconds=seconds, tokens=sum(len(r.response_ids) for r in found))


def steps_of(progress, repeats):
    """Seconds between the results of a loop, the first left out."""
    stamps = [time.perf_counter() for _ in progress]
    return [b - a for a, b in itertools.pairwise(stamps)][:repeats]


def ppo(size, repeats):
    rows = size.rows // 2
    actor = w.language_model(size)
    critic, judge = (ScalarModel(w.scalar_model(size, seed)) for seed in (2, 1))
    optim = Optim(lr=1e-5, critic_lr=1e-5, epochs=4, minibatches=1)
    sampling = Sampling(max_new_tokens=size.limit)
    learner = Learner(
        Separate(actor, critic), freeze(w.language_model(size)), optim, sampling, steps=repeats + 1
    )
    asked = Sampler(prompts(size, rows), rows, 0)
    rewards = [Weighted(ModelReward(freeze(judge), MICRO_BATCH_TOKENS), 1.0)]
    steps = rl(Collector(asked, generator(actor, size, rows), rewards), learner, ALGORITHMS["ppo"])
    w.report(
        seconds=steps_of(steps, repeats),
        tokens=sum(w.response_lengths(size.limit, rows)),
        optimizer_steps=4,
    )


def grpo(size, repeats, preset="grpo"):
    samples = 8
    actor = w.language_model(size)
    algorithm = ALGORITHMS[preset]
    sampling, optim = Sampling(max_new_tokens=size.limit), Optim(lr=1e-5, epochs=1)
    learner = Learner(
        Separate(actor, None), freeze(w.language_model(size)), optim, sampling, steps=repeats + 1
    )
    rewards = [Weighted(TextReward("length", lambda _, response: float(len(response))), 1.0)]
    asked = Sampler(prompts(size, size.rows // samples), size.rows // samples, 0)
    steps = rl(
        Collector(asked, generator(actor, size, size.rows), rewards, samples), learner, algorithm
    )
    w.report(
        seconds=steps_of(steps, repeats),
        tokens=sum(w.response_lengths(size.limit, size.rows)),
        optimizer_steps=1,
    )


def sft(size, repeats):
    rows, model = size.rows // 2, w.language_model(size)
    pairs = list(zip(w.prompts(size, rows), w.responses(size, rows), strict=True))
    data = Sampler(
        [Demonstration(str(i), tuple(p), tuple(a)) for i, (p, a) in enumerate(pairs)], rows, 0
    )
    steps = sft_loop(
        model,
        data,
        Optimizer(list(model.parameters()), Descent(), 100),
        repeats + 1,
        MICRO_BATCH_TOKENS,
    )
    w.report(
        seconds=steps_of(steps, repeats),
        tokens=sum(len(p) + len(a) for p, a in pairs),
        optimizer_steps=1,
    )


def reward_model(size, repeats):
    from quartet.algorithms.preference import LastTokenLoss

    rows, model = size.rows // 4, ScalarModel(w.scalar_model(size))
    triples = list(
        zip(w.prompts(size, rows), w.responses(size, rows), w.responses(size, rows, 4), strict=True)
    )
    data = Sampler(
        [Comparison(str(i), *map(tuple, triple)) for i, triple in enumerate(triples)], rows, 0
    )
    optimizer = Optimizer(list(model.parameters()), Descent(), 100)
    steps = reward_model_loop(
        model, data, LastTokenLoss(), optimizer, repeats + 1, MICRO_BATCH_TOKENS
    )
    tokens = sum(2 * len(p) + len(a) + len(b) for p, a, b in triples)
    w.report(seconds=steps_of(steps, repeats), tokens=tokens, optimizer_steps=1)


def reading(size, repeats, train, padded):
    """Scoring or training on the log-probs of answers: real tokens, or the rectangle that holds
    them, by transformers' own forward."""
    model = w.language_model(size)
    pairs = list(zip(w.prompts(size, size.rows), w.responses(size, size.rows), strict=True))
    tokens, lengths = right_pad([(*p, *a) for p, a in pairs])
    mask = response_mask(torch.tensor([len(p) for p, _ in pairs]), lengths, tokens.shape[1])
    if padded:
        llama._WRITTEN_OUT[model.base_model] = False
        pieces = list(torch.arange(size.rows).split(max(MICRO_BATCH_TOKENS // tokens.shape[1], 1)))
    else:
        pieces = [
            torch.tensor(rows) for rows in micro_batches(lengths.tolist(), MICRO_BATCH_TOKENS)
        ]

    def score():
        with torch.no_grad():
            for rows in pieces:
                width = tokens.shape[1] if padded else int(lengths[rows].max())
                masked_logprobs(model, tokens[rows, :width], mask[rows, :width])

    def learn():
        for rows in pieces:
            width = tokens.shape[1] if padded else int(lengths[rows].max())
            masked_logprobs(model, tokens[rows, :width], mask[rows, :width]).sum().backward()
        model.zero_grad()

    w.report(
        seconds=w.timed(learn if train else score, repeats),
        tokens=int(lengths.sum()),
        padded=tokens.numel(),
    )


def machine(_, repeats):
    """What a plain product and a plain copy reach here."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, y = torch.randn(2**26), torch.empty(2**26)
    product = min(w.timed(lambda: torch.mm(a, b), 5 * repeats))
    copy = min(w.timed(lambda: y.copy_(x), 5 * repeats))
    w.report(
        seconds=[product],
        gflops=2 * 2048**3 / product / 1e9,
        copy_gb_s=2 * x.numel() * 4 / copy / 1e9,
        tokens=0,
    )


WORKS = {
    "machine": machine,
    "generation": generation,
    "group": functools.partial(generation, copies=8),
    "ppo": ppo,
    "grpo": grpo,
    "rloo": functools.partial(grpo, preset="rloo"),
    "sft": sft,
    "reward_model": reward_model,
    "scoring": functools.partial(reading, train=False, padded=False),
    "scoring_padded": functools.partial(reading, train=False, padded=True),
    "training": functools.partial(reading, train=True, padded=False),
    "training_padded": functools.partial(reading, train=True, padded=True),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("size", choices=sorted(w.SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    keep_freed_memory()
    WORKS[a.work](w.SIZES[a.size], a.repeats)
