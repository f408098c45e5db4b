"""The labels of a run, as tables and sentences: how far the labelling is, who labelled what, how
far the labellers agree, and the labelled pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.labels.agreement import OWN, Agreement, agreements
from quartet.labels.log import Label, LabelError, labels_in
from quartet.runs.evaluations import Table
from quartet.runs.reader import Run
from quartet.runs.rounds import num_rounds, place_of
from quartet.runs.untrusted import Folder, Unreadable, printable

LABELS = "label/labels.jsonl"
"""Where the labels of a stage `label` are, in the folder of its round; those of `quartet label RUN`
are in `labels.jsonl` of the run's folder."""
MAX_LABELS = 32 << 20
"""The most bytes that are read of a file of labels."""
VERDICTS = {
    "a": "first",
    "b": "second",
    "tie": "tie",
    "both_bad": "both bad",
    "skip": "skipped",
}
"""What each verdict is called on a page."""


@dataclass(frozen=True)
class LabelledRun:
    """The labels of a run that were not undone."""

    labels: Sequence[Label]
    wanted: int | None
    """How many labels the stage `label` waits for; None where the run has no such stage."""
    problems: Sequence[str]
    """What could not be read, in sentences."""

    @property
    def sentences(self) -> list[str]:
        """How far the labelling is, and how far labellers agree."""
        if not self.labels:
            return []
        own = [label for label in self.labels if not label.repeat]
        progress = f"{len(own):,} labels"
        if self.wanted is not None:
            progress += f" of {self.wanted:,} that the run waits for"
        pairs = len({label.pair.id for label in own})
        preferred = sum(label.verdict in {"a", "b"} for label in own)
        return [
            f"{progress}, of {pairs:,} pairs; {preferred:,} prefer one of the two answers.",
            *(f"{printable(found.sentence())}." for found in agreements(self.labels)),
        ]

    @property
    def tables(self) -> list[Table]:
        """The verdicts of each labeller, and the agreements."""
        names = sorted({label.labeller for label in self.labels})
        rows = [(printable(name), _verdicts(self.labels, name)) for name in names]
        columns = [*VERDICTS.values(), "labels", "shown again", "comments"]
        tables = [("Verdicts by labeller", columns, rows)] if rows else []
        found = agreements(self.labels)
        if not found:
            return tables
        title = (
            "Agreement: pairs that both labelled, equal verdicts, and Cohen's κ, which is 0 where "
            "the verdicts agree as often as chance has it and 1 where they always do"
        )
        return [
            *tables,
            (title, ["pairs", "equal", "κ"], [(_whom(each), _numbers(each)) for each in found]),
        ]

    def shown(self, count: int) -> list[Mapping[str, Any]]:
        """Return up to `count` labels for the page: those with a comment first, then the newest."""
        newest = list(reversed(self.labels))
        ordered = sorted(newest, key=lambda label: not label.comment)  # stable
        return [
            {
                "prompt": _text(label.pair.prompt),
                "first": _text(label.pair.answer_a),
                "second": _text(label.pair.answer_b),
                "verdict": VERDICTS[label.verdict],
                "labeller": printable(label.labeller),
                "again": label.repeat,
                "comment": printable(str(label.comment)),
            }
            for label in ordered[:count]
        ]


def labelled_run(run: Run) -> LabelledRun:
    """Return the labels in the folder of a run; files that cannot be read are among its
    problems."""
    labels: list[Label] = []
    problems = []
    rounds = range(1, num_rounds(run.config) + 1)
    for name in (*(place_of(run.config, number, LABELS) for number in rounds), "labels.jsonl"):
        try:
            content = Folder(run.path).read(name, MAX_LABELS)
            if content is not None:
                labels += [label for _, label in labels_in(content, Path(name)).labels]
        except Unreadable as error:
            problems.append(f"{name} {error}")
        except (LabelError, TypeError, ValueError) as error:
            problems.append(printable(str(error)))
    stage = run.config.get("label")
    wanted = stage.get("labels") if isinstance(stage, dict) else None
    has_stage = "label" in (run.config.get("recipe") or ())
    in_all = wanted * len(rounds) if has_stage and isinstance(wanted, int) else None
    return LabelledRun(labels, in_all, problems)


def _verdicts(labels: Sequence[Label], name: str) -> list[str]:
    own = [label for label in labels if label.labeller == name]
    counts = Counter[str](label.verdict for label in own if not label.repeat)
    repeated = sum(label.repeat for label in own)
    comments = sum(bool(label.comment) for label in own)
    numbers = [*(counts[verdict] for verdict in VERDICTS), len(own) - repeated, repeated, comments]
    return [f"{number:,}" for number in numbers]


def _whom(agreement: Agreement) -> str:
    second = (
        "their own labels of pairs shown again" if agreement.second == OWN else agreement.second
    )
    return printable(f"{agreement.first} and {second}")


def _numbers(agreement: Agreement) -> list[str]:
    kappa = "–" if agreement.kappa is None else f"{agreement.kappa:.2f}".replace("-", "−")
    return [f"{agreement.pairs:,}", f"{agreement.agreement:.0%}", kappa]


def _text(text: Any) -> str:
    """Return a text, or the messages of a conversation one below the other."""
    if isinstance(text, str):
        return printable(text)
    turns = text if isinstance(text, list | tuple) else []
    lines = [
        f"{turn.get('role', '')}: {turn.get('content', '')}"
        for turn in turns
        if isinstance(turn, Mapping)
    ]
    return printable("\n".join(lines))
