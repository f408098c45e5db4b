"""Reinforcement learning from a reward: the loop, readable in a minute."""

from collections.abc import Iterator
from dataclasses import dataclass

from quartet.algorithms.algorithm import Algorithm
from quartet.experience import Batch, Experience, Rollout
from quartet.loops.collect import Collector
from quartet.loops.progress import Clock, Progress
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics
from quartet.training.update import Update


@dataclass(frozen=True)
class Step(Progress):
    """One turn of the loop: the numbers, and everything they were computed from."""

    rollouts: list[Rollout]
    batch: Batch
    experience: Experience
    update: Update
    algorithm: Algorithm
    """The algorithm of the next step: its coefficients have adapted to this one."""


def rl(
    collector: Collector, learner: Learner, algorithm: Algorithm, done: int = 0
) -> Iterator[Step]:
    """Generate and reward, score, estimate, update, load weights, adapt, until `learner.steps`
    steps are done. `done` is the number of steps that were done before."""
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
        algorithm = algorithm.adapt(metrics)  # coefficients that follow what was measured
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
