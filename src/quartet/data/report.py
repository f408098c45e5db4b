"""What `quartet data` says of a file: its shape, how long its rows are, two of them rendered, and
what is wrong with it.

Rows are read one by one and forgotten; what is kept of each are lengths and a hash.
"""

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from quartet.data import DataError
from quartet.data.examples import Example, Text
from quartet.data.files import Row, label_notes, rows
from quartet.data.row_shape import RowShape
from quartet.data.shapes import Purpose, example_of, renamed, usual
from quartet.models.protocols import Tokenizer

MOJIBAKE = ("\N{REPLACEMENT CHARACTER}", "Ã©", "Ã¨", "Ã¼", "Ã¶", "â€™", "â€œ", "â€", "Â ")
"""What UTF-8 looks like after it was read as Latin-1, or after bytes were lost."""
FEW = 3
"""How many of the rows with a mistake are named."""

Piece = tuple[str, bool]
"""Some text of a row, and whether the loss is on it."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of one part of the rows, in the report's unit."""

    median: int
    p95: int
    longest: int
    over: float | None
    """The share over the limit, where one was given."""


@dataclass(frozen=True)
class Report:
    rows: int
    shapes: dict[str, int]
    unit: str
    lengths: dict[str, Lengths]
    examples: tuple[tuple[str, tuple[Piece, ...]], ...]
    """Two rows: where each stands, and its pieces."""
    problems: int
    """Rows that cannot be used, with each one where reading a file stopped."""
    findings: tuple[str, ...]


def purpose_of(shape: str) -> Purpose:
    """Return the purpose that rows of a shape serve best."""
    if shape.startswith("comparisons"):
        return "comparisons"
    if shape.startswith("unpaired"):
        return "preferences"
    return "prompts" if shape in {"prompts", ""} else "demonstrations"


@dataclass
class Counted:
    """Counts over the rows that have been read so far."""

    measure: Callable[[Example], Mapping[str, int]]
    """Returns how long each part of an example is."""
    oddities: Callable[[Example], Mapping[str, str]] = lambda _: {}
    """Returns what a tokenizer finds odd about an example: `Encoder.oddities`."""
    shapes: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, "array[int]"] = field(default_factory=dict)
    wrong: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    prompts: set[int] = field(default_factory=set)
    longer: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Numbers of comparisons: the chosen side is longer, the rejected side is longer, all."""
    labels: set[str] = field(default_factory=set)
    """The sides of preferences that there are."""
    shown: list[Example] = field(default_factory=list)
    limits: Mapping[str, int] = field(default_factory=dict)
    """The most units of a prompt and of a response."""
    shape: RowShape | None = None
    """What gives rows Quartet's columns, where the user names it."""

    def note(self, kind: str, place: str) -> None:
        self.wrong[kind] += 1
        if len(self.first.setdefault(kind, [])) < FEW:
            self.first[kind].append(place)

    def see(self, place: str, row: Row) -> None:
        """Count a row once: with its lengths if it can be used, as unusable if not."""
        shape = ""
        try:
            shaped = row if self.shape is None else self.shape.shaped(place, row)
            shape, named = usual(place, shaped)
            if not shape:
                raise DataError(
                    f"{place}: has columns {', '.join(named)}, which are no known shape."
                )
            example = example_of(place, named, purpose_of(shape))
            sizes = self.measure(example)
            oddities = self.oddities(example)
        except DataError as error:
            self.shapes[shape or "unknown"] += 1
            said = str(error)
            self.note("unusable", said if said.startswith(place) else f"{place}: {said}")
            return
        self.shapes[shape or "unknown"] += 1
        for part, size in sizes.items():
            self.sizes.setdefault(part, array("I")).append(size)
        for kind, token in oddities.items():
            self.note(kind, f"{place}: {token}")
        if any(size > limit_of(part, self.limits) for part, size in sizes.items()):
            self.note("long", place)
        self._look(place, example, sizes)
        total = sum(self.shapes.values())
        if len(self.shown) < 2:
            self.shown.append(example)
        elif random.Random(total).random() < 1 / total:
            self.shown[1] = example

    def _look(self, place: str, example: Example, sizes: Mapping[str, int]) -> None:
        """Note what is odd about a row that can be read."""
        texts = {part: plain(text) for part, text in parts_of(example).items()}
        for part, text in texts.items():
            if not text.strip():
                self.note(f"empty {part}", place)
            if any(mark in text for mark in MOJIBAKE):
                self.note("encoding", place)
        if "chosen" in texts and "rejected" in texts:
            if example.chosen == example.rejected:
                self.note("identical", place)
            self.longer[2] += 1
            self.longer[0] += sizes["chosen"] > sizes["rejected"]
            self.longer[1] += sizes["chosen"] < sizes["rejected"]
        self.labels |= {part for part in ("chosen", "rejected") if part in texts}
        if isinstance(example.prompt, str) and len(texts) > 1:
            joined = next(text for part, text in parts_of(example).items() if part != "prompt")
            if isinstance(joined, str) and joined[:1].isalnum() and example.prompt[-1:].isalnum():
                self.note("joined", place)
        key = hash(tuple(texts.items()))
        if key in self.whole:
            self.note("duplicate", place)
        self.whole.add(key)
        self.prompts.add(hash(texts.get("prompt", "")))


def parts_of(example: Example) -> dict[str, Text]:
    """Return the parts of an example by name, those that it has."""
    return ({} if example.is_text else {"prompt": example.prompt}) | example.answers()


def limit_of(part: str, limits: Mapping[str, int]) -> int | float:
    """Return the most units that a part of a row may have; infinity where none is given."""
    return limits.get("prompt" if part == "prompt" else "response", math.inf)


def plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def words(example: Example) -> dict[str, int]:
    """Return the number of words of each part of an example."""
    return {part: len(plain(text).split()) for part, text in parts_of(example).items()}


def report(
    path: Path,
    columns: Mapping[str, str],
    measure: Callable[[Example], Mapping[str, int]] = words,
    unit: str = "words",
    rendered: Callable[[Example], Sequence[Piece]] | None = None,
    limits: Mapping[str, int] | None = None,
    held_out: Path | None = None,
    oddities: Callable[[Example], Mapping[str, str]] = lambda _: {},
    shape: RowShape | None = None,
) -> Report:
    """`measure` returns how many `unit`s each part of an example has; `rendered` cuts an example
    into pieces; `limits` are of prompts and responses, in the unit; `held_out` names a file whose
    prompts should not be in this one; `oddities` returns what a tokenizer finds odd about an
    example; `shape` is data.shape."""
    limits = limits or {}
    seen = Counted(measure, oddities, limits=limits, shape=shape)
    stopped = _read(path, columns, seen)
    if not seen.shapes:
        raise DataError(stopped or f"{path}: has no rows.")
    found = [*label_notes(path), *_findings(seen, sum(seen.shapes.values()))]
    stops = int(stopped is not None)
    if stopped:
        found.insert(0, f"reading stopped: {stopped}")
    if held_out is not None:
        other = Counted(words, shape=shape)
        if halted := _read(held_out, columns, other):
            stops += 1
            found.append(f"reading {held_out} stopped: {halted}")
        both = seen.prompts & other.prompts
        if both:
            found.append(
                f"{len(both):,} of {len(other.prompts):,} prompts of {held_out.name} are in "
                f"{path.name} too: what is measured "
                "on them was seen in training."
            )
    return Report(
        rows=sum(seen.shapes.values()),
        shapes=dict(seen.shapes),
        unit=unit,
        lengths={
            part: _lengths(s, limit_of(part, limits) if limits else None)
            for part, s in seen.sizes.items()
        },
        examples=tuple(_shown(seen.shown, rendered or pieces, found)),
        problems=seen.wrong["unusable"] + stops,
        findings=tuple(found),
    )


def _read(path: Path, columns: Mapping[str, str], seen: Counted) -> str | None:
    """Return the reason why reading stopped before the end; None where it did not."""
    try:
        for place, row in rows(path):
            if not seen.shapes and (
                missing := [theirs for theirs in columns.values() if theirs not in row]
            ):
                raise DataError(
                    f"{path.name}: --columns names {missing[0]}, but the columns are "
                    f"{', '.join(row)}."
                )
            seen.see(place, renamed(row, columns))
    except DataError as error:
        if not seen.shapes:
            raise
        return str(error)
    return None


def _shown(
    examples: Sequence[Example],
    rendered: Callable[[Example], Sequence[Piece]],
    findings: list[str],
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yield the place and the pieces of each example that can be rendered; add a finding for one
    that cannot."""
    for example in examples:
        try:
            yield example.id, tuple(rendered(example))
        except DataError as error:
            findings.append(f"{example.id} cannot be rendered: {error}")


ODD = {
    **{f"empty {p}": f"empty {p} in {{}}." for p in ("prompt", "completion", "chosen", "rejected")},
    "long": "{} have more tokens than the limits. A run refuses them; data.too_long drops or "
    "truncates them.",
    "identical": "chosen and rejected are identical in {}: there is nothing to learn from them.",
    "duplicate": "{} repeat an earlier row.",
    "encoding": "damaged characters (such as � or â€™) in {}: the text was read in a wrong "
    "encoding once.",
    "control": "{} quote a control token. It is encoded as text: only the chat template writes "
    "control tokens.",
    "unknown": "{} have text that the tokenizer has no token for: the model reads another token "
    "there.",
}
"""What is said of the rows that were noted for something odd, the worst first."""


def _findings(seen: Counted, total: int) -> Iterator[str]:
    """Yield a sentence for each problem, the worst first."""

    def of(kind: str) -> str:
        places = ", ".join(seen.first[kind]) + (", …" if seen.wrong[kind] > FEW else "")
        return f"{seen.wrong[kind]:,} of {total:,} rows ({places})"

    if seen.wrong["unusable"]:
        yield (
            f"{seen.wrong['unusable']:,} of {total:,} rows cannot be used, the first: "
            f"{seen.first['unusable'][0]}"
        )
    usable = {shape: count for shape, count in seen.shapes.items() if shape != "unknown"}
    if len(usable) > 1:
        yield (
            "rows of several shapes: "
            + ", ".join(f"{count:,} {shape}" for shape, count in seen.shapes.most_common())
            + "."
        )
    if "unknown" in seen.shapes and len(seen.shapes) == 1:
        yield (
            "no column is called prompt, completion, chosen, rejected or messages. Say which are: "
            "--columns prompt=…"
        )
    for kind, sentence in ODD.items():
        if seen.wrong[kind]:
            yield sentence.format(of(kind))
    if len(seen.labels) == 1 and all(shape.startswith("unpaired") for shape in usable):
        label = "true" if "chosen" in seen.labels else "false"
        yield (
            f"every label is {label}: KTO learns from the difference between good and bad "
            "completions."
        )
    if seen.wrong["joined"] > 0.5 * total:
        yield (
            "prompts end and answers begin with a letter or digit: they are joined as they are. "
            "Put a space or a line end at "
            "the end of the prompt or the beginning of the answer."
        )
    more, less, pairs = seen.longer
    if pairs >= 20 and max(more, less) > 0.6 * (more + less):
        which = "chosen" if more > less else "rejected"
        share = max(more, less) / pairs
        yield (
            f"the {which} side is longer in {share:.0%} of comparisons: a reward model can learn "
            "length alone."
        )


def _lengths(sizes: "array[int]", limit: int | float | None) -> Lengths:
    ordered = sorted(sizes)
    over = None if limit is None else sum(size > limit for size in ordered) / len(ordered)
    return Lengths(ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)], ordered[-1], over)


def pieces(example: Example) -> list[Piece]:
    """Return the pieces of an example without a tokenizer: the speakers, and what is learnt."""
    answer = next(iter(example.answers().values()), None)
    if isinstance(example.prompt, str):
        return [(example.prompt, False), *([(plain(answer), True)] if answer is not None else [])]
    made: list[Piece] = []
    for message in [
        *example.prompt,
        *(answer if answer is not None and not isinstance(answer, str) else []),
    ]:
        made += [(f"{message['role']}: ", False), (message["content"], False), ("\n", False)]
    spoken = 3 * len(example.prompt)
    for i in range(spoken + 1, len(made), 3):
        made[i] = (made[i][0], made[i - 1][0] == "assistant: ")
    return made


def token_pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], written: Sequence[bool]
) -> list[Piece]:
    """Return encoded tokens as pieces of text, cut where the loss begins and ends."""
    marks = [False] * len(prompt) + list(written)
    ids = [*prompt, *response]
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(marks)) if a != b), len(ids)]
    return [(tokenizer.decode(ids[a:b]), marks[a]) for a, b in pairwise(cuts) if b > a]
