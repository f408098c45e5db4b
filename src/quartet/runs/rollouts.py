"""Summaries of a step's rollouts, computed from the table with a row per token."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quartet.runs.parquet import Column, values
from quartet.runs.untrusted import Unreadable

TOKEN_COLUMNS = {
    "sample": Column("whole", required=True),
    "id": Column("text", required=True),
    "group": Column("whole", required=True),
    "text": Column("text", required=True),
    "is_response": Column("flag", required=True),
    "token_id": Column("whole"),
    "score": Column("number"),
    "ended": Column("flag"),
    "clipped": Column("flag"),
    "score/*": Column("number"),
    "logged/*": Column("text"),
    **dict.fromkeys(
        ("logprob", "old_logprob", "ref_logprob", "kl", "reward", "penalty", "value"),
        Column("number"),
    ),
    **dict.fromkeys(
        ("td_error", "raw_advantage", "advantage", "return", "change", "ratio", "entropy"),
        Column("number"),
    ),
}
"""The columns of a file of rollouts."""
IN_SHORT = (
    "sample",
    "id",
    "group",
    "score",
    "ended",
    "text",
    "is_response",
    "kl",
    "clipped",
    "advantage",
)
"""The columns that a `Sample` is computed from."""
MAX_SAMPLES = 100_000
"""The most samples of one step that are read."""


@dataclass(frozen=True)
class Sample:
    """A summary of one rollout of a step."""

    number: int
    id: str
    group: int
    score: float
    """NaN where there is none."""
    components: Mapping[str, float | None]
    prompt: str
    """The tokens' texts, one after another, with special tokens and chat template; `response`
    too. For reading, not for training."""
    response: str
    tokens: int
    ended: bool | None
    kl: float | None
    clipped: int
    advantage: float | None
    """The mean over the response tokens."""
    texts: tuple[Any, str] | None = None
    """The prompt, a text or messages, and the response as a text without special tokens; None
    where they were not recorded."""
    logged: Mapping[str, str | None] = field(default_factory=dict)
    """What reward functions logged of this response, by REWARD/COLUMN."""


def samples_of(table: Any) -> list[Sample]:
    """Return a summary of each rollout, in their order. A rollout is a sequence of rows with the
    same sample number."""
    import numpy as np
    import pyarrow as pa

    sample = table.column("sample").to_numpy()
    ends = (
        [*(np.flatnonzero(sample[1:] != sample[:-1]) + 1).tolist(), len(sample)]
        if len(sample)
        else []
    )
    if len(ends) > MAX_SAMPLES:
        raise Unreadable(f"has {len(ends):,} samples; {MAX_SAMPLES:,} is the most that is read.")
    firsts = [0, *ends[:-1]] if ends else []
    names = [name for name in table.column_names if name.startswith(("score/", "logged/"))]
    columns = {name: values(table.column(name)) for name in IN_SHORT}
    columns |= {
        name: values(table.column(name).take(pa.array(firsts, pa.int64()))) for name in names
    }
    texts = _texts(table, firsts)
    return [
        _sample(columns, names, place, *bounds, texts[place])
        for place, bounds in enumerate(zip(firsts, ends, strict=True))
    ]


def _texts(table: Any, firsts: Sequence[int]) -> list[tuple[Any, str] | None]:
    """Return the prompt and the response of each rollout, which are in its first row. Earlier
    versions did not write them."""
    if not {"prompt", "response"} <= {*table.column_names}:
        return [None] * len(firsts)
    prompts, responses = values(table.column("prompt")), values(table.column("response"))
    return [_texts_of(prompts[first], responses[first]) for first in firsts]


def _texts_of(prompt: object, response: object) -> tuple[Any, str] | None:
    if not isinstance(prompt, str) or not isinstance(response, str):
        return None
    try:
        given = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    is_conversation = isinstance(given, list) and given and all(map(_is_message, given))
    return (given, response) if isinstance(given, str) or is_conversation else None


def _is_message(turn: object) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))


def _sample(
    columns: Mapping[str, list[Any]],
    names: Sequence[str],
    place: int,
    first: int,
    last: int,
    texts: tuple[Any, str] | None,
) -> Sample:
    own = columns["is_response"][first:last]
    begin = first + (own.index(True) if True in own else len(own))
    text, kl, advantage = (
        columns["text"],
        columns["kl"][begin:last],
        columns["advantage"][begin:last],
    )
    kls, advantages = ([x for x in numbers if x is not None] for numbers in (kl, advantage))
    score = columns["score"][first]
    return Sample(
        number=columns["sample"][first],
        id=columns["id"][first],
        group=columns["group"][first],
        score=math.nan if score is None else score,
        components=_without_prefix("score/", columns, names, place),
        prompt="".join(text[first:begin]),
        response="".join(text[begin:last]),
        tokens=last - begin,
        ended=columns["ended"][first],
        kl=sum(kls) if kls else None,
        clipped=sum(bool(x) for x in columns["clipped"][begin:last]),
        advantage=sum(advantages) / len(advantages) if advantages else None,
        texts=texts,
        logged=_without_prefix("logged/", columns, names, place),
    )


def _without_prefix(
    prefix: str, columns: Mapping[str, list[Any]], names: Sequence[str], place: int
) -> dict[str, Any]:
    """Return the values in this place of the columns whose names begin with the prefix."""
    return {
        name.removeprefix(prefix): columns[name][place] for name in names if name.startswith(prefix)
    }
