"""The answers of a policy to the prompts of a set, kept as JSON lines while they come.

Prompts are answered in blocks of a fixed size, each with random numbers of its own. So a block that
is missing can be answered later, and the whole is the same as if nothing had been stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet import files
from quartet.data.examples import Example, Text
from quartet.experience import Prompt, Rollout

BLOCK = 32
"""Prompts of a block."""


@dataclass(frozen=True)
class Answer:
    """What a policy wrote."""

    response: str
    ended: bool
    """Whether the policy ended it; False where it was cut off."""
    tokens: int
    """Its length in the policy's tokens; words, where a server does not say it."""
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    """The tokens of prompt and answer; empty for servers."""


def key_of(value: Any) -> str:
    """Return a short name of a value that JSON takes."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def kept_answers(
    file: Path,
    examples: Sequence[Example],
    samples: int,
    ask: Callable[[Sequence[Example], int], Sequence[Answer]],
    reuse_whole: bool = True,
) -> list[Answer]:
    """Return `samples` answers to each prompt: those that the file holds, and the rest from
    `ask(examples of a block, its number)`, which are added to the file block by block. Without
    `reuse_whole`, a file with all answers is written anew: it is of an evaluation that ended."""
    known = _read(file)
    if not reuse_whole and len(known) >= len(examples) * samples:
        known = {}
    answers: list[Answer] = []
    lines: list[str] = []
    for number, start in enumerate(range(0, len(examples), BLOCK)):
        block = examples[start : start + BLOCK]
        places = [(start + row, sample) for row in range(len(block)) for sample in range(samples)]
        own = [known[place] for place in places if place in known]
        is_known = len(own) == len(places)
        if not is_known:
            own = list(ask(block, number))
        lines += [_line(*row) for row in zip(places, own, strict=True)]
        answers += own
        if not is_known:
            files.replace(file, "".join(lines))
    return answers


def _line(place: tuple[int, int], answer: Answer) -> str:
    row = {"row": place[0], "sample": place[1], **dataclasses.asdict(answer)}
    return json.dumps(row, ensure_ascii=True) + "\n"


def _read(file: Path) -> dict[tuple[int, int], Answer]:
    """Return the answers in a file by row and sample. Lines that are not whole are left out."""
    if not file.is_file():
        return {}
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            place = row.pop("row"), row.pop("sample")
            row["prompt_ids"], row["ids"] = tuple(row["prompt_ids"]), tuple(row["ids"])
            known[place] = Answer(**row)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known


def plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(m.get("content")) for m in text)


def rollout_of(example: Example, group: int, sample: int, answer: Answer) -> Rollout:
    """Return an answer as rewards take it. Only its text and its length are real for servers."""
    messages = None if isinstance(example.prompt, str) else example.prompt
    ids = answer.ids or (0,) * answer.tokens
    return Rollout(
        id=f"{example.id}/{sample}",
        prompt=Prompt(
            example.id, answer.prompt_ids, plain(example.prompt), dict(example.extra), messages
        ),
        group=group,
        response_ids=ids,
        response=answer.response,
        logprobs=(0.0,) * len(ids),
        finish_reason="stop" if answer.ended else "length",
        policy_version=0,
    )
