"""A run folder, read: while it grows, or copied from another machine. Imports no trainer and no torch."""

import functools
import json
import math
import time
import tomllib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.observability.cases import Clipping, clip_case

if TYPE_CHECKING:
    import plotly.graph_objects

RECENT_SECONDS = 300
"""A run that has written nothing for longer, and said no last word, counts as stopped."""
PER_TOKEN = frozenset(
    {
        "logprob",
        "old_logprob",
        "ref_logprob",
        "change",
        "reward",
        "penalty",
        "value",
        "td_error",
        "raw_advantage",
        "return",
        "ratio",
    }
    | {"entropy", "token_id", "position", "step"}
)
"""Columns that a sample in short has no use for."""


class NoRun(ValueError):
    """A folder that is no run's, or something that the run does not have; the message is a sentence for a person."""


class Series:
    """The metrics of one stage, by name; NaN where a step has none."""

    def __init__(self) -> None:
        self.steps: array[int] = array("q")
        self.times: array[float] = array("d")
        self.seconds: array[float] = array("d")
        self.phases: dict[str, array[float]] = {}
        self.columns: dict[str, array[float]] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        count, step = len(self.steps), event["step"]
        self.times.append(event["time"])
        self.seconds.append(event.get("seconds", math.nan))
        for columns, values in ((self.columns, event["metrics"]), (self.phases, event.get("phases") or {})):
            for name in values.keys() - columns.keys():
                columns[name] = array("d", [math.nan]) * count
            for name, column in columns.items():
                value = values.get(name)
                column.append(math.nan if value is None else value)
        self.steps.append(step)

    def last(self, name: str, count: int = 1) -> float | None:
        """The mean of the last `count` numbers."""
        there = [x for x in self.columns.get(name, ())[-count:] if not math.isnan(x)]
        return sum(there) / len(there) if there else None


@dataclass(frozen=True)
class Sample:
    """One rollout of a step, in short."""

    number: int
    id: str
    group: int
    score: float
    components: Mapping[str, float | None]
    prompt: str
    response: str
    tokens: int
    ended: bool | None
    kl: float | None
    clipped: int
    advantage: float | None
    """The mean over its tokens."""


class Run:
    """A run folder.

    >>> run = Run("runs/latest")  # doctest: +SKIP
    >>> run.metrics.to_pandas()["reward"].plot()  # doctest: +SKIP
    >>> run.rollouts(40).to_pandas().query("sample == 3")[["text", "advantage", "ratio"]]  # doctest: +SKIP
    >>> run.figure("frontier")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        if not (self.path / "events.jsonl").is_file():
            raise NoRun(f"{path}: is no run folder, it has no events.jsonl.")
        self.name = self.path.name
        self.series: dict[str, Series] = {}
        """By stage, in the order in which they ran."""
        self.events: list[dict[str, Any]] = []
        """All but the metrics."""
        self.damaged = 0
        """Lines of events.jsonl that are no events."""
        self._read_to = 0
        self.refresh()

    # --- what it says --------------------------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Read what was written since; whether there was anything. A last line that is not whole yet is left for later."""
        file = self.path / "events.jsonl"
        if file.stat().st_size < self._read_to:  # cut back to a checkpoint
            self.series, self.events, self.damaged, self._read_to = {}, [], 0, 0
        grown = False
        with file.open("rb") as lines:
            lines.seek(self._read_to)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                grown = True
                try:
                    self._see(json.loads(line))
                except (ValueError, KeyError, TypeError):  # torn by a crash, and written on behind it
                    self.damaged += 1
        return grown

    def _see(self, event: dict[str, Any]) -> None:
        if event["event"] == "metrics":
            self.series.setdefault(event["stage"], Series()).add(event)
        else:
            self.events.append(event)
            if event["event"] == "started":
                self.series.setdefault(event["stage"], Series())

    @property
    def status(self) -> str:
        """done, failed, interrupted, running or stopped (no word for five minutes)."""
        last = self.events[-1]["event"] if self.events else ""
        if last in {"done", "failed", "interrupted"}:
            return last
        return "running" if time.time() - (self.path / "events.jsonl").stat().st_mtime < RECENT_SECONDS else "stopped"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        file = self.path / "config.resolved.toml"
        return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def config_text(self) -> str:
        file = self.path / "config.resolved.toml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        file = self.path / "env.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def rl_stage(self) -> str | None:
        """The stage with rollouts, if there is one."""
        return next((stage for stage, series in self.series.items() if "policy/entropy" in series.columns), None)

    @property
    def main_stage(self) -> str | None:
        """The one to look at first: RL, else a preference stage, else the last that has numbers."""
        if self.rl_stage is not None:
            return self.rl_stage
        return next((stage for stage, series in reversed(self.series.items()) if series.columns), None)

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a stage said when it was finished."""
        return next((e.get("summary", {}) for e in self.events if e["event"] == "finished" and e.get("stage") == stage), None)

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """`stage`, `step` and `sentence` of each."""
        return [event for event in self.events if event["event"] == "warning"]

    @property
    def metrics(self) -> Any:
        """An Arrow table with a row per step of every stage: `stage`, `step`, `time`, `seconds`, and a column per metric."""
        import pyarrow as pa

        tables = [
            pa.table(
                {
                    "stage": pa.array([stage] * len(series.steps)),
                    "step": pa.array(series.steps),
                    "time": pa.array(series.times),
                    "seconds": pa.array(series.seconds),
                    **{name: pa.array(column, from_pandas=True) for name, column in series.columns.items()},
                }
            )
            for stage, series in self.series.items()
        ]
        return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})

    # --- rollouts ------------------------------------------------------------------------------------------------------------

    def steps(self, kind: str = "rollouts") -> list[int]:
        """The steps whose rollouts (or probes) are here."""
        return sorted(int(f.stem) for f in (self.path / kind).glob("*.parquet") if f.stem.isdigit())

    def rollouts(self, step: int, kind: str = "rollouts", columns: Sequence[str] | None = None) -> Any:
        """An Arrow table with a row per token of the step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.path / kind / f"{step:06d}.parquet"
        if not file.is_file():
            there = self.steps(kind)
            has = f"There are {len(there):,}, from {there[0]:,} to {there[-1]:,}." if there else "There are none."
            raise NoRun(f"{self.name}: has no {kind} of step {step}. {has}")
        try:
            return pq.read_table(file, columns=columns)
        except pa.ArrowInvalid as error:
            raise NoRun(f"{self.name}: {kind} of step {step} cannot be read ({str(error).partition('.')[0]}).") from None

    def samples(self, step: int, kind: str = "rollouts") -> list[Sample]:
        """The rollouts of a step in short, in their order."""
        table = self.rollouts(step, kind)
        columns = {name: table.column(name).to_pylist() for name in table.column_names if name not in PER_TOKEN}
        names = [name.removeprefix("score/") for name in columns if name.startswith("score/")]
        return [_sample(columns, names, first, last) for first, last in _runs(columns["sample"])]

    def sample(self, step: int, sample: int, kind: str = "rollouts") -> dict[str, list[Any]]:
        """All columns of one rollout, a number or text per token."""
        import pyarrow.compute as pc

        table = self.rollouts(step, kind)
        table = table.filter(pc.equal(table.column("sample"), sample))
        if table.num_rows == 0:
            raise NoRun(f"{self.name}: step {step} has no sample {sample}.")
        return {name: table.column(name).to_pylist() for name in table.column_names}

    @property
    def clipping(self) -> Clipping:
        """How the run's policy loss clips."""
        return Clipping.of(self.config.get("algorithm", {}).get("policy_loss", {}))

    def cases(self, sample: Mapping[str, Sequence[Any]]) -> list[str]:
        """What the update did with each token of a sample, in words; empty for a prompt's."""
        clipping = self.clipping
        rows = zip(sample["advantage"], sample["ratio"], sample["clipped"], strict=True)
        return [clip_case(clipping, *row) if row[1] is not None else "" for row in rows]

    # --- evaluation ----------------------------------------------------------------------------------------------------------

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return self._json("evaluation/final.json")

    @property
    def best_of_n(self) -> list[dict[str, Any]]:
        return self._json("evaluation/best_of_n.json") or []

    def pairs(self) -> list[dict[str, Any]]:
        """The pairs that were held out from the reward model, with its scores."""
        import pyarrow.parquet as pq

        file = self.path / "evaluation" / "pairs.parquet"
        return pq.read_table(file).to_pylist() if file.is_file() else []

    def answers(self) -> Iterator[dict[str, Any]]:
        """What the policy before and after answered to the held-out prompts."""
        file = self.path / "evaluation" / "answers.jsonl"
        if file.is_file():
            with file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines)

    def _json(self, name: str) -> Any:
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    # --- for eyes ------------------------------------------------------------------------------------------------------------

    def figure(self, name: str, stage: str | None = None) -> "plotly.graph_objects.Figure":
        """A Plotly figure: "frontier", "phases", or a metric's name."""
        from quartet.observability.figures import figure

        return figure(self, name, stage)

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage} {len(series.steps):,}" for stage, series in self.series.items())
        return f"Run({self.name}: {self.status}; {stages or 'no stage yet'})"

    def _repr_html_(self) -> str:
        from html import escape

        rows = []
        for stage, series in self.series.items():
            shown = ", ".join(f"{name} {series.last(name):.4g}" for name in HEADLINE if series.last(name) is not None)
            rows.append(f"<tr><td>{escape(stage)}</td><td>{len(series.steps):,} steps</td><td>{escape(shown)}</td></tr>")
        return f"<b>{escape(self.name)}</b> ({self.status})<table>{''.join(rows)}</table>"


HEADLINE = ("loss", "accuracy", "reward", "reward/gold", "kl", "value/explained_variance")


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each run of equal values begins and ends."""
    first = 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[first]:
            yield first, i
            first = i


def _sample(columns: Mapping[str, list[Any]], names: Sequence[str], first: int, last: int) -> Sample:
    own = columns["is_response"][first:last]
    begin = first + (own.index(True) if True in own else len(own))
    text, kl, advantage = columns["text"], columns["kl"][begin:last], columns["advantage"][begin:last]
    kls, advantages = ([x for x in numbers if x is not None] for numbers in (kl, advantage))
    return Sample(
        number=columns["sample"][first],
        id=columns["id"][first],
        group=columns["group"][first],
        score=columns["score"][first],
        components={name: columns[f"score/{name}"][first] for name in names},
        prompt="".join(text[first:begin]),
        response="".join(text[begin:last]),
        tokens=last - begin,
        ended=columns["ended"][first] if "ended" in columns else None,
        kl=sum(kls) if kls else None,
        clipped=sum(bool(x) for x in columns["clipped"][begin:last]),
        advantage=sum(advantages) / len(advantages) if advantages else None,
    )


def find_runs(root: Path) -> list[Path]:
    """The run folders in a folder, the newest first; the folder itself where it is one."""
    if (root / "events.jsonl").is_file():
        return [root.resolve()]
    if not root.is_dir():
        raise NoRun(f"{root}: no such folder.")
    found = [p for p in root.iterdir() if not p.is_symlink() and (p / "events.jsonl").is_file()]
    return sorted(found, key=lambda p: (p / "events.jsonl").stat().st_mtime, reverse=True)
