"""What the held-out pairs of a stage are like, which the doctor compares the model with."""

from collections.abc import Sequence
from typing import Any

from quartet.data.records import Comparison


def pair_facts(pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Return the entries of a summary on held-out pairs: `held_out_pairs`, how many they are,
    `held_out_lengths`, how many of them have sides of different lengths, and
    `held_out_longer_chosen`, in which share of those the longer side is the chosen one. Unpaired
    preferences have none of the three."""
    if not pairs or not all(pair.chosen_ids and pair.rejected_ids for pair in pairs):
        return {}
    longer = [
        len(pair.chosen_ids) > len(pair.rejected_ids)
        for pair in pairs
        if len(pair.chosen_ids) != len(pair.rejected_ids)
    ]
    shares = {"held_out_longer_chosen": sum(longer) / len(longer)} if longer else {}
    return {"held_out_pairs": len(pairs), "held_out_lengths": len(longer), **shares}
