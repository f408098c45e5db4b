"""Reinforcement learning from a reward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from quartet.algorithms.algorithm import Algorithm
from quartet.experience import Batch, Experience
from quartet.loops.collect import Collector
from quartet.loops.progress import Clock, Sampled
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics
from quartet.training.update import Update


@dataclass(frozen=True)
class Step(Sampled):
    """One step of the loop: its metrics, and everything that they were computed from."""

    batch: Batch
    experience: Experience
    update: Update
    algorithm: Algorithm
    """The algorithm of the next step, with coefficients adapted to this one."""


@runtime_checkable
class Loop(Protocol):
    """A loop in the place of `rl`, which a user may have written."""

    def __call__(
        self, collector: Collector, learner: Learner, algorithm: Algorithm, done: int
    ) -> Iterator[Step]: ...


def rl(
    collector: Collector, learner: Learner, algorithm: Algorithm, done: int = 0
) -> Iterator[Step]:
    """Yield the steps that follow the first `done` ones, up to `learner.steps`. Each collects
    rollouts, scores them, estimates advantages, updates the models, gives the generator the new
    weights, and adapts the algorithm's coefficients."""
    for number in range(done + 1, learner.steps + 1):
        clock = Clock()
        collected = collector.collect(algorithm, learner.sampling)
        clock.lap("rollouts")
        batch = learner.score(collected.rollouts, algorithm)  # old and reference log-probs, values
        experience = algorithm.experience(batch)  # token rewards, advantages, returns
        clock.lap("scoring")
        update = learner.update(experience, algorithm)
        collector.load_weights(learner.weights())
        clock.lap("update")
        metrics = rl_metrics(
            collected.rollouts, collected.unscored, batch, experience, update, algorithm
        )
        metrics |= collected.pools
        algorithm = algorithm.adapt(metrics)  # coefficients that follow the metrics
        yield Step(
            number,
            metrics,
            collected.rollouts,
            batch,
            experience,
            update,
            algorithm,
            seconds=clock.laps,
        )
