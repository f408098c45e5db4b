"""Stages from checkpoint to checkpoint: each reads the folders that earlier ones wrote, and writes its own."""

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quartet.algorithms.preference import Dpo, Ipo, Kto, LastTokenLoss, Orpo, PerTokenLoss, Simpo
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.evaluation.best_of_n import BestOf, best_of_n
from quartet.evaluation.compare import Gold, compare
from quartet.experience import Prompt, Rollout
from quartet.generation.native import NativeGenerator
from quartet.generation.protocol import Generator as Generates
from quartet.generation.sampling import Sampling
from quartet.loops.preference import Source, held_out_preference, preference
from quartet.loops.progress import Progress
from quartet.loops.reward_model import accuracy_of, pair_accuracy, pair_scores, reward_model
from quartet.loops.rl import Step, rl
from quartet.loops.sft import held_out_loss, sft
from quartet.machine import give_back_memory
from quartet.models.adapters import reference_of
from quartet.models.heads import ScalarModel
from quartet.models.language_model import policy_logprobs, save, stop_ids
from quartet.observability.card import write_cards
from quartet.observability.doctor import Watch
from quartet.observability.run import Keeping, RunFolder
from quartet.observability.sinks import Tracking
from quartet.observability.tokens import TokenTexts, probe_table, write_pairs, write_tokens
from quartet.rewards.protocol import Weighted, rewarded
from quartet.rewards.reward_model import ModelReward
from quartet.training.learner import Learner, collate
from quartet.training.optim import Optimizer

BEST_OF_ANSWERS = 512
"""How many answers the best-of-n curve is drawn from in all: as many at once as the evaluation itself has by default."""
PROBED_TIMES = 20
"""How often an RL stage looks at its probes."""

Summary = dict[str, Any]
Stages = Generator[Progress, None, Summary]


@runtime_checkable
class Stage(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str:
        """The name as a person reads it."""
        ...

    @property
    def num_steps(self) -> int: ...

    def run(self, folder: Path) -> Stages:
        """Yield progress; leave the results in the folder; return a summary."""
        ...


@dataclass(frozen=True)
class Started:
    stage: Stage
    number: int
    of: int


@dataclass(frozen=True)
class Advanced:
    stage: Stage
    progress: Progress


@dataclass(frozen=True)
class Warned:
    stage: Stage
    step: int
    sentence: str


@dataclass(frozen=True)
class Finished:
    stage: Stage
    summary: Summary
    seconds: float


Event = Started | Advanced | Warned | Finished


class StageFailed(RuntimeError):
    """A stage that could not go on: its name, the step, and the cause."""


def run(
    stages: Sequence[Stage],
    folder: RunFolder,
    texts: TokenTexts,
    keep_every: int = 1,
    tracking: Tracking | None = None,
) -> Iterator[Event]:
    """Run the stages in order. Everything is in the run folder before it is yielded."""
    for number, stage in enumerate(stages, 1):
        started, watch, kept = time.monotonic(), Watch(kl_target(stage)), Keeping(keep_every)
        folder.event("started", stage.name)
        yield Started(stage, number, len(stages))
        steps, reached = stage.run(folder.path), 0
        while True:
            before = time.monotonic()
            try:
                progress = next(steps)
            except StopIteration as stop:
                summary: Summary = stop.value
                break
            except Exception as error:  # whatever it is, the run says which stage and step it was in
                raise StageFailed(f"{stage.title}, step {reached + 1}: {error}") from error
            reached = progress.number
            seconds = round(time.monotonic() - before, 4)
            folder.event(
                "metrics",
                stage.name,
                progress.number,
                metrics=progress.metrics,
                seconds=seconds,
                phases=progress.seconds or None,
            )
            if isinstance(progress, Step) and kept(progress.number, progress.metrics):
                folder.write_rollouts(progress, texts)
            for sentence in tracking.log(stage.name, progress.number, progress.metrics) if tracking else ():
                folder.event("warning", stage.name, progress.number, rule="tracker", sentence=sentence)
                yield Warned(stage, progress.number, sentence)
            yield Advanced(stage, progress)
            for rule, sentence in watch.see(progress.metrics):
                folder.event("warning", stage.name, progress.number, rule=rule.__name__, sentence=sentence)
                yield Warned(stage, progress.number, sentence)
        took = round(time.monotonic() - started, 2)
        folder.event("finished", stage.name, summary=summary, seconds=took)
        yield Finished(stage, summary, took)
        give_back_memory()
    write_cards(folder.path)


@dataclass(frozen=True)
class SftStage:
    """Writes `sft/`."""

    demonstrations: Sequence[Demonstration]
    held_out: Sequence[Demonstration]
    tokenizer: Any
    load_policy: Callable[[Path], Any]
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    name: str = "sft"
    title: str = "sft"

    def run(self, folder: Path) -> Stages:
        model = self.load_policy(folder)
        before = held_out_loss(model, self.held_out, self.micro_batch_tokens)
        sampler = Sampler(self.demonstrations, self.batch_size, self.seed)
        yield from sft(model, sampler, self.optimizer(model), self.num_steps, self.micro_batch_tokens)
        save(model, self.tokenizer, folder / "sft")
        after = held_out_loss(model, self.held_out, self.micro_batch_tokens)
        return {"held_out_loss_before": before, "held_out_loss": after}


@dataclass(frozen=True)
class RewardModelStage:
    """Writes `reward_model/` and, of the held-out pairs, `evaluation/pairs.parquet`. Its scores are centred: the policy that RL
    starts from scores 0 on average."""

    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    ceiling: float | None
    """The accuracy of a judge who knows the gold reward, where there is one: labels are noisy."""
    prompts: Sequence[Prompt]
    sampling: Sampling
    tokenizer: Any
    load_policy: Callable[[Path], Any]
    make_model: Callable[[Any], ScalarModel]
    loss: LastTokenLoss | PerTokenLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    name: str = "reward_model"
    title: str = "reward model"

    def run(self, folder: Path) -> Stages:
        policy = self.load_policy(folder)
        model = self.make_model(policy)
        before = pair_accuracy(model, self.held_out, self.micro_batch_tokens)
        sampler = Sampler(self.comparisons, self.batch_size, self.seed)
        yield from reward_model(model, sampler, self.loss, self.optimizer(model), self.num_steps, self.micro_batch_tokens)
        judged = pair_scores(model, self.held_out, self.micro_batch_tokens)
        accuracy = accuracy_of(judged[:, 0] - judged[:, 1])
        generator = NativeGenerator(policy, self.tokenizer, stop_ids(policy, self.tokenizer), self.seed)
        scores = ModelReward(model, self.micro_batch_tokens).score(generator.generate(self.prompts, self.sampling))
        mean = statistics.fmean(score for score in scores if score is not None)
        model.centre += mean
        model.save(folder / "reward_model", self.tokenizer)
        write_pairs(folder / "evaluation" / "pairs.parquet", self.held_out, judged - mean, self.tokenizer)
        summary = {"held_out_accuracy_before": before, "held_out_accuracy": accuracy, "centre": model.centre}
        return summary | ({} if self.ceiling is None else {"ceiling": self.ceiling})


@dataclass(frozen=True)
class PreferenceStage:
    """Writes `policy/`, learnt from comparisons of a file or, where `online` makes them, of its own."""

    name: str
    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    online: Callable[[Path, Any], Source] | None
    tokenizer: Any
    load_policy: Callable[[Path], Any]
    loss: Dpo | Ipo | Kto | Orpo | Simpo
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def run(self, folder: Path) -> Stages:
        model = self.load_policy(folder)
        reference = reference_of(model) if self.loss.needs_reference else None
        source = self.online(folder, model) if self.online else Sampler(self.comparisons, self.batch_size, self.seed)
        optimizer = self.optimizer(model)
        yield from preference(model, reference, source, self.loss, optimizer, self.num_steps, self.micro_batch_tokens)
        save(model, self.tokenizer, folder / "policy")
        if not self.held_out:
            return {}
        after = held_out_preference(model, reference, self.held_out, self.loss, self.micro_batch_tokens)
        return {f"held_out_{name}": value for name, value in after.items()}


@dataclass(frozen=True)
class Cast:
    """Who plays in an RL stage."""

    learner: Learner
    generator: Generates
    rewards: Sequence[Weighted]
    probes: Sequence[Rollout] = ()
    """Answers of the policy that the stage starts with, to be looked at again as it learns."""


@dataclass(frozen=True)
class RLStage:
    """Writes `policy/`, `critic/` where there is one, `policy_ema/` where an average is kept, and `probes/`: what the models
    say of the same few answers, as the stage goes on."""

    name: str
    prompts: Sequence[Prompt]
    tokenizer: Any
    cast: Callable[[Path], Cast]
    algorithm: Any
    sampling: Sampling
    samples_per_prompt: int
    prompts_per_step: int
    num_steps: int
    seed: int

    @property
    def title(self) -> str:
        return self.name

    def run(self, folder: Path) -> Stages:
        cast, texts = self.cast(folder), TokenTexts(self.tokenizer)
        every = math.ceil(self.num_steps / PROBED_TIMES)

        def probe(number: int, algorithm: Any) -> None:
            if cast.probes:
                table = probe_table(number, cast.learner, cast.probes, algorithm, texts)
                write_tokens(table, folder / "probes" / f"{number:06d}.parquet")

        probe(0, self.algorithm)
        for step in rl(
            Sampler(self.prompts, self.prompts_per_step, self.seed),
            cast.generator,
            self.sampling,
            self.samples_per_prompt,
            cast.rewards,
            cast.learner,
            self.algorithm,
            self.num_steps,
        ):
            if step.number % every == 0 or step.number == self.num_steps:
                probe(step.number, step.algorithm)
            yield step
        save(cast.learner.models.actor, self.tokenizer, folder / "policy")
        cast.learner.models.save_critic(folder / "critic", self.tokenizer)
        if cast.learner.ema is not None:
            save(cast.learner.ema.model(cast.learner.models.actor), self.tokenizer, folder / "policy_ema")
        return {}


@dataclass(frozen=True)
class EvaluationStage:
    """Writes `evaluation/final.json`: the policy against the one it started from, on held-out prompts; `answers.jsonl`, what
    both answered; and `best_of_n.json`, what the first would have answered at its best."""

    prompts: Sequence[Prompt]
    tokenizer: Any
    load_before: Callable[[Path], Any]
    load_after: Callable[[Path], Any]
    rewards: Callable[[Path], Sequence[Weighted]]
    gold: Gold | None
    sampling: Sampling
    micro_batch_tokens: int
    generator: Callable[[Any], Generates]
    best_of: int = 0
    num_steps: int = 2
    name: str = field(default="evaluation")
    title: str = field(default="evaluation")

    def run(self, folder: Path) -> Stages:
        before, after, rewards = self.load_before(folder), self.load_after(folder), self.rewards(folder)
        old = rewarded(self._answers(before), rewards)
        yield Progress(1, {})
        new = rewarded(self._answers(after), rewards)
        kl = self._kl(before, after, new)
        yield Progress(2, {})
        summary = dataclasses.asdict(compare(old, new, kl, self.gold))
        if not any(w.weight for w in rewards):  # comparisons were learnt from, no reward was
            del summary["before"]["reward"], summary["after"]["reward"]
        (folder / "evaluation").mkdir(exist_ok=True)
        _write_json(folder / "evaluation" / "final.json", summary)
        _write_json(folder / "evaluation" / "best_of_n.json", [dataclasses.asdict(b) for b in self._best_of(before, rewards)])
        pairs = [json.dumps(_pair(*row), ensure_ascii=False) + "\n" for row in zip(old, new, kl, strict=True)]
        _write(folder / "evaluation" / "answers.jsonl", "".join(pairs))
        return summary

    def _best_of(self, model: Any, rewards: Sequence[Weighted]) -> list[BestOf]:
        """Empty where nothing was rewarded, or too few answers have a score."""
        if self.best_of < 2 or not any(w.weight for w in rewards):
            return []
        prompts = self.prompts[: max(1, BEST_OF_ANSWERS // self.best_of)]
        made = rewarded(self.generator(model).generate(prompts, self.sampling, self.best_of), rewards)
        by_prompt = [list(group) for _, group in itertools.groupby(made, key=lambda r: r.group)]
        whole = [group for group in by_prompt if all(r.score is not None for r in group)]
        if not whole:
            return []
        gold = None if self.gold is None else [[self.gold(r.prompt.text, r.response) for r in group] for group in whole]
        return best_of_n([[r.score or 0.0 for r in group] for group in whole], gold)

    def _answers(self, model: Any) -> list[Rollout]:
        return self.generator(model).generate(self.prompts, self.sampling)

    def _kl(self, before: Any, after: Any, rollouts: Sequence[Rollout]) -> list[float]:
        batch = collate(rollouts, after.device)
        new, old = (
            policy_logprobs(
                model,
                batch.tokens,
                batch.lengths,
                batch.response_mask,
                self.sampling.temperature,
                self.micro_batch_tokens,
            )
            for model in (after, before)
        )
        differences: list[float] = (new - old).sum(dim=1).tolist()
        return differences


def kl_target(stage: Stage) -> float | None:
    """What the KL of an RL stage is held to, if it is."""
    controller = getattr(getattr(getattr(stage, "algorithm", None), "kl", None), "controller", None)
    return getattr(controller, "target", None)


def _pair(first: Rollout, last: Rollout, kl: float) -> dict[str, Any]:
    """A line of `evaluation/answers.jsonl`."""
    sides = {
        side: {"response": r.response, "score": r.score, "components": dict(r.components), "tokens": len(r.response_ids)}
        for side, r in (("before", first), ("after", last))
    }
    return {"id": first.prompt.id, "prompt": first.prompt.text, "kl": kl, **sides}


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Under another name until it is whole: somebody may be looking."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
