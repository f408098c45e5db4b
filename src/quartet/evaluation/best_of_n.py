"""Best-of-n sampling from the initial policy: the reward it reaches and its KL. It is the baseline
that training must exceed at equal KL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class BestOf:
    """Mean rewards of the best of n responses."""

    n: int
    kl: float
    """log n − (n − 1) / n, in nats (Stiennon et al. 2020, appendix G.3)."""
    reward: float
    gold: float | None


def best_of_n(
    rewards: Sequence[Sequence[float]], gold: Sequence[Sequence[float]] | None
) -> list[BestOf]:
    """Return, for n = 1, 2, 4 … up to the number N of responses to each prompt, the mean reward and
    gold reward of the response with the highest reward among n.

    The estimate uses all N responses and is unbiased (Nakano et al. 2021, appendix I): the response
    of rank i from below is the best of a random n with probability C(i − 1, n − 1) / C(N, n).

    Of four answers, of their six pairs, and of all four together:

    >>> [round(point.reward, 3) for point in best_of_n([[1.0, 2.0, 6.0, 3.0]], None)]
    [3.0, 4.333, 6.0]
    """
    smallest_group = min(len(answers) for answers in rewards)
    sizes = [2**power for power in range(smallest_group.bit_length()) if 2**power <= smallest_group]
    return [
        BestOf(
            n,
            math.log(n) - (n - 1) / n,
            _mean([_expected(answers, answers, n) for answers in rewards]),
            None
            if gold is None
            else _mean([_expected(r, g, n) for r, g in zip(rewards, gold, strict=True)]),
        )
        for n in sizes
    ]


def _expected(rewards: Sequence[float], worth: Sequence[float], n: int) -> float:
    order = sorted(range(len(rewards)), key=lambda i: rewards[i])
    chances = _chances(len(order), n)
    return sum(chance * worth[i] for chance, i in zip(chances, order, strict=True))


@cache
def _chances(count: int, n: int) -> list[float]:
    """Return the probability of each rank, from below, to be the best of n out of `count`."""
    ways = math.comb(count, n)
    return [math.comb(rank, n - 1) / ways for rank in range(count)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
