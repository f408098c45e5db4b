"""Warnings while a run goes: each rule looks at a step's metrics and says what is wrong, with the evidence and a remedy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Metrics = Mapping[str, float]


def responses_do_not_end(metrics: Metrics) -> str | None:
    """A response that is cut off has no end for the reward to judge, and its last token gets a reward it did not earn."""
    cut = 1 - metrics.get("response/ended", 1.0)
    if cut <= 0.25:
        return None
    return f"{cut:.0%} of responses end without EOS. Raise rollout.max_new_tokens, or let SFT see whole answers."


def no_signal(metrics: Metrics) -> str | None:
    """Group advantages are 0 where all answers to a prompt score the same."""
    if metrics.get("advantage/std", 1.0) > 0:
        return None
    return "every group has equal rewards: no gradient. The task is too hard, too easy, or the verifier never matches."


def unscored(metrics: Metrics) -> str | None:
    """A response without a score is left out of the step; a judge that often gives none changes what is learnt from."""
    share = metrics.get("reward/unscored", 0.0)
    if share <= 0.05:
        return None
    return f"{share:.0%} of responses got no score and were left out. See run.log for what the reward said."


def sampler_disagrees(metrics: Metrics) -> str | None:
    """The learner must see the probabilities that were sampled from."""
    gap = metrics.get("sampler_mismatch", 0.0)
    if gap < 0.01:
        return None
    return (
        f"the sampler's log-probs are up to {gap:.2g} from the learner's. With top-k or top-p that is expected: they sample "
        "another distribution than is trained. Otherwise sampler and learner hold different weights."
    )


RULES: tuple[Callable[[Metrics], str | None], ...] = (responses_do_not_end, no_signal, unscored, sampler_disagrees)


@dataclass
class Watch:
    """Says each warning once per stage, when it has held for `patience` steps in a row."""

    patience: int = 3
    held: dict[str, int] = field(default_factory=dict)

    def see(self, metrics: Metrics) -> list[str]:
        warnings = []
        for rule in RULES:
            sentence = rule(metrics)
            self.held[rule.__name__] = 0 if sentence is None else self.held.get(rule.__name__, 0) + 1
            if sentence is not None and self.held[rule.__name__] == self.patience:
                warnings.append(sentence)
        return warnings
