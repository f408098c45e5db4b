"""A claim × a library → a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rl_conformance.library import Library, NotOffered, offers
from rl_conformance.reproduce import Recorder, reproduction

Outcome = Literal["holds", "convention", "fails", "raises", "not offered"]


@dataclass(frozen=True)
class Evidence:
    """What a library gave for a claim, and what it should have given: flat float64 tensors."""

    measured: Tensor
    expected: Tensor
    conventions: Mapping[str, Tensor] = field(default_factory=dict)
    """What known other conventions would have given, by name."""


@dataclass(frozen=True)
class Claim:
    """One sentence about a library that numbers decide."""

    name: str
    sentence: str
    source: str
    """The paper or the identity that it comes from."""
    needs: tuple[str, ...]
    """The operations that it calls."""
    check: Callable[[Library], Evidence]
    tolerance: float = 1e-5
    """The largest |measured − expected| / max(1, |expected|) with which it holds."""

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Verdict:
    """What became of one claim for one library."""

    claim: str
    outcome: Outcome
    error: float | None = None
    """The largest difference from what was expected; None where nothing was measured."""
    detail: str = ""
    """The convention and where it is stated, or the exception."""
    reproduction: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values; an error that is no finite number becomes a text."""
        values = asdict(self)
        if self.error is not None and not self.error < float("inf"):
            values["error"] = "not finite"
        return values


def difference(measured: Tensor, expected: Tensor) -> float:
    """Return max |m − e| / max(1, |e|); infinite for NaN and for another number of values."""
    if measured.shape != expected.shape:
        return float("inf")
    error = (measured - expected).abs() / expected.abs().clamp(min=1)
    same = measured == expected  # infinities that agree
    return float(torch.where(same, 0.0, error).nan_to_num(nan=float("inf")).max())


def judge(claim: Claim, library: Library, key: str) -> Verdict:
    """Return the verdict of one claim. `key` is what `load` takes to find the library again."""
    if not set(claim.needs) <= offers(library):
        return Verdict(claim.name, "not offered")
    recorder = Recorder(library)
    try:
        evidence = claim.check(cast(Library, recorder))
    except NotOffered:
        return Verdict(claim.name, "not offered")
    except Exception as raised:  # whatever the library raises is reported, not hidden
        return Verdict(claim.name, "raises", detail=f"{type(raised).__name__}: {raised}")
    error = difference(evidence.measured, evidence.expected)
    if error <= claim.tolerance:
        return Verdict(claim.name, "holds", error)
    lines = reproduction(key, recorder.calls, evidence.measured, evidence.expected)
    followed = [
        name
        for name, values in evidence.conventions.items()
        if difference(evidence.measured, values) <= claim.tolerance
    ]
    stated = next((name for name in followed if name in library.states), None)
    if stated:
        detail = f"{stated} ({library.states[stated]})"
        return Verdict(claim.name, "convention", error, detail, lines)
    detail = f"agrees with: {', '.join(followed)}; not stated" if followed else ""
    return Verdict(claim.name, "fails", error, detail, lines)


def judge_all(claims: Sequence[Claim], library: Library, key: str) -> list[Verdict]:
    return [judge(claim, library, key) for claim in claims]
