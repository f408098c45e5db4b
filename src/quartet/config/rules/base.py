"""What a rule is."""

from collections.abc import Callable

from quartet.algorithms.update import TrustRegion
from quartet.config.tables import Config

Rule = Callable[[Config], str | None]

RULES: list[Rule] = []
"""All rules, in the order in which they are asked."""


def rule(function: Rule) -> Rule:
    """Add a function to `RULES`."""
    RULES.append(function)
    return function


def has_trust_region(config: Config) -> bool:
    """Return whether the RL stage solves for its steps, with products of second derivatives."""
    return config.algorithm is not None and isinstance(config.algorithm.update, TrustRegion)
