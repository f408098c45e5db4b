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

    def share_of(self, lengths: Sequence[int]) -> float:
        """Return the share of the tokens of all rows that these rows have; 0 where they do not
        count."""
        return self.counts * sum(lengths[i] for i in self.rows) / sum(lengths)


@dataclass(frozen=True)
class Prefix:
    """The beginning of a row. Rows with equal beginnings compute it once in a forward pass."""

    key: bytes
    length: int


REPEATED = 1 / 3
"""What a token costs that another row of the micro-batch computes, over one that is computed: its
keys and values are copied for attention, and attention goes over them."""


def cost(rows: Sequence[int], lengths: Sequence[int], prefixes: Sequence[Prefix] | None) -> float:
    """Return the tokens that rows cost in one forward pass without padding."""
    return sum(lengths[i] for i in rows) - _saved(rows, prefixes)


def _saved(rows: Sequence[int], prefixes: Sequence[Prefix] | None) -> float:
    if prefixes is None:
        return 0.0
    given = [prefixes[i] for i in rows]
    repeated = sum(p.length for p in given) - sum(p.length for p in set(given))
    return (1 - REPEATED) * repeated


def by_prefix(
    rows: Sequence[int], lengths: Sequence[int], prefixes: Sequence[Prefix] | None
) -> list[list[int]]:
    """Return rows with equal prefixes together, in the order of their longest rows; each row for
    itself where no two have one."""
    together: dict[Prefix | int, list[int]] = {}
    for row in sorted(rows, key=lambda i: (lengths[i], i)):
        prefix = None if prefixes is None or prefixes[row].length == 0 else prefixes[row]
        together.setdefault(row if prefix is None else prefix, []).append(row)
    return sorted(together.values(), key=lambda group: (lengths[group[-1]], group[-1]))


def micro_batches(
    lengths: Sequence[int], max_tokens: int, prefixes: Sequence[Prefix] | None = None
) -> list[list[int]]:
    """Return row indices in groups of at most `max_tokens` tokens each, padding included.

    A row longer than `max_tokens` is a group of its own. Rows of similar length are grouped, so
    that little of a group is padding. Rows with equal prefixes are grouped, if they fit, and count
    as `cost` has it.
    """

    def fits(rows: list[int]) -> bool:
        padded = max(lengths[i] for i in rows) * len(rows)
        return padded - _saved(rows, prefixes) <= max_tokens

    batches: list[list[int]] = []
    for group in by_prefix(range(len(lengths)), lengths, prefixes):
        if batches and not fits(batches[-1] + group) and fits(group):
            batches.append([])
        for row in group:
            if batches and (not batches[-1] or fits([*batches[-1], row])):
                batches[-1].append(row)
            else:
                batches.append([row])
    return batches


def shares(
    lengths: Sequence[int], world_size: int, prefixes: Sequence[Prefix] | None = None
) -> list[list[int]]:
    """Return the row indices of each rank, in ascending order.

    The longest remaining row goes to the rank with the fewest tokens (Graham 1969): no rank gets
    more than 4/3 of what the best division would give the busiest one. Rows with equal prefixes
    stay together where the busiest rank has less to compute then.

    >>> shares([5, 3, 3, 1], 2)
    [[0, 3], [1, 2]]
    """
    rows = range(len(lengths))
    division = _divided([[row] for row in rows], lengths, world_size, None)
    if prefixes is None or world_size == 1:
        return division
    groups = _divided(by_prefix(rows, lengths, prefixes), lengths, world_size, prefixes)

    def busiest(ranks: list[list[int]]) -> float:
        return max(cost(rank, lengths, prefixes) for rank in ranks)

    return groups if busiest(groups) < busiest(division) else division


def _divided(
    units: Sequence[Sequence[int]],
    lengths: Sequence[int],
    world_size: int,
    prefixes: Sequence[Prefix] | None,
) -> list[list[int]]:
    """Return the rows of each rank, where the rows of a unit stay together."""
    rows_by_rank: list[list[int]] = [[] for _ in range(world_size)]
    tokens = [0.0] * world_size
    costs = [cost(unit, lengths, prefixes) for unit in units]
    for number in sorted(range(len(units)), key=lambda n: (-costs[n], units[n][0])):
        rank = min(range(world_size), key=lambda r: (tokens[r], len(rows_by_rank[r]), r))
        rows_by_rank[rank] += units[number]
        tokens[rank] += costs[number]
    return [sorted(rows) for rows in rows_by_rank]
