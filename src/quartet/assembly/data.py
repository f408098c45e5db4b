"""The rows of a run, from its world or its files: those to train on and those held out."""

import dataclasses
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet.assembly.user_code import code_files
from quartet.config.tables import Config
from quartet.data import DataError
from quartet.data.disk_rows import DiskRows, Subset
from quartet.data.examples import Example
from quartet.data.files import check_there, label_notes
from quartet.data.shapes import Purpose, examples_in, read_examples
from quartet.files import fingerprint
from quartet.worlds import World

Split = tuple[Sequence[Example], Sequence[Example]]


@dataclass(frozen=True)
class Rows:
    """Reads the rows of a run."""

    config: Config
    world: World | None
    notes: list[str] = field(default_factory=list)
    """A sentence for each file of labels that was read."""

    def check_files(self) -> None:
        """Raise `DataError` where a file that the config names is not there. Nothing is read."""
        earlier = self.config.label.earlier  # the stage that reads it says more
        for path in _named_files(self.config):
            if earlier is None or path != Path(earlier):
                check_there(path)

    def read_labels(self, folder: Path) -> Split:
        """Return the comparisons that a stage `label` left in a folder: those to train on and those
        held out."""
        data = dataclasses.replace(self.config.data, columns={}, shape=None, eval=None)
        labelled = dataclasses.replace(self.config, data=data)
        return Rows(labelled, self.world, self.notes).read("comparisons", str(folder))

    def read(self, purpose: Purpose, path: str | None = None) -> Split:
        """Return the rows to train on and the rows held out. They come from the file `path` if a
        stage has one of its own, else from the world or the files of the config."""
        data = self.config.data
        if path is None and self.world is not None:
            rows_of = getattr(self.world, "comparisons" if purpose == "preferences" else purpose)
            count = data.held_out_rows
            if purpose == "prompts":
                count = max(count, self.config.evaluation.prompts)
            return rows_of(data.rows), rows_of(count, held_out=True)
        files = (path,) if path is not None else data.files
        weights = (1.0,) * len(files) if path is not None or data.weights is None else data.weights
        rows, train, held_out = DiskRows(Example), array("Q"), array("Q")
        for file, weight in zip(files, weights, strict=True):
            first = len(rows)
            self.notes.extend(note for note in label_notes(Path(file)) if note not in self.notes)
            for example in examples_in(Path(file), purpose, data.columns, data.shape):
                rows.append(example)
            end_of_train = first + self._num_train(file, len(rows) - first)
            train.extend(weighted_places(range(first, end_of_train), weight, self.config.seed))
            held_out.extend(range(end_of_train, len(rows)))
        others: Sequence[Example] = Subset(rows, held_out)
        if data.eval is not None:
            others = read_examples(Path(data.eval), purpose, data.columns, data.shape)
        # of prompts, evaluation.prompts says how many are answered
        most = len(others) if purpose == "prompts" else data.held_out_rows
        return Subset(rows, train), spread(others, most)

    def _num_train(self, file: str, count: int) -> int:
        """Return how many of a file's `count` rows to train on; the others are held out. Raises
        `DataError` if there are too few."""
        data = self.config.data
        if not count:
            raise DataError(f"{file}: has no rows.")
        if data.eval is not None:
            return count
        if count < 2:
            raise DataError(
                f"{file}: has one row; to hold some out it needs two or more. Or set data.eval."
            )
        return count - min(count - 1, max(1, round(count * data.held_out)))

    def texts(self) -> Iterator[str]:
        """Yield all texts of the files, to train a tokenizer on."""
        data, config = self.config.data, self.config
        files = (*data.files, config.sft.data, config.reward_model.data)
        paths = {path for path in files if path}
        for path in sorted(paths):
            for example in examples_in(Path(path), None, data.columns, data.shape):
                for cell in (example.prompt, example.completion, example.chosen, example.rejected):
                    if cell is not None:
                        yield from plain_texts(cell)


def spread(rows: Sequence[Example], most: int) -> Sequence[Example]:
    """Return at most so many of the rows, evenly spread over all of them."""
    if len(rows) <= most:
        return rows
    return Subset(rows, [i * len(rows) // most for i in range(most)])


def fingerprints(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each file that rows come from, and of each file of the user's code, by
    the path that the config has. A resumed run must have the same ones."""
    digests: dict[str, str] = {}
    for path in _named_files(config):
        folder_files = (file for file in path.rglob("*") if file.is_file())
        files = sorted(folder_files) if path.is_dir() else [path] if path.is_file() else []
        digests |= {str(file): fingerprint(file)["sha256"] for file in files}
    code = {place: fingerprint(file)["sha256"] for place, file in code_files(config).items()}
    return digests | code


def _named_files(config: Config) -> list[Path]:
    """Return the files and folders of rows that the config names."""
    data, stages = config.data, (config.sft, config.reward_model, config.preference, config.ilql)
    named = (
        *data.files,
        data.texts,
        data.eval,
        data.pretraining,
        config.label.earlier,
        *(stage.data for stage in stages),
    )
    return sorted({Path(name) for name in named if name})


def plain_texts(cell: Any) -> list[str]:
    """Return the text of a cell, or the texts of the messages if it is a conversation."""
    return [cell] if isinstance(cell, str) else [message["content"] for message in cell]


def weighted_places(places: range, weight: float, seed: int) -> Iterator[int]:
    """Yield each place as often as the weight says. With 2.5, all places come twice, and a random
    half of them a third time."""
    whole = int(weight)
    for _ in range(whole):
        yield from places
    yield from random.Random(seed).sample(places, round((weight - whole) * len(places)))
