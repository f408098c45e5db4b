"""What the clip did with a token, in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clipping:
    """How a policy loss clips. `low` and `high` are how far below and above 1 a ratio may be;
    infinite where nothing clips."""

    type: str
    low: float = math.inf
    high: float = math.inf
    cap: float = math.inf
    """Dual clip: no loss above −cap · A where A < 0."""

    @classmethod
    def of(cls, policy_loss: Mapping[str, Any]) -> "Clipping":
        """From the table of a resolved config."""
        kind = policy_loss.get("type", "clip")
        window = policy_loss.get("window")
        if kind == "gmpo" and window is not None:
            return cls(kind, 1 - math.exp(-window), math.exp(window) - 1)
        if kind in {"clip", "dual_clip", "sequence_clip"}:
            return cls(
                kind,
                policy_loss.get("low", 0.2),
                policy_loss.get("high", 0.2),
                policy_loss.get("cap", math.inf),
            )
        return cls(kind)


RISEN = "The token has risen as far as one update may take it."
FALLEN = "The token has fallen as far as one update may take it."


def clip_case(
    clipping: Clipping, advantage: float | None, ratio: float, clipped: bool | None
) -> str:
    """Which of the cases of the clipped surrogate a token fell in. Its six are: the advantage above
    or below 0, with the ratio below, within or above the clip range; the gradient is gone in two of
    them.

    >>> clip_case(Clipping("clip", 0.2, 0.2), 1.5, 1.31, True)
    'advantage > 0, ratio 1.31 > 1.2: clipped, no gradient. The token has risen as far as one update
    may take it.'
    """
    if advantage is None or advantage == 0:
        return "advantage 0: no gradient from the policy loss."
    sign = "> 0" if advantage > 0 else "< 0"
    up = advantage > 0
    low, high = 1 - clipping.low, 1 + clipping.high
    if math.isinf(clipping.high):
        return f"advantage {sign}: pushed {'up' if up else 'down'}; {clipping.type} clips nothing."
    if clipping.type in {"sequence_clip", "gmpo"}:
        of = "the whole response's ratio" if clipping.type == "sequence_clip" else "its ratio"
        state = (
            f"clipped by {of}, no gradient."
            if clipped
            else f"pushed {'up' if up else 'down'}; {of} is in range."
        )
        return f"advantage {sign}: {state}"
    if clipped:
        if up:
            return f"advantage > 0, ratio {ratio:.4g} > {high:g}: clipped, no gradient. {RISEN}"
        if ratio > 1:
            return f"advantage < 0, ratio {ratio:.4g} > {high:g}: clipped by the dual clip (cap {clipping.cap:g}), no gradient."
        return f"advantage < 0, ratio {ratio:.4g} < {low:g}: clipped, no gradient. {FALLEN}"
    if up and ratio < low:
        return f"advantage > 0, ratio {ratio:.4g} < {low:g}: not clipped, pushed back up: it moved against its advantage."
    if not up and ratio > high:
        return f"advantage < 0, ratio {ratio:.4g} > {high:g}: not clipped, pushed back down: it moved against its advantage."
    return f"advantage {sign}, ratio {ratio:.4g} within {low:g} to {high:g}: pushed {'up' if up else 'down'}."
