"""Reinforcement learning with rollouts and updates at the same time.

While the learner updates on one batch, a later batch is generated with the weights from before the
update. At most `staleness` batches are generated ahead, so no rollout is more than that many
updates old when it is trained on; the algorithm's correction weights tokens for the difference.

Which weights generate which batch does not depend on timing. A checkpoint holds the batches that
wait, and a resumed run continues with them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from quartet.algorithms.algorithm import Algorithm
from quartet.experience import rollout_from_row
from quartet.io.threads import BackgroundThread, result_of
from quartet.loops.collect import Collected, Collector
from quartet.loops.progress import Clock
from quartet.loops.rl import Step
from quartet.training.learner import Learner
from quartet.training.metrics import rl_metrics, with_staleness


class Ahead:
    """The batches that have been generated and not yet trained on, the oldest first."""

    def __init__(self, staleness: int) -> None:
        self.staleness = staleness
        self.waiting: deque[Collected] = deque()

    def state(self) -> list[Any]:
        return [[batch.rollouts, batch.unscored, batch.pools] for batch in self.waiting]

    def load_state(self, state: Sequence[Any]) -> None:
        self.waiting = deque(
            Collected([rollout_from_row(row) for row in rows], *others) for rows, *others in state
        )


def rl_async(
    collector: Collector, learner: Learner, algorithm: Algorithm, ahead: Ahead, done: int = 0
) -> Iterator[Step]:
    """Yield the steps of `rl`, with `ahead.staleness` batches generated in advance."""

    def collect() -> Collected:
        return collector.collect(algorithm, learner.sampling)

    steps = learner.steps
    background = BackgroundThread("rollouts")
    try:
        for number in range(done + 1, steps + 1):
            clock = Clock()
            while len(ahead.waiting) < min(ahead.staleness, steps - number + 1):
                ahead.waiting.append(collect())
            collected = ahead.waiting.popleft()
            # The next batch is generated with the weights from before this update.
            is_needed = number + ahead.staleness <= steps
            next_batch = background.start(collect) if is_needed else None
            clock.lap("rollouts")
            batch = learner.score(collected.rollouts, algorithm)
            experience = algorithm.experience(batch)
            clock.lap("scoring")
            update = learner.update(experience, algorithm)
            clock.lap("update")
            if next_batch is not None:
                ahead.waiting.append(result_of(next_batch))
            clock.lap("waiting for rollouts")
            metrics = rl_metrics(
                collected.rollouts, collected.unscored, batch, experience, update, algorithm
            )
            metrics = with_staleness(
                metrics, collected.rollouts, batch, experience, learner.version - 1
            )
            metrics |= collected.pools
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
        background.finish()  # a rollback may follow, and uses the same random numbers
        raise
    finally:
        background.abandon()  # after an interruption; otherwise nothing is under way
