"""pass@k and maj@k of several answers to the same prompt. Imports no torch."""

import math
from collections.abc import Hashable, Sequence


def pass_at_k(num_right: int, n: int, k: int) -> float:
    """Return the chance that one or more of k answers are right, when `num_right` of n are: the
    unbiased estimate 1 − C(n − c, k) / C(n, k) (Chen et al. 2021, equation 1).

    One right of four, two drawn: 1 − 3 / 6.

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    return 1 - math.comb(n - num_right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable], scores: Sequence[float], k: int) -> float:
    """Return the expected score of the most frequent answer among k that are drawn without
    replacement (Wang et al. 2022, self-consistency), over all C(n, k) draws.

    An answer of None does not vote, and a draw without votes scores 0. Among equally frequent
    answers one is chosen with equal chances.

    Of "7", "7" (right) and "9" (wrong), two drawn: "7" wins one draw of three, and the other two
    are tied: 1/3 + 2/3 · 1/2.

    >>> round(maj_at_k(["7", "7", "9"], [1.0, 1.0, 0.0], 2), 4)
    0.6667
    """
    classes: dict[Hashable, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            classes.setdefault(answer, []).append(score)
    silent = sum(answer is None for answer in answers)
    total = 0.0
    for answer, own in classes.items():
        others = [len(each) for name, each in classes.items() if name != answer]
        worth = sum(own) / len(own)
        if worth:
            total += worth * _ways_to_win(len(own), others, silent, k)
    return total / math.comb(len(answers), k)


def _ways_to_win(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """Return the number of draws of k in which a class of `own` answers is the most frequent; a
    draw in which t others are as frequent counts 1 / (t + 1)."""
    ways = 0.0
    for votes in range(1, min(own, k) + 1):
        # rest[(drawn, tied)]: the ways to draw so many of the others, so many classes tied
        rest = {(0, 0): 1}
        for count in others:
            following: dict[tuple[int, int], int] = {}
            for (drawn, tied), known in rest.items():
                for more in range(min(count, votes, k - votes - drawn) + 1):
                    place = drawn + more, tied + (more == votes)
                    following[place] = following.get(place, 0) + known * math.comb(count, more)
            rest = following
        ways += math.comb(own, votes) * sum(
            known * math.comb(silent, k - votes - drawn) / (tied + 1)
            for (drawn, tied), known in rest.items()
        )
    return ways


def best_of(chosen: float, rejected: Sequence[float]) -> float:
    """Return 1 where the chosen answer scores higher than each rejected one, 0 where one of these
    scores higher, and 1 / m where m answers, the chosen one among them, share the highest score:
    the chance that a random choice among them is right.

    >>> best_of(1.0, [0.5, 1.0, 0.2])
    0.5
    """
    highest = max(rejected)
    if chosen != highest:
        return float(chosen > highest)
    return 1 / (1 + sum(score == highest for score in rejected))
