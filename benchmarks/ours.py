"""Quartet's side of the comparisons, through the same objects that `quartet run` makes.

python benchmarks/ours.py WORK SIZE [--repeats N]
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import workload as w
from quartet.algorithms.preference import LastTokenLoss
from quartet.algorithms.presets import ALGORITHMS
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.balance import micro_batches
from quartet.experience import Prompt
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Drawn, Sampling
from quartet.io.heap import keep_freed_memory
from quartet.loops.collect import Collector
from quartet.loops.reward_model import reward_model as reward_model_loop
from quartet.loops.rl import rl
from quartet.loops.sft import sft as sft_loop
from quartet.models import fused
from quartet.models.actor_critic import Separate, freeze
from quartet.models.adapters import CRITIC, POLICY, REWARD, AdapterView, add_adapter
from quartet.models.forward import masked_logprobs
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import load_model
from quartet.models.lora import Lora
from quartet.models.padding import response_mask, right_pad
from quartet.models.protocols import CausalModel
from quartet.planning.memory import (
    Sizes,
    activation_bytes,
    block_bytes,
    cpu_micro_batch,
    folder_sizes,
)
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.tensors import Tensor
from quartet.training.budget import Budget
from quartet.training.learner import Learner
from quartet.training.optim import Optim, Optimizer, OptimizerConfig
from workload import Measurement, Size

LORA = Lora(rank=w.LORA_RANK, alpha=w.LORA_ALPHA)


def sizes_of(size: Size) -> Sizes:
    return folder_sizes(size.folder) or Sizes(size.hidden, size.layers, 3 * size.hidden)


def micro_batch_tokens(size: Size) -> int:
    """Return the tokens of a micro-batch that a run would take."""
    return cpu_micro_batch(activation_bytes(sizes_of(size), checkpointing=False))


def scoring_tokens(size: Size) -> int:
    """Return the tokens of a pass without a gradient that a run would take."""
    return cpu_micro_batch(block_bytes(sizes_of(size)))


class FixedLengthGenerator(NativeGenerator):
    """A generator whose responses end at given lengths, with the end of sequence."""

    def __init__(self, model: CausalModel, size: Size, count: int) -> None:
        super().__init__(model, w.tokenizer(size), frozenset({size.eos}), seed=0)
        self.eos = size.eos
        self.lengths = torch.tensor(size.lengths(count), device=self.stop_ids.device)

    def _draw(
        self,
        logits: Tensor,
        sampling: Sampling,
        noise: Tensor,
        rows: Tensor,
        lengths: Tensor,
    ) -> Drawn:
        """Draw; where the response has its length, take the end of sequence, and where it has not,
        another token in its place. Their log-probs are the policy's own: those of two tokens differ
        as their logits do. Rows that go on from within responses (vineppo) have the lengths again
        from the first. No shape depends on the tokens, so that a GPU is not waited for."""
        drawn = super()._draw(logits, sampling, noise, rows, lengths)
        wanted = self.lengths[rows % len(self.lengths)]
        over, ended = lengths + 1 >= wanted, drawn.tokens == self.eos
        going_on = torch.where(ended, self.eos + 1, drawn.tokens)
        tokens = torch.where(over, self.eos, going_on)
        own, other = (logits.gather(1, t[:, None])[:, 0] for t in (tokens, drawn.tokens))
        change = (own.float() - other.float()) / sampling.temperature
        return replace(drawn, tokens=tokens, logprobs=drawn.logprobs + change)


def prompts(size: Size, count: int, low: int = 16, high: int = 48) -> list[Prompt]:
    return [
        Prompt(f"p{i}", tuple(ids), w.text(size, ids))
        for i, ids in enumerate(w.prompts(size, count, low, high))
    ]


def policy(size: Size) -> Any:
    """Return the model that is trained: of a pretrained one, the folder with an adapter."""
    if not size.folder:
        return w.language_model(size)
    return add_adapter(load_model(size.folder), LORA, POLICY, seed=0)


def reference_of(actor: Any, size: Size) -> Any:
    """Return the reference: under an adapter, the trunk."""
    return AdapterView(actor, None) if size.folder else freeze(w.language_model(size))


def scalar(actor: Any, size: Size, name: str, seed: int) -> ScalarModel:
    """Return a critic or a reward model: a model of its own, or an adapter on the actor's trunk."""
    if not size.folder:
        return ScalarModel(w.scalar_model(size, seed))
    return AdaptedScalar(add_adapter(actor, LORA, name, seed), name, size.pad, seed)


def generation(size: Size, repeats: int, copies: int = 1) -> Measurement:
    generator = FixedLengthGenerator(policy(size), size, size.rows)
    low, high = (16, 48) if copies == 1 else (64, 128)
    asked = prompts(size, size.rows // copies, low, high)
    sampling = Sampling(max_new_tokens=size.limit)
    tokens: list[int] = []

    def work() -> None:
        rollouts = generator.generate(asked, sampling, copies)
        tokens.append(sum(len(r.response_ids) for r in rollouts))

    return Measurement(w.timed(work, repeats), tokens[-1])


def seconds_of_steps(progress: Iterator[object], repeats: int) -> list[float]:
    """Return the seconds between the results of a loop, without the first."""
    stamps = [w.clock() for _ in progress]
    return [b - a for a, b in itertools.pairwise(stamps)][:repeats]


def ppo(size: Size, repeats: int) -> Measurement:
    rows = size.rows // 2
    actor = policy(size)
    critic = scalar(actor, size, CRITIC, 2)
    scorer = freeze(scalar(actor, size, REWARD, 1))
    optim = Optim(lr=1e-5, critic_lr=1e-5, epochs=size.ppo_epochs, minibatches=1)
    sampling = Sampling(max_new_tokens=size.limit)
    reference = reference_of(actor, size)
    tokens = scoring_tokens(size)
    learner = Learner(
        Separate(actor, critic),
        reference,
        optim,
        sampling,
        steps=repeats + 1,
        micro_batch_tokens=micro_batch_tokens(size),
        scoring_tokens=tokens,
    )
    collector = Collector(
        Sampler(prompts(size, rows), rows, 0),
        FixedLengthGenerator(actor, size, rows),
        [Weighted(ModelReward(scorer, tokens), 1.0)],
    )
    seconds = seconds_of_steps(rl(collector, learner, ALGORITHMS["ppo"]), repeats)
    return Measurement(seconds, sum(size.lengths(rows)), optimizer_steps=size.ppo_epochs)


def grpo(size: Size, repeats: int, preset: str = "grpo") -> Measurement:
    samples = 8
    actor = policy(size)
    sampling, optim = Sampling(max_new_tokens=size.limit), Optim(lr=1e-5, epochs=1)
    reference = reference_of(actor, size)
    learner = Learner(
        Separate(actor, None),
        reference,
        optim,
        sampling,
        steps=repeats + 1,
        micro_batch_tokens=micro_batch_tokens(size),
        scoring_tokens=scoring_tokens(size),
    )
    collector = Collector(
        Sampler(prompts(size, size.rows // samples), size.rows // samples, 0),
        FixedLengthGenerator(actor, size, size.rows),
        [Weighted(TextReward("length", lambda _, response: float(len(response))), 1.0)],
        samples,
    )
    seconds = seconds_of_steps(rl(collector, learner, ALGORITHMS[preset]), repeats)
    return Measurement(seconds, sum(size.lengths(size.rows)), optimizer_steps=1)


def sft(size: Size, repeats: int) -> Measurement:
    rows, model = size.rows // 2, w.language_model(size)
    pairs = list(zip(w.prompts(size, rows), w.responses(size, rows), strict=True))
    demonstrations = [Demonstration(str(i), tuple(p), tuple(a)) for i, (p, a) in enumerate(pairs)]
    optimizer = Optimizer(list(model.parameters()), OptimizerConfig(), 100)
    steps = sft_loop(
        model,
        Sampler(demonstrations, rows, 0),
        optimizer,
        repeats + 1,
        Budget(micro_batch_tokens(size)),
    )
    tokens = sum(len(p) + len(a) for p, a in pairs)
    return Measurement(seconds_of_steps(steps, repeats), tokens, optimizer_steps=1)


def reward_model(size: Size, repeats: int) -> Measurement:
    rows, model = size.rows // 4, ScalarModel(w.scalar_model(size))
    asked, chosen, rejected = (
        w.prompts(size, rows),
        w.responses(size, rows),
        w.responses(size, rows, 4),
    )
    comparisons = [
        Comparison(str(i), tuple(p), tuple(a), tuple(b))
        for i, (p, a, b) in enumerate(zip(asked, chosen, rejected, strict=True))
    ]
    optimizer = Optimizer(list(model.parameters()), OptimizerConfig(), 100)
    steps = reward_model_loop(
        model,
        Sampler(comparisons, rows, 0),
        LastTokenLoss(),
        optimizer,
        repeats + 1,
        Budget(micro_batch_tokens(size)),
    )
    tokens = 2 * sum(map(len, asked)) + sum(map(len, chosen)) + sum(map(len, rejected))
    return Measurement(seconds_of_steps(steps, repeats), tokens, optimizer_steps=1)


@dataclass(frozen=True)
class Scoring:
    """A model, prompts with responses, and the pieces in which their log-probs are computed: real
    tokens only, or with `padded` the rectangle that holds them, by transformers' own forward."""

    model: Any
    tokens: Tensor
    lengths: Tensor
    mask: Tensor
    pieces: list[tuple[Tensor, int]]
    """Rows of each piece, and its width."""

    @classmethod
    def of(cls, size: Size, padded: bool) -> "Scoring":
        model = w.language_model(size)
        pairs = list(zip(w.prompts(size, size.rows), w.responses(size, size.rows), strict=True))
        tokens, lengths = right_pad([(*p, *a) for p, a in pairs])
        width = tokens.shape[1]
        mask = response_mask(torch.tensor([len(p) for p, _ in pairs]), lengths, width)
        if padded:
            fused._HAS_FUSED_FORWARD[model.base_model] = False
            rows = torch.arange(size.rows).split(max(micro_batch_tokens(size) // width, 1))
            pieces = [(piece, width) for piece in rows]
        else:
            batches = map(torch.tensor, micro_batches(lengths.tolist(), micro_batch_tokens(size)))
            pieces = [(piece, int(lengths[piece].max())) for piece in batches]
        return cls(model, tokens, lengths, mask, pieces)

    def logprobs(self) -> Iterator[Tensor]:
        for rows, width in self.pieces:
            yield masked_logprobs(self.model, self.tokens[rows, :width], self.mask[rows, :width])

    def score(self) -> None:
        with torch.no_grad():
            for _ in self.logprobs():
                pass

    def train(self) -> None:
        for piece in self.logprobs():
            piece.sum().backward()
        self.model.zero_grad()


def scoring(size: Size, repeats: int, train: bool, padded: bool) -> Measurement:
    """Compute the log-probs of responses, and with `train` their gradient."""
    scored = Scoring.of(size, padded)
    seconds = w.timed(scored.train if train else scored.score, repeats)
    padded_tokens = {"padded": float(scored.tokens.numel())}
    return Measurement(seconds, int(scored.lengths.sum()), other=padded_tokens)


def machine(size: Size, repeats: int) -> Measurement:
    """Measure what a plain product and a plain copy reach here, of 2048² numbers (32² where the
    size is "tiny")."""
    width = 2048 if size.hidden >= 128 else size.hidden
    a, b = torch.randn(width, width), torch.randn(width, width)
    x, y = torch.randn(16 * width**2), torch.empty(16 * width**2)
    product = min(w.timed(lambda: torch.mm(a, b), 5 * repeats))
    copy = min(w.timed(lambda: y.copy_(x), 5 * repeats))
    reach = {"gflops": 2 * width**3 / product / 1e9, "copy_gb_s": 2 * x.numel() * 4 / copy / 1e9}
    return Measurement([product], 0, other=reach)


WORKS: dict[str, Callable[[Size, int], Measurement]] = {
    "machine": machine,
    "generation": generation,
    "group": partial(generation, copies=8),
    "ppo": ppo,
    "grpo": grpo,
    "rloo": partial(grpo, preset="rloo"),
    "sft": sft,
    "reward_model": reward_model,
    "scoring": partial(scoring, train=False, padded=False),
    "scoring_padded": partial(scoring, train=False, padded=True),
    "training": partial(scoring, train=True, padded=False),
    "training_padded": partial(scoring, train=True, padded=True),
}

if __name__ == "__main__":
    keep_freed_memory()
    w.run_worker(WORKS, __doc__)
