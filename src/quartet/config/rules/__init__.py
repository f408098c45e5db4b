"""What cannot work: one function for each combination of settings that is refused.

A rule returns a sentence that names the key, says what is wrong and what to do, or None. Rules are
asked in the order in which the modules below are imported and stand in them, and a config is
refused with the first sentence; so a rule may rely on those before it.
"""

# isort: off
from quartet.config.rules.base import RULES
from quartet.config.rules import recipe  # noqa: F401
from quartet.config.rules import data  # noqa: F401
from quartet.config.rules import rewards  # noqa: F401
from quartet.config.rules import rl  # noqa: F401
from quartet.config.rules import training  # noqa: F401
from quartet.config.rules import processes  # noqa: F401

# isort: on
from quartet.config.tables import Config
from quartet.generation.source import Servers

__all__ = ["RULES", "first_problem", "untrained_filter"]


def first_problem(config: Config) -> str | None:
    """Return the sentence of the first rule that a config breaks, None if it breaks none."""
    return next((problem for check in RULES if (problem := check(config)) is not None), None)


def untrained_filter(config: Config) -> str | None:
    """Return a sentence if a new run would sample from another distribution than it trains; None if
    it would not. It is no rule: runs that began with such a filter can be resumed and read."""
    rollout = config.rollout
    if config.rl_stage is None or not rollout.filters or rollout.keep_mask:
        return None
    remedy = (
        "Servers do not tell which tokens they kept, so take the filter out."
        if isinstance(config.generator, Servers)
        else "Set rollout.keep_mask = true, which trains the filtered one, or take the filter out."
    )
    setting = f"rollout.{rollout.filter_setting}"
    return f"{setting}: the distribution without this filter would be trained. {remedy}"
