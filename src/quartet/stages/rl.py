"""The stages: each reads the folders that earlier ones wrote, and writes its own."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import TypeAdapter

from quartet import files as durable
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.preference import PreferenceLoss, RewardModelLoss
from quartet.data.records import Comparison, Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.team import ALONE, Team
from quartet.evaluation.best_of_n import BestOf, best_of_n
from quartet.evaluation.compare import Gold, compare, wins_of
from quartet.experience import Prompt, Rollout
from quartet.generation.native import NativeGenerator
from quartet.generation.protocol import Generator as Generates
from quartet.generation.sampling import Sampling
from quartet.io.texts import well_formed_json
from quartet.loops.collect import Collector
from quartet.loops.preference import Source, held_out_preference, preference
from quartet.loops.progress import Progress
from quartet.loops.reward_model import accuracy_of, pair_accuracy, pair_scores, reward_model
from quartet.loops.rl import Step, rl
from quartet.loops.rl_async import Ahead, rl_async
from quartet.loops.sft import held_out_loss, sft
from quartet.models.adapters import reference_of
from quartet.models.heads import ScalarModel
from quartet.models.language_model import policy_logprobs, save, stop_ids
from quartet.recording.tokens import TokenTexts, probe_table, write_pairs, write_tokens
from quartet.rewards.protocol import Weighted, rewarded
from quartet.rewards.reward_model import ModelReward
from quartet.training.budget import Budget
from quartet.training.checkpoint import Stateful, Tree
from quartet.training.learner import Learner, collate
from quartet.training.metrics import sampler_ratio
from quartet.training.optim import Optimizer

BEST_OF_ANSWERS = 512
"""How many answers the best-of-n curve is drawn from in all: as many at once as the evaluation
itself has by default."""
PROBED_TIMES = 20
"""How often an RL stage looks at its probes."""

Summary = dict[str, Any]


def as_it_is(model: Any) -> Any:
    """Whole, on every rank."""
    return model


@dataclass(frozen=True)
class Work:
    """A stage that has begun: its models are loaded."""

    steps: Callable[[int], Iterator[Progress]]
    """The steps that come after so many."""
    finish: Callable[[], Summary]
    """Leave the results in the run folder; say what came out."""
    players: Mapping[str, Stateful] = field(default_factory=dict)
    """All that changes from step to step."""
    optimizers: Sequence[Optimizer] = ()
    budget: Budget | None = None

    def state(self) -> Tree:
        """What a checkpoint holds. Its tensors are the live ones: good until the next step changes
        them."""
        return {name: player.state() for name, player in self.players.items()}

    def load_state(self, state: Tree) -> None:
        for name, player in self.players.items():
            if (
                name in state or name != "ahead"
            ):  # a run that did not sample ahead may go on as one that does
                player.load_state(state[name])

    def notes(self) -> list[str]:
        """What there was to say of memory since the last step."""
        if self.budget is None:
            return []
        notes, self.budget.notes = self.budget.notes, []
        return notes

    def moves(self) -> int:
        """How often an optimizer has stepped: between two equal counts no weight has changed."""
        return sum(optimizer.steps for optimizer in self.optimizers)


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

    def begin(self, folder: Path) -> Work:
        """Load the models; nothing has been learnt yet."""
        ...


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
    team: Team = ALONE
    spread: Callable[[Any], Any] = as_it_is

    def begin(self, folder: Path) -> Work:
        model = self.spread(self.load_policy(folder))
        before = held_out_loss(model, self.held_out, self.micro_batch_tokens, self.team)
        sampler, optimizer = (
            Sampler(self.demonstrations, self.batch_size, self.seed),
            self.optimizer(model),
        )
        budget = Budget(self.micro_batch_tokens, self.team)

        def steps(done: int) -> Iterator[Progress]:
            return sft(model, sampler, optimizer, self.num_steps, budget, done)

        def finish() -> Summary:
            save(model, self.tokenizer, folder / "sft", self.team)
            after = held_out_loss(model, self.held_out, self.micro_batch_tokens, self.team)
            return {"held_out_loss_before": before, "held_out_loss": after}

        return Work(
            steps,
            finish,
            {"optimizer": optimizer, "sampler": sampler, "budget": budget},
            [optimizer],
            budget,
        )


@dataclass(frozen=True)
class RewardModelStage:
    """Writes `reward_model/` and, of the held-out pairs, `evaluation/pairs.parquet`. Its scores are
    centred: the policy that RL starts from scores 0 on average."""

    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    ceiling: float | None
    """The accuracy of a judge who knows the gold reward, where there is one: labels are noisy."""
    prompts: Sequence[Prompt]
    sampling: Sampling
    tokenizer: Any
    load_policy: Callable[[Path], Any]
    make_model: Callable[[Any], ScalarModel]
    loss: RewardModelLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    name: str = "reward_model"
    title: str = "reward model"
    team: Team = ALONE

    def begin(self, folder: Path) -> Work:
        policy = self.load_policy(folder)
        model = self.make_model(policy)
        before = pair_accuracy(model, self.held_out, self.micro_batch_tokens, self.team)
        sampler, optimizer = (
            Sampler(self.comparisons, self.batch_size, self.seed),
            self.optimizer(model),
        )
        budget = Budget(self.micro_batch_tokens, self.team)

        def steps(done: int) -> Iterator[Progress]:
            return reward_model(model, sampler, self.loss, optimizer, self.num_steps, budget, done)

        def finish() -> Summary:
            judged = pair_scores(model, self.held_out, self.micro_batch_tokens, self.team)
            accuracy = accuracy_of(judged[:, 0] - judged[:, 1])
            generator = NativeGenerator(
                policy, self.tokenizer, stop_ids(policy, self.tokenizer), self.seed, team=self.team
            )
            scores = ModelReward(model, self.micro_batch_tokens, team=self.team).score(
                generator.generate(self.prompts, self.sampling)
            )
            mean = statistics.fmean(score for score in scores if score is not None)
            model.centre += mean
            model.save(folder / "reward_model", self.tokenizer, self.team)
            if self.team.lead:
                write_pairs(
                    folder / "evaluation" / "pairs.parquet",
                    self.held_out,
                    judged - mean,
                    self.tokenizer,
                )
            summary = {
                "held_out_accuracy_before": before,
                "held_out_accuracy": accuracy,
                "centre": model.centre,
            }
            return summary | ({} if self.ceiling is None else {"ceiling": self.ceiling})

        return Work(
            steps,
            finish,
            {"optimizer": optimizer, "sampler": sampler, "budget": budget},
            [optimizer],
            budget,
        )


@dataclass(frozen=True)
class PreferenceStage:
    """Writes `policy/`, learnt from comparisons of a file or, where `online` makes them, of its
    own."""

    name: str
    comparisons: Sequence[Comparison]
    held_out: Sequence[Comparison]
    online: Callable[[Path, Any], Source] | None
    tokenizer: Any
    load_policy: Callable[[Path], Any]
    loss: PreferenceLoss
    optimizer: Callable[[Any], Optimizer]
    num_steps: int
    batch_size: int
    micro_batch_tokens: int
    seed: int
    team: Team = ALONE
    spread: Callable[[Any], Any] = as_it_is

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def begin(self, folder: Path) -> Work:
        model = self.load_policy(folder)
        source = (
            self.online(folder, model)
            if self.online
            else Sampler(self.comparisons, self.batch_size, self.seed)
        )
        reference = reference_of(model) if self.loss.needs_reference else None
        model, reference = self.spread(model), None if reference is None else self.spread(reference)
        optimizer, budget = self.optimizer(model), Budget(self.micro_batch_tokens, self.team)

        def steps(done: int) -> Iterator[Progress]:
            return preference(
                model, reference, source, self.loss, optimizer, self.num_steps, budget, done
            )

        def finish() -> Summary:
            save(model, self.tokenizer, folder / "policy", self.team)
            if not self.held_out:
                return {}
            after = held_out_preference(
                model, reference, self.held_out, self.loss, self.micro_batch_tokens, self.team
            )
            return {f"held_out_{name}": value for name, value in after.items()}

        return Work(
            steps,
            finish,
            {"optimizer": optimizer, "source": source, "budget": budget},
            [optimizer],
            budget,
        )


@dataclass(frozen=True)
class Contest:
    """The policy as it learns against the one that the stage starts with, on the same held-out
    prompts."""

    answer: Callable[[], Sequence[Rollout]]
    """Now, with what the rewards give. The same random numbers each time, and none of the
    training's."""
    before: Sequence[Rollout]
    gold: Gold | None

    def win_rate(self, now: Sequence[Rollout]) -> float | None:
        """Of these answers; None where none could be judged."""
        wins = wins_of(self.before, now, self.gold)
        return statistics.fmean(wins) if wins else None


@dataclass(frozen=True)
class Cast:
    """Who plays in an RL stage."""

    learner: Learner
    generator: Generates
    rewards: Sequence[Weighted]
    probes: Sequence[Rollout] = ()
    """Answers of the policy that the stage starts with, to be looked at again as it learns."""
    texts: Sequence[Demonstration] = ()
    """Held-out demonstrations: is what SFT taught still there?"""
    contest: Contest | None = None

    def watched(self, algorithm: Algorithm, stale: bool) -> dict[str, float]:
        """The policy's win rate, its perplexity on the texts, and how far reward models are from
        what they first said of the probes. `stale`: the step's rollouts were older, and could not
        tell whether the sampler has the learner's weights."""
        metrics = {}
        now = self.contest.answer() if self.contest is not None else []
        if self.contest is not None and (rate := self.contest.win_rate(now)) is not None:
            metrics["policy/win_rate"] = rate
        if stale and (
            scored := [
                dataclasses.replace(r, policy_version=-1) for r in now if r.score is not None
            ]
        ):
            metrics["sampler_ratio"] = sampler_ratio(self.learner.score(scored, algorithm))
        if self.texts:
            loss = held_out_loss(
                self.learner.models.actor, self.texts, self.learner.budget.tokens, self.learner.team
            )
            metrics["policy/sft_perplexity"] = math.exp(min(loss, 50.0))
        judges = [w.reward for w in self.rewards if isinstance(w.reward, ModelReward)]
        apart = [
            abs((now or 0.0) - (probe.components[judge.name] or 0.0))
            for judge in judges
            for now, probe in zip(judge.score(self.probes), self.probes, strict=True)
        ]
        return metrics | ({"reward/drift": statistics.fmean(apart)} if apart else {})


class Adapting:
    """The algorithm as it is after the last step: its coefficients follow what was measured."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.now = algorithm

    def state(self) -> Tree:
        return dataclasses.asdict(self.now)

    def load_state(self, state: Tree) -> None:
        self.now = TypeAdapter(Algorithm).validate_python(state)


@dataclass(frozen=True)
class RLStage:
    """Writes `policy/`, `critic/` where there is one, `policy_ema/` where an average is kept, and
    `probes/`: what the models say of the same few answers, as the stage goes on."""

    name: str
    prompts: Sequence[Prompt]
    tokenizer: Any
    cast: Callable[[Path], Cast]
    algorithm: Algorithm
    sampling: Sampling
    samples_per_prompt: int
    prompts_per_step: int
    num_steps: int
    seed: int
    staleness: int = 0

    @property
    def title(self) -> str:
        return self.name

    def begin(self, folder: Path) -> Work:
        cast, algorithm, texts = (
            self.cast(folder),
            Adapting(self.algorithm),
            TokenTexts(self.tokenizer),
        )
        prompts, ahead = (
            Sampler(self.prompts, self.prompts_per_step, self.seed),
            Ahead(self.staleness),
        )

        def probe(number: int) -> None:
            if not cast.probes:
                return
            table = probe_table(number, cast.learner, cast.probes, algorithm.now, texts)
            if cast.learner.team.lead:
                write_tokens(table, folder / "probes" / f"{number:06d}.parquet")

        def steps(done: int) -> Iterator[Step]:
            if done == 0:
                probe(0)
            else:
                cast.generator.load_weights(cast.learner.weights())
            collector = Collector(prompts, cast.generator, cast.rewards, self.samples_per_prompt)
            loop = (
                rl_async(collector, cast.learner, algorithm.now, ahead, done)
                if self.staleness
                else None
            )
            for step in loop or rl(collector, cast.learner, algorithm.now, done):
                algorithm.now = step.algorithm
                if (
                    step.number % math.ceil(self.num_steps / PROBED_TIMES) == 0
                    or step.number == self.num_steps
                ):
                    probe(step.number)
                    seen = cast.watched(algorithm.now, stale="sampler_ratio" not in step.metrics)
                    step = dataclasses.replace(step, metrics=step.metrics | seen)  # noqa: PLW2901
                yield step

        def finish() -> Summary:
            learner = cast.learner
            save(learner.models.actor, self.tokenizer, folder / "policy", learner.team)
            learner.models.save_critic(folder / "critic", self.tokenizer, learner.team)
            if learner.ema is not None:
                average = learner.ema.average
                save(
                    learner.models.actor,
                    self.tokenizer,
                    folder / "policy_ema",
                    learner.team,
                    average,
                )
            return {}

        players: dict[str, Stateful] = {
            "learner": cast.learner,
            "generator": cast.generator,
            "prompts": prompts,
            "algorithm": algorithm,
        }
        if self.staleness:
            players["ahead"] = ahead
        return Work(
            steps, finish, players, list(cast.learner.optimizers.values()), cast.learner.budget
        )


@dataclass(frozen=True)
class EvaluationStage:
    """Writes `evaluation/final.json`: the policy against the one it started from, on held-out
    prompts; `answers.jsonl`, what both answered; and `best_of_n.json`, what the first would have
    answered at its best."""

    prompts: Sequence[Prompt]
    tokenizer: Any
    load_before: Callable[[Path], Any]
    load_after: Callable[[Path], Any]
    rewards: Callable[[Path], Sequence[Weighted]]
    gold: Gold | None
    sampling: Sampling
    micro_batch_tokens: int
    generator: Callable[[Any, Path], Generates]
    best_of: int = 0
    num_steps: int = 2
    name: str = field(default="evaluation")
    title: str = field(default="evaluation")
    team: Team = ALONE

    def begin(self, folder: Path) -> Work:
        if not self.team.lead:  # one reads the models and writes
            return Work(
                lambda done: iter(
                    [Progress(number, {}) for number in range(done + 1, self.num_steps + 1)]
                ),
                dict,
            )
        before, after, rewards = (
            self.load_before(folder),
            self.load_after(folder),
            self.rewards(folder),
        )
        answered: list[list[Rollout]] = []

        def steps(done: int) -> Iterator[Progress]:
            for number, model in enumerate((before, after)[done:], done + 1):
                answered.append(
                    rewarded(
                        self.generator(model, folder).generate(self.prompts, self.sampling), rewards
                    )
                )
                yield Progress(number, {})

        def finish() -> Summary:
            old, new = answered
            kl = self._kl(before, after, new)
            summary = dataclasses.asdict(compare(old, new, kl, self.gold))
            if not any(w.weight for w in rewards):  # comparisons were learnt from, no reward was
                del summary["before"]["reward"], summary["after"]["reward"]
            (folder / "evaluation").mkdir(exist_ok=True)
            _write_json(folder / "evaluation" / "final.json", summary)
            best = [dataclasses.asdict(b) for b in self._best_of(before, folder, rewards)]
            _write_json(folder / "evaluation" / "best_of_n.json", best)
            pairs = [
                json.dumps(well_formed_json(_pair(*row)), ensure_ascii=False) + "\n"
                for row in zip(old, new, kl, strict=True)
            ]
            durable.replace(folder / "evaluation" / "answers.jsonl", "".join(pairs))
            return summary

        return Work(steps, finish)

    def _best_of(self, model: Any, folder: Path, rewards: Sequence[Weighted]) -> list[BestOf]:
        """Empty where nothing was rewarded, or too few answers have a score."""
        if self.best_of < 2 or not any(w.weight for w in rewards):
            return []
        prompts = self.prompts[: max(1, BEST_OF_ANSWERS // self.best_of)]
        made = rewarded(
            self.generator(model, folder).generate(prompts, self.sampling, self.best_of), rewards
        )
        by_prompt = [list(group) for _, group in itertools.groupby(made, key=lambda r: r.group)]
        whole = [group for group in by_prompt if all(r.score is not None for r in group)]
        if not whole:
            return []
        gold = (
            None
            if self.gold is None
            else [[self.gold(r.prompt.text, r.response) for r in group] for group in whole]
        )
        return best_of_n([[r.score or 0.0 for r in group] for group in whole], gold)

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


def _pair(first: Rollout, last: Rollout, kl: float) -> dict[str, Any]:
    """A line of `evaluation/answers.jsonl`."""
    sides = {
        side: {
            "response": r.response,
            "score": r.score,
            "components": dict(r.components),
            "tokens": len(r.response_ids),
        }
        for side, r in (("before", first), ("after", last))
    }
    return {"id": first.prompt.id, "prompt": first.prompt.text, "kl": kl, **sides}


def _write_json(path: Path, value: Any) -> None:
    durable.replace(path, json.dumps(well_formed_json(value), indent=2, ensure_ascii=False) + "\n")
