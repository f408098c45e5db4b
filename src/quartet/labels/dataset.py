"""Labels as a data set: a folder with the comparisons and a card, as the hub has them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from quartet import files
from quartet.labels.agreement import agreements
from quartet.labels.log import Label, LabelError, Labels, read_labels

SIZES = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M")]
"""The hub's names for numbers of rows, each below a bound."""
JUDGE = "judge "
"""How the name of a judge's labels begins."""

BODY = """# {title}

{count} of two answers to a prompt, made with Quartet (`quartet label`). `train.jsonl` has
a row for each: `prompt`, `chosen` and `rejected` are texts or lists of messages; `labeller` tells
people and judges apart.

    datasets.load_dataset("json", data_files="train.jsonl")    # or the name on the hub
    quartet run dialogue --model FOLDER data.train=train.jsonl

## Who compared

{labellers}

{agreement}

## What is left out

{left_out}. Comments, times and the names of people are not part of this data set.

## To be added

Who the labellers were and what they were told, where prompts and answers come from, and under
which licence the data may be used: these are not in the file of labels.
"""


def write_dataset(path: Path, target: Path) -> int:
    """Write the comparisons of a file of labels as a data set with a card into a new folder, and
    return how many they are. People are numbered in the order of their first label; judges keep
    the names of their models. Raises `LabelError`, and OSError where it cannot be written."""
    if target.exists() or target.is_symlink():
        raise LabelError(f"{target}: exists already. Give another place with --to.")
    labels = read_labels(path)
    comparisons = [label for _, label in labels.comparisons()]
    if not comparisons:
        raise LabelError(f"{path}: has no label that prefers an answer.")
    names = _public_names([label for _, label in labels.labels])
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        rows = "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(comparisons, names)
        )
        files.replace(unfinished / "train.jsonl", rows)
        files.replace(unfinished / "README.md", card(target.name, labels, names))
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(comparisons)


def _public_names(labels: Sequence[Label]) -> dict[str, str]:
    people = dict.fromkeys(x.labeller for x in labels if not x.labeller.startswith(JUDGE))
    numbered = {name: f"person {number}" for number, name in enumerate(people, 1)}
    return {label.labeller: numbered.get(label.labeller, label.labeller) for label in labels}


def _rows(comparisons: Sequence[Label], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    for label in comparisons:
        row = label.row()
        yield {key: row[key] for key in ("prompt", "chosen", "rejected")} | {
            "labeller": names[label.labeller]
        }


def card(title: str, labels: Labels, names: dict[str, str]) -> str:
    """Return the card of a data set: the head that the hub reads, who labelled how much, how far
    they agree, and what is left out."""
    comparisons = [label for _, label in labels.comparisons()]
    count = len(comparisons)
    head = {
        "task_categories": ["text-generation"],
        "tags": ["quartet", "human-feedback", "preference"],
        "size_categories": [next((name for most, name in SIZES if count < most), "1M<n<10M")],
        "configs": [{"config_name": "default", "data_files": "train.jsonl"}],
    }
    if all(label.labeller.startswith(JUDGE) for label in comparisons):
        head["tags"] = ["quartet", "ai-feedback", "preference"]
    made = Counter(names[label.labeller] for label in comparisons)
    labellers = [f"- {name}: {_counted(number)}" for name, number in made.items()]
    renamed = [
        Label(x.id, names[x.labeller], x.pair, x.verdict, x.order, x.repeat)
        for _, x in labels.labels
    ]
    agreed = [f"- {each.sentence()}" for each in agreements(renamed)]
    _, _, left_out = labels.sentence().partition("; left out: ")
    body = BODY.format(
        title=title,
        count=_counted(count),
        labellers="\n".join(labellers),
        agreement="\n".join(agreed) or "No pair was labelled twice, so no agreement is known.",
        left_out=left_out or "Nothing",
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _counted(count: int) -> str:
    return f"{count:,} comparison{'s' * (count != 1)}"
