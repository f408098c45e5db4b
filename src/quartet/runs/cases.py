"""What the clip of a policy loss did with a token, in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Clipping:
    """Over which ratios a policy loss keeps the gradient, as the loss itself says in the record
    (`PolicyLoss.clip_range`)."""

    low: float = 0.0
    """A token with A < 0 loses its gradient below this ratio."""
    high: float = math.inf
    """A token with A > 0 loses its gradient above this ratio."""
    cap: float = math.inf
    """A token with A < 0 loses its gradient above this ratio, too: the dual clip."""
    of_response: bool = False
    """Whether the ratio is that of the whole response; the column `ratio` is each token's own."""

    @property
    def bounds(self) -> list[float] | None:
        """The two ratios to mark in a chart of the tokens' ratios; None where these are not what is
        clipped, or nothing bounds them above."""
        return None if self.of_response or math.isinf(self.high) else [self.low, self.high]

    @classmethod
    def read(cls, clip: Mapping[str, Any]) -> "Clipping":
        """Return what the entry `clip` of a `definitions` event says."""
        return cls(
            clip.get("low", 0.0),
            clip.get("high", math.inf),
            clip.get("cap", math.inf),
            clip.get("of_response", False),
        )


RISEN = "The token has risen as far as one update may take it."
FALLEN = "The token has fallen as far as one update may take it."


def clip_case(
    clipping: Clipping | None, advantage: float | None, ratio: float, clipped: bool | None
) -> str:
    """Return what the policy loss did with a token. `clipped` is the recorded column: whether the
    token had no gradient. `clipping` is None where the loss does not say over which ratios it
    clips.

    The clipped surrogate has six cases: the advantage above or below 0, with the ratio below,
    within or above the clip range. The gradient is gone in two of them.

    >>> clip_case(Clipping(0.8, 1.2), 1.5, 1.31, True)
    'advantage > 0, ratio 1.31 > 1.2: clipped, no gradient. The token has risen as far as one update may take it.'
    """  # noqa: E501  the example's output is one line
    if advantage is None or advantage == 0:
        return "advantage 0: no gradient from the policy loss."
    sign, push = ("> 0", "up") if advantage > 0 else ("< 0", "down")
    if clipping is None:
        state = "clipped, no gradient." if clipped else f"pushed {push}."
        return f"advantage {sign}, ratio {ratio:.4g}: {state}"
    if clipping.of_response:
        state = (
            "clipped by the whole response's ratio, no gradient."
            if clipped
            else f"pushed {push}; the whole response's ratio is in range."
        )
        return f"advantage {sign}: {state}"
    side, state = _case(clipping, advantage > 0, ratio, bool(clipped))
    return f"advantage {sign}, ratio {ratio:.4g} {side}: {state}"


def _case(clipping: Clipping, up: bool, ratio: float, clipped: bool) -> tuple[str, str]:
    """Return where the ratio is, and what follows from it for a token that is pushed `up` or
    down. At the edge of the range the recorded `clipped` decides: ratios are stored rounded."""
    low, high = clipping.low, clipping.high
    if clipped and up:
        return f"> {high:g}", f"clipped, no gradient. {RISEN}"
    if clipped and ratio > 1:
        return f"> {high:g}", f"clipped by the dual clip (cap {clipping.cap:g}), no gradient."
    if clipped:
        return f"< {low:g}", f"clipped, no gradient. {FALLEN}"
    if up and ratio < low:
        return f"< {low:g}", "not clipped, pushed back up: it moved against its advantage."
    if not up and ratio > high:
        return f"> {high:g}", "not clipped, pushed back down: it moved against its advantage."
    within = f"within {low:g} to {high:g}" if math.isfinite(high) else f"above {low:g}"
    return within, f"pushed {'up' if up else 'down'}."
