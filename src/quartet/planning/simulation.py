"""A simulation of training and generation at the same time, for the waiting that formulas do not
see."""

import heapq
import math
import random
from dataclasses import dataclass, field

from quartet.planning.cluster import ClusterPlan


@dataclass(frozen=True)
class Simulated:
    """The results of a simulation."""

    steps: int
    seconds: float
    """Seconds of a step, once the pipeline has filled."""
    staleness: list[int] = field(repr=False)
    """How many updates behind each response was when it was trained on."""
    trainer_idle: float
    """The share of the time in which the trainer waits for responses."""
    generators_idle: float
    """The share of the time in which a slot samples nothing."""


def simulate(
    slots: int,
    mean_seconds: float,
    spread: float,
    rows: int,
    update: float,
    push: float,
    bound: int,
    steps: int,
    seed: int = 0,
) -> Simulated:
    """Return the simulation of a trainer and of generators that work at the same time.

    `slots` responses are sampled at once. A response takes a time that is log-normal, with this
    mean and this spread of the logarithm. The trainer takes `rows` responses at a time, in the
    order in which they were begun, for `update` seconds. A response is only begun if it will be
    trained on no more than `bound` updates later; until then its slot waits. New weights stop every
    slot for `push` seconds.
    """
    rng = random.Random(seed)
    shift = math.log(mean_seconds) - spread**2 / 2

    def duration() -> float:
        return math.exp(rng.gauss(shift, spread)) if spread else mean_seconds

    # Responses that are sampled now: when each ends, its number, the version that began it.
    writing: list[tuple[float, int, int]] = []
    # The versions that began the responses which are complete, by number.
    ready: dict[int, int] = {}
    begun, version, now, busy, waited = 0, 0, 0.0, 0.0, 0.0
    ages: list[int] = []
    ends: list[float] = []

    def begin(at: float) -> None:
        """Begin as many responses as the bound allows: number n is trained on in step n // rows, by
        the version of that number."""
        nonlocal begun, busy
        while len(writing) < slots and begun // rows <= version + bound and begun < rows * steps:
            took = duration()
            busy += took
            heapq.heappush(writing, (at + took, begun, version))
            begun += 1

    begin(0.0)
    while version < steps:
        batch = range(rows * version, rows * (version + 1))
        missing = sum(number not in ready for number in batch)
        while missing:
            done, number, begun_by = heapq.heappop(writing)
            if done > now:
                waited, now = waited + done - now, done
            ready[number] = begun_by
            missing -= number in batch
            begin(now)
        ages += [version - ready.pop(number) for number in batch]
        end = now + update
        while writing and writing[0][0] <= end:  # slots go on while the trainer works
            done, number, begun_by = heapq.heappop(writing)
            ready[number] = begun_by
            begin(max(done, now))
        now, version = end + push, version + 1
        writing = [(done + push, number, begun_by) for done, number, begun_by in writing]
        heapq.heapify(writing)
        begin(now)
        ends.append(now)
    # Neither while the pipeline fills nor while it empties.
    first, last = len(ends) // 2, max(9 * len(ends) // 10, 1) - 1
    seconds = (ends[last] - ends[first]) / (last - first) if last > first else ends[-1] / len(ends)
    return Simulated(steps, seconds, ages, waited / now, max(1 - busy / (slots * now), 0.0))


def simulated(plan: ClusterPlan, bound: int, steps: int = 200, seed: int = 0) -> Simulated:
    """Return the simulation of a plan's split, with responses whose times vary: the spread of the
    logarithm is 0.8."""
    split, work = plan.best, plan.work
    slots = min(split.copies.rows * split.copies.count, work.rows * max(bound, 1))
    per_answer = split.generation.middle * slots / work.rows
    push = split.push.best
    return simulate(
        slots, per_answer, 0.8, work.rows, split.update.middle, push, bound, steps, seed
    )
