"""The value of another library's option as a value of ours, for keys whose values differ.

Which key an option is, and what else is to be known, is in the table of other libraries; how a
value is written for such a key is here. Where a note of the table says `Write key = value`, or
`Add {…}`, that is what a true value becomes.
"""

import re
import tomllib
from typing import Any

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS
from quartet.errors import QuartetError

NOT_TAKEN = ("launch.", "generator.", "run.folder", "run.offload", "run.device")
"""Keys about a machine or a place, which another machine's values do not fit."""
WORDS = {
    "run.precision": {
        "bfloat16": "bf16",
        "bf16": "bf16",
        "float32": "fp32",
        "fp32": "fp32",
        "float16": "bf16",
        "auto": "auto",
    },
    "algorithm.kl.estimator": {
        "kl": "k1",
        "k1": "k1",
        "mse": "k2",
        "k2": "k2",
        "low_var_kl": "k3",
        "k3": "k3",
    },
    "algorithm.aggregation.type": {
        "token-mean": "token_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum-norm": "fixed_length",
    },
    "algorithm.advantage.std": {
        "false": "none",
        "none": "none",
        "true": "sample",
        "group": "sample",
    },
    "data.unusable": {"error": "refuse"},
    "algorithm.kl.controller.type": {"fixed": "fixed", "adaptive": "adaptive"},
}
"""How values are called here, by our key."""
PRESETS = {
    "gae": "ppo",
    "grpo": "grpo",
    "group_norm": "grpo",
    "rloo": "rloo",
    "remax": "remax",
    "opo": "opo",
    "reinforce": "reinforce_pp",
    "reinforce_plus_plus": "reinforce_pp",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "reinforce_baseline": "reinforce_pp_baseline",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "cispo": "cispo",
    "gspo": "gspo",
    "sequence": "gspo",
    "sapo": "sapo",
    "geo_mean": "gmpo",
    "gmpo": "gmpo",
    "sigmoid": "dpo",
    "ipo": "ipo",
    "simpo": "simpo",
    "kto": "kto",
}
"""Our preset for a value of `adv_estimator`, `advantage_estimator`, `loss_type`, `loss_mode` or
`importance_sampling_level`."""
LOSSES = ("cispo", "gspo", "sapo", "gmpo")
"""Presets that are GRPO with another policy loss."""
USUAL = ("vanilla", "token", "ppo")
"""Values of an option for the policy loss that change nothing."""


class Unlike(QuartetError):
    """A value that has no counterpart for our key. The message says why, as a sentence."""


def preset_of(value: Any) -> str | None:
    """Return the preset that a value of an estimator or a loss names, None if there is none."""
    name = PRESETS.get(str(value).lower().rpartition(".")[2])
    return name if name in ALGORITHMS or name in PREFERENCES else None


def value_for(key: str, name: str, value: Any, note: str) -> Any:
    """Return a value for our key. Raises `Unlike`."""
    if key.startswith(NOT_TAKEN) or key in NOT_TAKEN:
        raise Unlike(note or "It depends on the machine: set it here for yours.")
    if (word := str(value).lower()) in WORDS.get(key, ()):
        return WORDS[key][word]
    if key in WORDS and not isinstance(value, bool):
        raise Unlike(f"{key} has no {value!r}. {note}".strip())
    if key == "optim.micro_batch_tokens" and "token" not in name:
        raise Unlike("Here micro-batches are cut by tokens: optim.micro_batch_tokens.")
    if key == "run.track":
        return _trackers(name, value)
    if key.endswith((".betas",)) and not isinstance(value, list | tuple):
        raise Unlike(note)
    if isinstance(value, bool) and not takes_truth(key):
        if not value:
            raise Unlike(f"It is off there. Here: {note or f'see quartet explain {key}'}")
        return written_in(note) if "Write" in note else _unsaid(note)
    return list(value) if isinstance(value, tuple) else value


def takes_truth(key: str) -> bool:
    """Return whether our key has true and false as values."""
    from quartet.config.explain import headlines

    return any("true or false" in line for line in headlines(key))


def written_in(note: str) -> Any:
    """Return the value of `Write key = value` in a note. Raises `Unlike` where it has none."""
    match = re.search(r"Write [\w.]+ = (\{.*?\}|\[.*?\]|\"[^\"]*\"|[\w.]+)", note)
    return tomllib.loads(f"value = {match[1]}")["value"] if match else _unsaid(note)


def added_in(note: str, value: Any) -> dict[str, Any]:
    """Return the row of `Add {…} to the list`, with the option's number where the row has one."""
    match = re.search(r"Add (\{.*?\})", note)
    if not match or value is False or value is None:
        raise Unlike(note or "It is off.")
    row: dict[str, Any] = tomllib.loads(f"value = {match[1]}")["value"]
    numbers = [key for key, number in row.items() if isinstance(number, float)]
    given = [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
    if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
        given = [max(abs(each) for each in value)]
    if numbers and given:
        row[numbers[0]] = float(given[0])
    return row


def _trackers(name: str, value: Any) -> list[str]:
    known = ("tensorboard", "wandb", "trackio", "mlflow")
    text = f"{name} {value}".lower()
    trackers = [tracker for tracker in known if tracker in text]
    if not trackers or value is False:
        raise Unlike(f"Known trackers are {', '.join(known)}.")
    return trackers


def _unsaid(note: str) -> Any:
    raise Unlike(note or "Its value means something else here.")
