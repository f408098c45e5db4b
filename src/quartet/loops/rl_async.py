"""Reinforcement learning with rollouts and updates at the same time.

While the learner updates on one batch, the next ones are being generated, with the weights of when
the update began. At most `staleness` batches are generated ahead, so no rollout is older than that
many updates when it is trained on; the algorithm's correction weighs what it lacks in freshness.
Which weights generate which batch does not depend on which side is faster: a run that is resumed
goes on with the batches that were waiting.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from quartet.algorithms.algorithm import Algorithm
from quartet.experience import rollout_from_row
from quartet.io.threads import BackgroundThread
from quartet.loops.collect import Collected, Collector
from quartet.loops.progress import Clock
from quartet.loops.rl import Step
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics, with_staleness


class Ahead:
    """Batches that have been generated and not yet been trained on, the oldest first."""

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.waiting: deque[Collected] = deque()

    def state(self) -> list[Any]:
        return [[batch.rollouts, batch.unscored] for batch in self.waiting]

    def load_state(self, state: Sequence[Any]) -> None:
        self.waiting = deque(
            Collected([rollout_from_row(row) for row in rows], unscored) for rows, unscored in state
        )


def rl_async(
    collector: Collector, learner: Learner, algorithm: Algorithm, ahead: Ahead, done: int = 0
) -> Iterator[Step]:
    """As `rl`, with `ahead.staleness` batches generated in advance."""

    def sampled() -> Collected:
        return collector.collect(algorithm, learner.sampling)

    steps = learner.steps
    background = BackgroundThread("rollouts")
    try:
        for number in range(done + 1, steps + 1):
            clock = Clock()
            while len(ahead.waiting) < min(ahead.staleness, steps - number + 1):
                ahead.waiting.append(sampled())
            collected = ahead.waiting.popleft()
            more = number + ahead.staleness <= steps
            coming = (
                background.start(sampled) if more else None
            )  # by the weights before this update
            clock.lap("rollouts")
            batch = learner.score(collected.rollouts, algorithm)
            experience = algorithm.experience(batch)
            clock.lap("scoring")
            update = learner.update(experience, algorithm)
            clock.lap("update")
            if coming is not None:
                ahead.waiting.append(coming.result())
            clock.lap("waiting for rollouts")
            metrics = rl_metrics(
                collected.rollouts, collected.unscored, batch, experience, update, algorithm
            )
            metrics = with_staleness(
                metrics, collected.rollouts, batch, experience, learner.version - 1
            )
            collector.load_weights(learner.weights())
            clock.lap("new weights")
            algorithm = algorithm.adapt(metrics)
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
    except Exception:
        background.finish()  # a rollback may follow, and draws from the same random numbers
        raise
    finally:
        background.abandon()  # where the run was interrupted; else nothing is under way
