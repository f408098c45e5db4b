"""The rounds of a run whose recipe collects labels more than once: what their stages are called,
and where each has its results.

Earlier rounds write to `round-1/`, `round-2/`, … in the run's folder, the last one to the folder
itself. The stages of later rounds are numbered: `ppo`, `ppo.2`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quartet.runs.reader import Run

MAX_ROUNDS = 100
"""The most rounds that are read."""


def in_round(stage: str, number: int) -> str:
    """Return the name in a run of a recipe's stage that is named for the time `number`: "ppo",
    "ppo.2"."""
    return stage if number == 1 else f"{stage}.{number}"


def round_of(stage: str) -> tuple[str, int]:
    """Return what a recipe calls a stage of a run, and the number of its round: "ppo.2" is "ppo"
    of round 2."""
    name, dot, number = stage.rpartition(".")
    is_number = number.isascii() and number.isdecimal() and len(number) <= len(str(MAX_ROUNDS))
    return (name, int(number)) if dot and is_number else (stage, 1)


def num_rounds(config: Mapping[str, Any]) -> int:
    """Return how many rounds the recipe of a run has; 1 where it collects labels once or never."""
    return min(max(1, Counter(config.get("recipe") or ())["label"]), MAX_ROUNDS)


def place_of(config: Mapping[str, Any], number: int, name: str) -> str:
    """Return where a round has a file or folder of its results, relative to the run's folder."""
    return name if number == num_rounds(config) else f"round-{number}/{name}"


def probe_folders(run: "Run") -> dict[int, str]:
    """Return the folders of probes by round, of the rounds that have any."""
    numbers = range(1, num_rounds(run.config) + 1)
    places = {number: place_of(run.config, number, "probes") for number in numbers}
    return {number: place for number, place in places.items() if run.steps(place)}


def rounds_of_reward_models(run: "Run") -> dict[int, list[str]]:
    """Return the stages of the reward models that have finished, by round; of an ensemble, those of
    its members."""
    found: dict[int, list[str]] = {}
    for stage in run.series:
        name, number = round_of(stage)
        if name.partition("-")[0] == "reward_model" and run.summary(stage) is not None:
            found.setdefault(number, []).append(stage)
    return found
