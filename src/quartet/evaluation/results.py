"""From the numbers of rows to the results of an evaluation: estimates, comparisons, their tests.
Imports no torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    holm,
    length_controlled,
    perplexity,
    share_or_mean,
    sign_test,
    wilson,
)

Value = float | None


@dataclass(frozen=True)
class Measured:
    """The numbers that a measure gives a policy on a set, one per row; None where it has none."""

    policy: str
    set: str
    measure: str
    values: Sequence[Value]
    needs: str = "prompts"
    """What the rows are: prompts, choices or texts."""
    higher_is_better: bool = True
    is_compared: bool = True
    """Whether two policies are compared by it."""
    is_pairwise: bool = False
    """Whether the values are wins over the policy compared with: 1, ½ or 0."""
    tokens: Sequence[int] | None = None
    """Of perplexity, whose values are the losses of texts: their tokens."""
    lengths: Sequence[float] | None = None
    """The mean length of the answers to each prompt, in characters."""

    @property
    def place(self) -> dict[str, str]:
        return {"policy": self.policy, "set": self.set, "measure": self.measure}

    @property
    def estimate(self) -> Estimate | None:
        """The measure over all rows; None where no row has a number."""
        known = [value for value in self.values if value is not None]
        if not known:
            return None
        if self.tokens is not None:
            return perplexity(known, self.tokens)
        if self.is_pairwise or self.needs == "choices":  # shares, in which ties count a part
            return wilson(math.fsum(known) / len(known), len(known))
        return share_or_mean(known)


def cell(measured: Measured) -> dict[str, Any]:
    """Return a row of the table of results."""
    return estimated(measured.place, measured.estimate, measured.values)


def estimated(
    place: Mapping[str, str], estimate: Estimate | None, values: Sequence[Value]
) -> dict[str, Any]:
    known = sum(value is not None for value in values)
    numbers = vars(estimate) if estimate else dict.fromkeys(("value", "low", "high"))
    return {**place, "n": known, "missing": len(values) - known, **numbers}


def comparison(measured: Measured, rival: Measured | None, against: str) -> dict[str, Any] | None:
    """Return how a policy does against another on the same rows; None where no row has the numbers
    of both. A pairwise measure needs no numbers of the `rival`. `p` is the sign test's; ties are
    left out of it. `mean_difference` and `length_difference` (in characters) are the policy's mean
    minus the rival's, with the interval of the paired bootstrap."""
    pairs = _pairs(measured, rival)
    if not pairs:
        return None
    shares = [share for _, share, _ in pairs]
    wins, losses = (sum(share == side for share in shares) for side in (1.0, 0.0))
    differences = [difference for *_, difference in pairs if difference is not None]
    result: dict[str, Any] = {
        **measured.place,
        "against": against,
        "n": len(pairs),
        "wins": wins,
        "losses": losses,
        "ties": len(pairs) - wins - losses,
        "win_rate": vars(wilson(math.fsum(shares) / len(shares), len(shares))),
        "length_controlled": None,
        "mean_difference": vars(bootstrap_mean(differences)) if differences else None,
        "length_difference": None,
        "p": sign_test(wins, losses),
    }
    lengths, rival_lengths = measured.lengths, None if rival is None else rival.lengths
    if lengths is not None and rival_lengths is not None:
        longer = [lengths[row] - rival_lengths[row] for row, *_ in pairs]
        result["length_controlled"] = vars(length_controlled(shares, longer))
        result["length_difference"] = vars(bootstrap_mean(longer))
    return result


def _pairs(measured: Measured, rival: Measured | None) -> list[tuple[int, float, float | None]]:
    """Return for each row with both numbers its index, the share of a win and the difference."""
    if measured.is_pairwise:
        known = [(row, v) for row, v in enumerate(measured.values) if v is not None]
        return [(row, _rounded(value), None) for row, value in known]
    assert rival is not None
    pairs: list[tuple[int, float, float | None]] = []
    for row, (own, other) in enumerate(zip(measured.values, rival.values, strict=True)):
        if own is not None and other is not None:
            better = own - other if measured.higher_is_better else other - own
            pairs.append((row, 0.5 + 0.5 * math.copysign(better != 0, better), own - other))
    return pairs


def _rounded(share: float) -> float:
    """Return the side that won more of a prompt's comparisons: 1, 0, or ½."""
    return 1.0 if share > 0.5 else 0.0 if share < 0.5 else 0.5


def corrected(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons with `p_holm`, corrected for how many there are."""
    adjusted = holm([each["p"] for each in comparisons])
    return [each | {"p_holm": p} for each, p in zip(comparisons, adjusted, strict=True)]


def compare_evaluations(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return each policy of the second evaluation against each of the first, on the rows that both
    have, by the measures that both have. Measures of `pairwise_in_both` are left out. Raises
    KeyError, IndexError or TypeError where one has another form."""
    found = []
    for name, before, after in _of_one_measure(first, second):
        if after["is_compared"] and not (before["is_pairwise"] or after["is_pairwise"]):
            old, new = _on_common_rows(
                (first["items"][name]["keys"], before), (second["items"][name]["keys"], after)
            )
            found.append(comparison(new, old, old.policy))
    return corrected([each for each in found if each is not None])


def pairwise_in_both(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the pairwise measures that both evaluations have. Their values are wins over a policy
    of the own evaluation, so they do not say which of two policies in different evaluations is
    better."""
    pairs = _of_one_measure(first, second)
    both = [after for _, before, after in pairs if before["is_pairwise"] or after["is_pairwise"]]
    return list(dict.fromkeys(each["measure"] for each in both))


def _of_one_measure(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the sets that both evaluations have, with what each measured there by one measure."""
    for name in first["items"]:
        if name in second["items"]:
            for after in second["items"][name]["measured"]:
                for before in first["items"][name]["measured"]:
                    if before["measure"] == after["measure"]:
                        yield name, before, after


def _on_common_rows(
    *sides: tuple[Mapping[str, Sequence[str]], Mapping[str, Any]],
) -> list[Measured]:
    """Return what each evaluation measured, on the rows that both have. A side is the keys of its
    rows by what they are, and its numbers."""
    places = [
        {key: place for place, key in enumerate(keys[measured["needs"]])}
        for keys, measured in sides
    ]
    rows = [key for key in places[0] if key in places[1]]
    found = []
    for own, (_, measured) in zip(places, sides, strict=True):
        columns = {
            name: None if measured[name] is None else [measured[name][own[key]] for key in rows]
            for name in ("values", "tokens", "lengths")
        }
        found.append(Measured(**{**measured, **columns}))
    return found
