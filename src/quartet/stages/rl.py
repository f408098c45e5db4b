"""The RL stage: PPO and every other algorithm that learns from rewards."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from quartet.algorithms.algorithm import Algorithm
from quartet.data.prompt_sampling import PromptSampler, PromptSampling
from quartet.data.records import Demonstration
from quartet.errors import PartError
from quartet.experience import Prompt, Rollout
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.io.activity import activity
from quartet.loops.collect import Collector
from quartet.loops.rl import Loop, Step, rl
from quartet.loops.rl_async import Ahead, rl_async
from quartet.loops.sft import held_out_loss
from quartet.models.language_model import save
from quartet.models.protocols import Tokenizer
from quartet.recording.model_card import write_generation_config
from quartet.recording.tokens import TokenTexts, probe_table, write_tokens
from quartet.rewards.protocol import Weighted
from quartet.rewards.reward_model import ModelReward
from quartet.stages.probes import FirstAnswers, WinRateProbe
from quartet.stages.protocol import StageRun, Summary
from quartet.stages.rounds import ONLY_ROUND, Round
from quartet.training.learner import Learner
from quartet.training.metrics import sampler_ratio
from quartet.training.state_tree import Stateful, Tree

PROBE_COUNT = 20
"""How many times an RL stage evaluates its probes."""
MAX_LOG_PERPLEXITY = 50.0
"""Above this the perplexity of the held-out texts is cut off, so that it stays a finite number."""


@dataclass(frozen=True)
class RLComponents:
    """The models and objects of an RL stage, loaded."""

    learner: Learner
    generator: Generator
    rewards: Sequence[Weighted]
    sample_probes: Callable[[], Sequence[Rollout]] = tuple
    """Returns the `FirstAnswers.probes` of the policy as it is now."""
    texts: Sequence[Demonstration] = ()
    """Held-out demonstrations, to see whether the policy forgets what SFT taught."""
    win_rate_probe: WinRateProbe | None = None

    def probe_metrics(
        self, first: FirstAnswers, algorithm: Algorithm, stale: bool
    ) -> dict[str, float]:
        """Return what is measured only now and then, by metric name: the win rate, the perplexity
        of the held-out texts, and the drift of reward models.

        `stale` says that the step's rollouts were sampled with older weights, so that the step
        itself could not compare the sampler's probabilities with the learner's.
        """
        with activity("win rate"):
            metrics = self._win_rate(first.compared, algorithm, stale)
        if self.texts:
            learner = self.learner
            actor, tokens = learner.models.actor, learner.budget.scoring_tokens
            with activity("held-out texts"):
                loss = held_out_loss(actor, self.texts, tokens, learner.process_group)
            metrics["policy/sft_perplexity"] = math.exp(min(loss, MAX_LOG_PERPLEXITY))
        with activity("reward drift"):
            drift = self._reward_drift(first.probes)
        if drift:
            metrics["reward/drift"] = statistics.fmean(drift)
        return metrics

    def _win_rate(
        self, before: Sequence[Rollout], algorithm: Algorithm, stale: bool
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        probe = self.win_rate_probe
        responses = probe.respond() if probe is not None else []
        if probe is not None and before and (rate := probe.win_rate(before, responses)) is not None:
            metrics["policy/win_rate"] = rate
        # Version −1 is never current, so the learner computes all log-probs itself.
        scored = [
            dataclasses.replace(r, policy_version=-1) for r in responses if r.score is not None
        ]
        if stale and scored:
            metrics["sampler_ratio"] = sampler_ratio(self.learner.score(scored, algorithm))
        return metrics

    def _reward_drift(self, probes: Sequence[Rollout]) -> list[float]:
        """Return how far each reward model's score of each probe is from its first score. Reward
        models are frozen: anything but 0 is a fault."""
        models = [w.reward for w in self.rewards if isinstance(w.reward, ModelReward)]
        return [
            abs((score or 0.0) - (probe.components[model.name] or 0.0))
            for model in models
            for score, probe in zip(model.score(probes), probes, strict=True)
        ]


def checked(loop: Iterator[Any], done: int) -> Iterator[Step]:
    """Yield the steps of a loop, which a user may have written. Raises `PartError` for anything
    that is not the next step."""
    for expected, step in enumerate(loop, done + 1):
        if not isinstance(step, Step):
            raise PartError(f"run.loop: yielded a {type(step).__name__}, not a quartet.Step.")
        if step.number != expected:
            raise PartError(f"run.loop: yielded step {step.number} in the place of {expected}.")
        yield step


class AlgorithmState:
    """The algorithm as it is after the last step: adaptive coefficients are part of a
    checkpoint."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.now = algorithm

    def state(self) -> Tree:
        return dataclasses.asdict(self.now)

    def load_state(self, state: Tree) -> None:
        self.now = TypeAdapter(Algorithm).validate_python(state)


@dataclass(frozen=True)
class RLStage:
    """Trains a policy on rewards. Writes, in the folder of its round, `policy/`; `critic/` if there
    is one; `policy_ema/` if an average of the weights is kept; and `probes/`, what the models say
    of the same few responses as the stage proceeds."""

    name: str
    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    load_components: Callable[[Path], RLComponents]
    algorithm: Algorithm
    sampling: Sampling
    samples_per_prompt: int
    prompts_per_step: int
    num_steps: int
    """The number of the last step. Steps of a later round count on from those before."""
    seed: int
    prompt_sampling: PromptSampling
    staleness: int = 0
    rounding: str = "fp32"
    """What samples, a key of `TOLERANCES`: the learner's module in "fp32" or "bf16", or another
    program ("engine", and "engine, bf16" where the learner computes in bfloat16)."""
    starts_at_reference: bool = True
    """Whether the reference is the model that the stage starts from."""
    loop: Loop = rl
    """What takes the steps, where none is sampled ahead."""
    first_step: int = 0
    """The number of the last step of the rounds before."""
    round: Round = ONLY_ROUND
    writes_probes: bool = True
    """Whether what the models say of the probes is written to the run's folder."""

    samples: ClassVar[bool] = True
    """Whether its steps have rollouts."""

    @property
    def title(self) -> str:
        return self.name

    def begin(self, folder: Path) -> StageRun:
        components, place = self.load_components(folder), self.round.folder(folder)
        algorithm = AlgorithmState(self.algorithm)
        prompts = PromptSampler(
            self.prompts, self.prompts_per_step, self.seed, self.prompt_sampling
        )
        ahead, texts, first = Ahead(self.staleness), TokenTexts(self.tokenizer), FirstAnswers()
        learner, generator = components.learner, components.generator

        def write_probes(number: int) -> None:
            if not (self.writes_probes and first.probes):
                return
            with activity("probes"):
                table = probe_table(number, learner, first.probes, algorithm.now, texts)
            if learner.process_group.is_rank_zero:
                write_tokens(table, place / "probes" / f"{number:06d}.parquet")

        def steps(number: int) -> Iterator[Step]:
            done = max(0, number - self.first_step)
            if done == 0:  # before the first step is timed
                first.sample(components.sample_probes, components.win_rate_probe)
            return following(done)

        def following(done: int) -> Iterator[Step]:
            if done == 0:
                write_probes(self.first_step)
            else:
                generator.load_weights(learner.weights())
            collector = Collector(prompts, generator, components.rewards, self.samples_per_prompt)
            if self.staleness:
                loop = rl_async(collector, learner, algorithm.now, ahead, done)
            else:
                loop = self.loop(collector, learner, algorithm.now, done)
            for own in checked(loop, done):
                algorithm.now = own.algorithm
                step = dataclasses.replace(own, number=self.first_step + own.number)
                if not self._probed(step.number):
                    yield step
                    continue
                write_probes(step.number)
                stale = "sampler_ratio" not in step.metrics
                metrics = step.metrics | components.probe_metrics(first, algorithm.now, stale)
                yield dataclasses.replace(step, metrics=metrics)

        def finish() -> Summary:
            self._save(learner, place)
            return {}

        stateful: dict[str, Stateful] = {
            "learner": learner,
            "generator": generator,
            "prompts": prompts,
            "algorithm": algorithm,
            "first_answers": first,
        }
        if self.staleness:
            stateful["ahead"] = ahead
        optimizers = list(learner.optimizers.values())
        settle = learner.placement.settle
        return StageRun(steps, finish, stateful, optimizers, learner.budget, settle)

    def _probed(self, number: int) -> bool:
        """Whether the probes are evaluated after this step: `PROBE_COUNT` times, and at the end."""
        return number % math.ceil(self.num_steps / PROBE_COUNT) == 0 or number == self.num_steps

    def _save(self, learner: Learner, folder: Path) -> None:
        actor, process_group = learner.models.actor, learner.process_group
        sampling = dataclasses.asdict(self.sampling)
        save(actor, self.tokenizer, folder / "policy", process_group)
        learner.models.save_critic(folder / "critic", self.tokenizer, process_group)
        if learner.ema is not None:
            save(actor, self.tokenizer, folder / "policy_ema", process_group, learner.ema.average)
        for name in ("policy", "policy_ema"):
            if process_group.is_rank_zero and (folder / name).is_dir():
                write_generation_config(folder / name, sampling)
