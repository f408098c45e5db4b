"""How far labellers agree, with each other and with themselves."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quartet.labels.log import Label

OWN = "again"
"""What stands in place of the second name where a labeller is compared with themselves."""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of labels of the same pairs agree."""

    first: str
    second: str
    pairs: int
    """How many pairs both labelled; a skipped pair is not labelled."""
    agreement: float
    """The share of the pairs with equal verdicts."""
    kappa: float | None
    """Cohen's κ; None where both always gave one and the same verdict."""

    def sentence(self) -> str:
        """Return the numbers in words."""
        kappa = "" if self.kappa is None else f", κ {self.kappa:.2f}".replace("-", "−")
        whom = (
            f"{self.first} with their own repeated labels"
            if self.second == OWN
            else f"{self.first} and {self.second}"
        )
        count = f"{self.pairs} pair{'s' * (self.pairs != 1)}"
        return f"{whom}: {count}, {self.agreement:.0%} equal{kappa}"


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return κ = (p_o − p_e) / (1 − p_e) of two lists of verdicts, entry by entry (Cohen 1960).

    p_o is the share of equal entries, p_e = Σ_k n_1k n_2k / N² the share that is expected of two
    labellers who draw independently, each with their own frequencies. None where p_e = 1.

    50 pairs, both "a" 20 times, both "b" 15 times, (a, b) 5 and (b, a) 10 times: p_o = 0.7,
    p_e = (25 · 30 + 25 · 20) / 2500 = 0.5, κ = 0.4.
    """
    count = len(first)
    if not count:
        return None
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / count
    ones, twos = Counter(first), Counter(second)
    expected = sum(ones[verdict] * twos[verdict] for verdict in ones) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def agreements(labels: Sequence[Label]) -> list[Agreement]:
    """Return the agreement of each labeller with themselves and of each two labellers, those that
    have pairs in common."""
    first: dict[str, dict[str, str]] = {}
    again: dict[str, dict[str, str]] = {}
    for label in labels:
        if label.verdict != "skip":
            table = again if label.repeat else first
            table.setdefault(label.labeller, {})[label.pair.id] = label.verdict
    found = [_agreement(name, OWN, first.get(name, {}), again[name]) for name in sorted(again)]
    found += [
        _agreement(one, two, first[one], first[two])
        for one, two in itertools.combinations(sorted(first), 2)
    ]
    return [agreement for agreement in found if agreement is not None]


def _agreement(
    one: str, two: str, first: Mapping[str, str], second: Mapping[str, str]
) -> Agreement | None:
    common = [pair for pair in first if pair in second]
    if not common:
        return None
    verdicts = [first[pair] for pair in common], [second[pair] for pair in common]
    equal = sum(x == y for x, y in zip(*verdicts, strict=True))
    return Agreement(one, two, len(common), equal / len(common), cohens_kappa(*verdicts))
