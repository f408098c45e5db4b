"""The sets of an evaluation: rows of a file, or the rows that a run held out."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quartet.assembly.data import Rows
from quartet.assembly.evaluation.answers import key_of
from quartet.assembly.evaluation.policies import EvaluationError, labelled, run_config
from quartet.config.tables import Config
from quartet.data import DataError
from quartet.data.examples import Example
from quartet.data.files import rows
from quartet.data.shapes import Purpose, example_of, examples_in, renamed, usual
from quartet.worlds import World, make_world

Needs = Literal["prompts", "choices", "texts"]
"""What a measure reads of a set: prompts to answer; answers of which one was chosen; or texts."""


@dataclass(frozen=True)
class Choice:
    """An answer that was chosen, and one or more that were rejected, to the same prompt."""

    chosen: Example
    """A demonstration: the prompt with the chosen answer."""
    rejected: tuple[Example, ...]


@dataclass(frozen=True)
class FileSet:
    """The rows of a file."""

    name: str
    path: Path
    columns: dict[str, str]
    limit: int

    @cached_property
    def first(self) -> dict[str, Any]:
        """The first row, with Quartet's names for its columns."""
        place, row = next(rows(self.path), (None, None))
        if place is None or row is None:
            raise DataError(f"{self.path}: has no rows.")
        named = renamed(row, self.columns)
        return named if "rejected" in named else usual(place, named)[1]

    def has(self, needs: Needs) -> bool:
        keys = self.first.keys()
        if needs == "choices":
            return {"chosen", "rejected"} <= keys
        if needs == "texts":
            return bool({"text", "completion", "messages"} & keys)
        return bool({"prompt", "messages", "chosen"} & keys) and "text" not in keys

    @cached_property
    def prompts(self) -> Sequence[Example]:
        if isinstance(self.first.get("rejected"), list) and "prompt" in self.first:
            return [choice.chosen for choice in self.choices]
        return self._read("prompts")

    @cached_property
    def texts(self) -> Sequence[Example]:
        return self._read("demonstrations")

    @cached_property
    def choices(self) -> Sequence[Choice]:
        return [
            choice_of(place, usual(place, renamed(row, self.columns))[1])
            for place, row in itertools.islice(rows(self.path), self.limit)
        ]

    def _read(self, purpose: Purpose) -> Sequence[Example]:
        return list(itertools.islice(examples_in(self.path, purpose, self.columns), self.limit))

    @property
    def source(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class RunSet:
    """The rows that a run held out."""

    name: str
    run: Path
    config: Config
    world: World | None
    limit: int

    def has(self, needs: Needs) -> bool:
        if needs == "prompts":
            return True
        if self.world is not None:
            return needs == "texts" or bool(self.world.comparisons(1, held_out=True))
        stage = "reward_model" if needs == "choices" else "sft"
        return any(stage in name for name in self.config.stages)

    @cached_property
    def prompts(self) -> Sequence[Example]:
        return self._held_out("prompts")

    @cached_property
    def texts(self) -> Sequence[Example]:
        return self._held_out("demonstrations", self.config.sft.data)

    @cached_property
    def choices(self) -> Sequence[Choice]:
        held_out = self._held_out("comparisons", self.config.reward_model.data)
        return [_choice(example) for example in held_out]

    def _held_out(self, purpose: Purpose, path: str | None = None) -> Sequence[Example]:
        return list(
            itertools.islice(Rows(self.config, self.world).read(purpose, path)[1], self.limit)
        )

    @property
    def source(self) -> str:
        return str(self.run)


Set = FileSet | RunSet


def sets_of(on: Sequence[str], run: Path | None, columns: dict[str, str], limit: int) -> list[Set]:
    """Return the sets that were named, `name=file` or a file, or else the rows that the run held
    out. Raises a QuartetError where there is none, or two have one name."""
    if not on:
        if run is None:
            raise EvaluationError(
                "no set was named, and no policy is a run with rows of its own. Add --on FILE."
            )
        return [run_set(run, limit)]
    sets: list[Set] = []
    for words in on:
        name, file = labelled(words)
        path = Path(file)
        sets.append(FileSet(name or path.name.partition(".")[0], path, columns, limit))
    names = [each.name for each in sets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(f"--on: two sets are called {doubled}. Write name=file.")
    return sets


def run_set(run: Path, limit: int) -> RunSet:
    """Return the rows that a run held out."""
    config = run_config(run)
    world = world_of(config)
    if config.environment is not None or getattr(world, "environment", None) is not None:
        raise EvaluationError(
            f"{run.name}: was trained in an environment, whose turns quartet eval does not have. "
            "Its evaluation stage compares episodes; or name a set with --on."
        )
    return RunSet("held out", run, config, world, limit)


def world_of(config: Config) -> World | None:
    data = config.data
    return make_world(data.world, config.seed, data.texts) if data.world else None


def examples_of(each: Set, needs: Needs) -> Sequence[Example]:
    """Return the rows of a set as a measure reads them; of choices the chosen answers."""
    if needs == "choices":
        return [choice.chosen for choice in each.choices]
    return each.prompts if needs == "prompts" else each.texts


def row_key(example: Example) -> str:
    """Return what tells a row from others, also in another file."""
    return key_of([example.prompt, example.completion])


def choice_of(place: str, row: dict[str, Any]) -> Choice:
    """Return the answers of a row: `chosen` and `rejected`, each an answer or a list of answers, as
    RewardBench 2 has them. Raises DataError unless one is chosen."""
    if not {"chosen", "rejected"} <= row.keys():
        raise DataError(
            f"{place}: has columns {', '.join(row)}; accuracy needs chosen and rejected."
        )
    chosen, rejected = _answers(row["chosen"]), _answers(row["rejected"])
    if len(chosen) != 1 or not rejected:
        raise DataError(
            f"{place}: has {len(chosen)} chosen and {len(rejected)} rejected answers; a row needs "
            "one chosen answer and one or more rejected ones. Leave out rows with several."
        )
    pairs = [
        example_of(place, {**row, "chosen": chosen[0], "rejected": other}, "comparisons")
        for other in rejected
    ]
    choices = [_choice(pair) for pair in pairs]
    return Choice(choices[0].chosen, tuple(other for c in choices for other in c.rejected))


def _answers(cell: Any) -> list[Any]:
    """Return the answers of a cell: a text, a conversation, or a list of these."""
    if isinstance(cell, list) and not (cell and isinstance(cell[0], dict)):
        return cell
    return [cell]


def _choice(pair: Example) -> Choice:
    chosen, rejected = (
        dataclasses.replace(pair, completion=side, chosen=None, rejected=None)
        for side in (pair.chosen, pair.rejected)
    )
    return Choice(chosen, (rejected,))
