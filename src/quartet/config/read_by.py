"""Which stages read which settings, as data.

Two questions are answered from this one table: whether a setting in a file is read at all
(`Config.reads`; one that no stage reads is refused), and whether a setting had a part in what a
checkpoint holds (`quartet.runtime.resume`; one that had cannot change when a run is resumed).
"""

from collections.abc import Mapping

from quartet.stages.kinds import (
    CUSTOM,
    EVALUATION,
    ILQL,
    KINDS,
    LABEL,
    PREFERENCE,
    REWARD_MODEL,
    RL,
    SFT,
)

REWARDED = "rewarded"
"""A stage that learns from the rewards of answers it samples: an RL stage, or online DPO."""
PRETRAINING = "pretraining"
"""An RL stage that mixes demonstrations into its loss (`algorithm.ptx`)."""

ROLES = frozenset({*(kind.name for kind in KINDS), REWARDED, PRETRAINING})
"""What a stage can be here: of a kind, and one of the two above besides."""

READ_BY: Mapping[str, frozenset[str] | None] = {
    "data.sampling": frozenset({RL.name}),
    "sft": frozenset({SFT.name}),
    "sft.data": frozenset({SFT.name, PRETRAINING}),
    "label": frozenset({LABEL.name}),
    "reward_model": frozenset({REWARD_MODEL.name}),
    "preference": frozenset({PREFERENCE.name}),
    "ilql": frozenset({ILQL.name}),
    "custom": frozenset({CUSTOM.name}),
    "algorithm": frozenset({RL.name}),
    "reference": frozenset({PREFERENCE.name, CUSTOM.name, RL.name}),
    "critic": frozenset({RL.name}),
    "optim": frozenset({RL.name}),
    "optim.micro_batch_tokens": None,
    "generator": frozenset({RL.name}),
    "reward": frozenset({REWARDED, CUSTOM.name, EVALUATION.name}),
    "environment": frozenset({REWARDED, CUSTOM.name, EVALUATION.name}),
    "rollout": frozenset({REWARDED, LABEL.name, REWARD_MODEL.name, CUSTOM.name, EVALUATION.name}),
    "evaluation": frozenset({EVALUATION.name}),
    "run.steps": frozenset({RL.name}),
    "run.rollouts_every": frozenset({REWARDED, CUSTOM.name}),
    "run.offload": frozenset({RL.name}),
    "run.loop": frozenset({RL.name}),
    "run.metrics": frozenset({RL.name}),
}
"""The roles of the stages that read a table, or one key of it; a key's row counts more than its
table's. None, or no row: the whole run reads it, from before its first stage."""

CHANGES_NOTHING_LEARNT = frozenset(
    {
        "recipe",
        "launch",
        "reward_model.members",
        "generator.sleep",
        "generator.transfer",
        "run.track",
        "run.name",
        "run.folder",
        "run.offload",
        "run.rollouts_every",
        "run.checkpoint_every",
        "run.keep_last",
        "run.keep_best",
        "run.max_minutes",
        "run.rollbacks",
        "run.metrics",
    }
)
"""Tables and keys that may change when a run is resumed, whichever stage reads them. The recipe is
among them because a checkpoint is chosen only where the stages up to its own are the same, and so
is the number of reward models, each of which has a stage."""


def roles_that_read(key: str) -> frozenset[str] | None:
    """Return the roles of the stages that read a dotted key, None where the whole run does."""
    words = key.split(".")
    within = (".".join(words[:count]) for count in range(len(words), 0, -1))
    return next((READ_BY[place] for place in within if place in READ_BY), None)


def changes_what_is_learnt(key: str) -> bool:
    """Return whether another value of a dotted key can change what a stage learns."""
    words = key.split(".")
    within = {".".join(words[:count]) for count in range(1, len(words) + 1)}
    return CHANGES_NOTHING_LEARNT.isdisjoint(within)
