"""A rubric: criteria with weights by which a language model compares two answers."""

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quartet.labels.log import Verdict
from quartet.labels.pairs import digest
from quartet.rewards.protocol import RewardError
from quartet.rewards.verdicts import parse_preference, reconciled

RUBRIC_PROMPT = """\
Compare two answers to the request below by each of the criteria, one at a time. \
Do not let one criterion decide another, nor the length of an answer or which comes first.

<request>
{prompt}
</request>

<answer A>
{first}
</answer A>

<answer B>
{second}
</answer B>

<criteria>
{criteria}
</criteria>

End with one line for each criterion: its name, a colon, and A, B or tie, such as "{example}: A"."""
CRITERIA = "{criteria}"
"""Where a prompt has the criteria."""
SIGNS = {"a": 1, "tie": 0, "b": -1}
ROUNDING = 1e-9
"""A weighted sum up to so much of the weights' sum is 0."""


class Criterion(BaseModel):
    """One question about two answers, and how much it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9 _-]{0,38}[A-Za-z0-9]$")]
    question: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @cached_property
    def line(self) -> re.Pattern[str]:
        """The line of a judge's text with this criterion's verdict: the name, a colon and the rest,
        with marks of lists and bold type before them."""
        name = re.escape(self.name)
        return re.compile(rf"^[ \t\d.)#>*_`-]*{name}[*_`]*[ \t]*:([^\n]*)$", re.I | re.M | re.A)

    def share(self, text: str) -> float | None:
        """Return 1 where the last line of this criterion says A, 0 for B, 0.5 for tie, None for
        anything else."""
        rest = self.line.findall(text)
        return parse_preference(f"Better: {rest[-1]}") if rest else None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    criterion: Annotated[list[Criterion], Field(min_length=1, max_length=20)]


@dataclass(frozen=True)
class Rubric:
    """Criteria; the weighted sum of their verdicts decides."""

    criteria: Sequence[Criterion]

    @property
    def text(self) -> str:
        """The criteria as the judge reads them, without their weights."""
        return "\n".join(f"{each.name}: {each.question}" for each in self.criteria)

    @property
    def key(self) -> str:
        """A hash of names, questions and weights."""
        return digest(*(each.model_dump_json() for each in self.criteria))

    def is_answered_by(self, text: str) -> bool:
        """Return whether a judge's text has a verdict for each criterion."""
        return all(criterion.share(text) is not None for criterion in self.criteria)

    def verdicts(self, texts: Sequence[str]) -> list[Verdict]:
        """Return each criterion's verdict about a pair from a judge's two texts: with answer a
        first and with answer b first."""
        return [reconciled(*(each.share(text) for text in texts)) for each in self.criteria]

    def weighted(self, verdicts: Sequence[Verdict]) -> tuple[Verdict, float | None]:
        """Return the verdict of the criteria's verdicts, and their weighted mean

            s = Σ w · v / Σ w,   v = 1 for a, −1 for b, 0 for a tie:

        a where s > 0, b where s < 0, a tie at 0. Where one criterion has no verdict, the pair is
        skipped and there is no s.
        """
        if any(verdict not in SIGNS for verdict in verdicts):
            return "skip", None
        pairs = zip(self.criteria, verdicts, strict=True)
        total = math.fsum(each.weight for each in self.criteria)
        mean = math.fsum(each.weight * SIGNS[verdict] for each, verdict in pairs) / total
        if abs(mean) <= ROUNDING:
            return "tie", 0.0
        return ("a" if mean > 0 else "b"), mean


def read_rubric(path: Path) -> Rubric:
    """Return the rubric of a TOML file with a table [[criterion]] for each criterion. Raises
    `RewardError` for anything else."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        criteria = _File.model_validate(table).criterion
    except OSError as error:
        raise RewardError(f"rubric {path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        raise RewardError(f"rubric {path}: {_sentence(error)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested without end
        raise RewardError(f"rubric {path}: is no TOML file ({error}).") from None
    names = [each.name.lower() for each in criteria]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise RewardError(f"rubric {path}: two criteria are called {doubled}. Rename one.")
    return Rubric(tuple(criteria))


def _sentence(error: ValidationError) -> str:
    """Return what is wrong with a file, and where."""
    first = error.errors()[0]
    table, *rest = [str(part) for part in first["loc"]]
    if not rest or table != "criterion":
        return (
            "needs one to twenty tables [[criterion]], each with name, question and weight, and "
            f"nothing else ({table}: {first['msg']})."
        )
    place = " ".join([f"criterion {int(rest[0]) + 1}", *rest[1:]])
    if first["type"] == "extra_forbidden":
        return f"{place}: no such key. A criterion has name, question and weight."
    if first["type"] == "string_pattern_mismatch":
        return (
            f"{place}: must be 2 to 40 letters, digits, spaces, - and _, and begin with a letter."
        )
    return f"{place}: {first['msg']}."
