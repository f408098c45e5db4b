"""Reinforcement learning with rollouts and updates at the same time.

While the learner updates on one batch, the next ones are being sampled, by the weights that there were when the update began.
A batch that is `staleness` updates ahead is the last that is begun, so no rollout is older than that when it is trained on;
what it lacks in freshness the algorithm's correction weighs. Which weights sample which batch does not depend on who is faster:
a run that is resumed goes on with the batches that were waiting.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from quartet.algorithms.algorithm import Algorithm
from quartet.concurrent import BackgroundThread
from quartet.data.sampler import Sampler
from quartet.experience import Prompt, Rollout, rollout_from
from quartet.generation.protocol import Generator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import collect
from quartet.loops.progress import Clock
from quartet.loops.rl import Step
from quartet.rewards.protocol import Weighted
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics, with_staleness

Collected = tuple[list[Rollout], float]


class Ahead:
    """Batches that have been sampled and not yet been trained on, the oldest first."""

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.waiting: deque[Collected] = deque()

    def state(self) -> list[Any]:
        return [[rollouts, unscored] for rollouts, unscored in self.waiting]

    def load_state(self, state: Sequence[Any]) -> None:
        self.waiting = deque(([rollout_from(row) for row in rows], unscored) for rows, unscored in state)


def rl_async(
    prompts: Sampler[Prompt],
    generator: Generator,
    sampling: Sampling,
    samples_per_prompt: int,
    rewards: Sequence[Weighted],
    learner: Learner,
    algorithm: Algorithm,
    steps: int,
    ahead: Ahead,
    done: int = 0,
) -> Iterator[Step]:
    """As `rl`, with `ahead.staleness` batches in advance."""

    def sampled() -> Collected:
        return collect(prompts, generator, sampling, samples_per_prompt, rewards, algorithm)

    background = BackgroundThread("rollouts")
    try:
        for number in range(done + 1, steps + 1):
            clock = Clock()
            while len(ahead.waiting) < min(ahead.staleness, steps - number + 1):
                ahead.waiting.append(sampled())
            rollouts, unscored = ahead.waiting.popleft()
            more = number + ahead.staleness <= steps
            coming = background.start(sampled) if more else None  # by the weights before this update
            clock.lap("rollouts")
            batch = learner.score(rollouts, algorithm)
            experience = algorithm.experience(batch)
            clock.lap("scoring")
            update = learner.update(experience, algorithm, train_actor=number > learner.optim.critic_warmup_steps)
            clock.lap("update")
            if coming is not None:
                ahead.waiting.append(coming.result())
            clock.lap("waiting for rollouts")
            metrics = rl_metrics(rollouts, unscored, batch, experience, update, algorithm)
            metrics = with_staleness(metrics, rollouts, batch, experience, learner.version - 1)
            generator.load_weights(learner.weights())
            clock.lap("new weights")
            algorithm = algorithm.adapt(metrics)
            yield Step(number, metrics, rollouts, batch, experience, update, algorithm, seconds=clock.laps)
    except Exception:
        background.finish()  # a rollback may follow, and draws from the same random numbers
        raise
    finally:
        background.abandon()  # where the run was interrupted; else nothing is under way
