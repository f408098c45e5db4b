"""How the rows of a step are divided: among ranks, and into micro-batches.

Every rank knows the length of every row, so all ranks compute the same division by themselves and
need no message for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through a model in one forward pass."""

    rows: list[int]
    counts: bool = True
    """False for rows of another rank, which this rank computes only to take part in that pass:
    their losses and outputs must not be used."""


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return row indices in groups of at most `max_tokens` tokens each, padding included.

    A row longer than `max_tokens` is a group of its own. Rows of similar length are grouped, so
    that little of a group is padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def shares(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Return the row indices of each rank, in ascending order.

    The longest remaining row goes to the rank with the fewest tokens (Graham 1969): no rank gets
    more than 4/3 of what the best division would give the busiest one.

    >>> shares([5, 3, 3, 1], 2)
    [[0, 3], [1, 2]]
    """
    rows_by_rank: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0] * world_size
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(world_size), key=lambda r: (tokens[r], len(rows_by_rank[r]), r))
        rows_by_rank[rank].append(row)
        tokens[rank] += lengths[row]
    return [sorted(rows) for rows in rows_by_rank]
