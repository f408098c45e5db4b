"""Reading a run folder, while the run goes on or afterwards. Imports no trainer and no torch.

The folder may come from another machine, so nothing in it is trusted: `untrusted` opens every file,
and `records` has the expected types. What cannot be read is left out, and `Run.problems` has a
sentence about it.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.runs import records
from quartet.runs.cases import Clipping, clip_case
from quartet.runs.definitions import Definition
from quartet.runs.event_log import EventLog, Series
from quartet.runs.folders import NoRun, find_runs
from quartet.runs.parquet import Column, read_parquet, values
from quartet.runs.rollouts import TOKEN_COLUMNS, Sample, samples_of
from quartet.runs.rounds import num_rounds, place_of, probe_folders
from quartet.runs.untrusted import (
    MAX_CONFIG,
    MAX_DOCUMENT,
    Folder,
    Unreadable,
    checked,
    left_out,
    parse_json,
    parse_toml,
    printable,
    shown,
)

if TYPE_CHECKING:
    import plotly.graph_objects
    from pydantic import TypeAdapter

__all__ = ["DamagedRun", "NoRun", "Run", "Sample", "Series", "find_runs"]

EVENTS, CONFIG, ENVIRONMENT = "events.jsonl", "config.resolved.toml", "env.json"
FINAL, BEST_OF_N = "evaluation/final.json", "evaluation/best_of_n.json"
ANSWERS, PAIRS = "evaluation/answers.jsonl", "evaluation/pairs.parquet"

RECENT_SECONDS = 300
"""A run that has written nothing for longer, and no final event, counts as stopped."""
MAX_ANSWERS = 20_000
MAX_ANSWER_BYTES = 128 << 20
MAX_PAIRS = 100_000

PAIR_COLUMNS = {
    **dict.fromkeys(("prompt", "chosen", "rejected"), Column("text")),
    **dict.fromkeys(("chosen_tokens", "rejected_tokens"), Column("whole")),
    **dict.fromkeys(("chosen_score", "rejected_score"), Column("number")),
}


class DamagedRun(NoRun):
    """Something in a run folder exists and cannot be read."""


class Run:
    """A run folder.

    >>> run = Run("runs/latest")  # doctest: +SKIP
    >>> run.metrics.to_pandas()["reward"].plot()  # doctest: +SKIP
    >>> tokens = run.rollouts(40).to_pandas().query("sample == 3")  # doctest: +SKIP
    >>> tokens[["text", "advantage", "ratio"]]  # doctest: +SKIP
    >>> run.figure("frontier")  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise NoRun(f"{printable(str(path))}: cannot be opened ({error}).") from None
        self.name = printable(self.path.name)
        self._folder = Folder(self.path)
        self._log = EventLog(self._folder, EVENTS)
        self._problems: dict[str, list[str]] = {}
        """What could not be read: sentences by file name."""
        self.refresh()

    # --- the record

    def refresh(self) -> bool:
        """Read what the run has written since the last call, and return whether there was anything.
        A last line without its end is read next time."""
        try:
            grown = self._log.refresh() if self.path.is_dir() else None
        except Unreadable as error:
            raise NoRun(f"{self.name}: {EVENTS} {error}") from None
        if grown is None:
            found = os.path.lexists(self.path)
            what = f"is no run folder, it has no {EVENTS}." if found else "no such folder."
            raise NoRun(f"{printable(str(self.path))}: {what}")
        return grown

    @property
    def series(self) -> dict[str, Series]:
        """The metrics by stage, in the order in which the stages ran."""
        return self._log.series

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events except metrics."""
        return self._log.events

    @property
    def damaged(self) -> int:
        """The number of lines of events.jsonl that are no events."""
        return self._log.damaged

    @property
    def problems(self) -> list[str]:
        """Sentences about what could not be read: in the record, the config, the evaluation, and in
        whatever else was requested so far. `check` reads everything."""
        _ = self.config, self.environment, self.evaluation, self.best_of_n
        return [
            *self._log.problems(),
            *(sentence for file in self._problems.values() for sentence in file),
        ]

    def check(self) -> list[str]:
        """Read every file of the run, and return `problems`."""
        for number in range(1, num_rounds(self.config) + 1):
            self.pairs(number)
        for _ in self.answers():
            pass
        for kind in ("rollouts", *probe_folders(self).values()):
            for step in self.steps(kind):
                try:
                    self.rollouts(step, kind)
                except NoRun:
                    continue
        return self.problems

    def _document(
        self,
        name: str,
        limit: int,
        parse: Callable[[bytes], tuple[Any, list[str]]],
        of: "TypeAdapter[Any]",
    ) -> Any:
        """Return a file's value without entries of a wrong type; None where there is no file or
        nothing of it can be read."""
        self._problems.pop(name, None)
        try:
            content = self._folder.read(name, limit)
            if content is None:
                return None
            value, faults = parse(content)
            value, more = checked(of, value)
        except Unreadable as error:
            self._problems[name] = [f"{name} {error}"]
            return None
        if faults or more:
            self._problems[name] = [left_out(name, [*faults, *more])]
        return value

    @property
    def status(self) -> str:
        """done, failed, interrupted, running, or stopped (nothing was written for five minutes)."""
        last = self.events[-1]["event"] if self.events else ""
        if last in {"done", "failed", "interrupted"}:
            return str(last)
        try:
            modified = (self.path / EVENTS).lstat().st_mtime
        except OSError:
            return "stopped"
        return "running" if time.time() - modified < RECENT_SECONDS else "stopped"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self._document(CONFIG, MAX_CONFIG, parse_toml, records.CONFIG) or {}

    @property
    def config_text(self) -> str:
        """The text of config.resolved.toml; bytes that are not UTF-8 are escape sequences."""
        try:
            return (self._folder.read(CONFIG, MAX_CONFIG) or b"").decode(
                "utf-8", "backslashreplace"
            )
        except Unreadable:
            return ""

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        return self._document(ENVIRONMENT, MAX_DOCUMENT, parse_json, records.ENVIRONMENT) or {}

    @property
    def rl_stages(self) -> list[str]:
        """The names of the RL stages, one for each round of the recipe, in their order."""
        return [
            stage for stage, series in self.series.items() if "policy/entropy" in series.columns
        ]

    @property
    def rl_stage(self) -> str | None:
        """The name of the RL stage, of several the last; None where there is none."""
        return next(reversed(self.rl_stages), None)

    @property
    def main_stage(self) -> str | None:
        """The stage to look at first: RL, else the last that has metrics."""
        if self.rl_stage is not None:
            return self.rl_stage
        return next(
            (stage for stage, series in reversed(self.series.items()) if series.columns), None
        )

    def summary(self, stage: str) -> dict[str, Any] | None:
        """Return the summary that a stage wrote when it finished; None before that."""
        return next(
            (
                e.get("summary", {})
                for e in self.events
                if e["event"] == "finished" and e.get("stage") == stage
            ),
            None,
        )

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """The warnings, each with `stage`, `step` and `sentence`."""
        return [event for event in self.events if event["event"] == "warning"]

    @property
    def metrics(self) -> Any:
        """An Arrow table with a row per step of every stage: `stage`, `step`, `time`, `seconds`,
        and a column per metric."""
        import pyarrow as pa

        tables = [
            pa.table(
                {
                    "stage": pa.array([stage] * len(series.steps)),
                    "step": pa.array(series.steps),
                    "time": pa.array(series.times),
                    "seconds": pa.array(series.seconds),
                    **{
                        name: pa.array(column, from_pandas=True)
                        for name, column in series.columns.items()
                    },
                }
            )
            for stage, series in self.series.items()
        ]
        return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})

    # --- rollouts

    def steps(self, kind: str = "rollouts") -> list[int]:
        """Return the steps whose rollouts (or probes) were written."""
        self._problems.pop(kind, None)
        try:
            stems = [
                name.removesuffix(".parquet")
                for name in self._folder.names(kind)
                if name.endswith(".parquet")
            ]
        except Unreadable as error:
            self._problems[kind] = [f"{kind} {error}"]
            return []
        steps = {
            stem: int(stem)
            for stem in stems
            if stem.isascii() and stem.isdecimal() and len(stem) <= 9
        }
        strange = [stem for stem in stems if stem not in steps or f"{steps[stem]:06d}" != stem]
        if strange:
            others = f" and {len(strange) - 1:,} others" if len(strange) > 1 else ""
            self._problems[kind] = [
                f"{kind}: {shown(strange[0])}.parquet{others} left out: the name is no step's."
            ]
        return sorted(steps[stem] for stem in steps.keys() - set(strange))

    def rollouts(
        self, step: int, kind: str = "rollouts", columns: Sequence[str] | None = None
    ) -> Any:
        """Return an Arrow table with a row per token of the step. Raises NoRun where there is none
        or it cannot be read."""
        import pyarrow as pa

        table = self._tokens(step, kind, columns)
        texts = [
            name
            for name in table.column_names
            if name != "text" and pa.types.is_dictionary(table.schema.field(name).type)
        ]
        for name in texts:
            place = table.column_names.index(name)
            table = table.set_column(place, name, table.column(name).cast(pa.string()))
        return table

    def _tokens(self, step: int, kind: str, columns: Sequence[str] | None = None) -> Any:
        name = f"{kind}/{step:06d}.parquet"
        self._problems.pop(name, None)
        try:
            file = self._folder.open(name)
            if file is not None:
                with file:
                    table, faults = read_parquet(file, TOKEN_COLUMNS, columns)
                if faults:
                    self._problems[name] = [left_out(name, faults)]
                return table
        except Unreadable as error:
            self._problems[name] = [f"{name} {error}"]
            raise DamagedRun(
                f"{self.name}: {kind} of step {step} cannot be read: the file {error}"
            ) from None
        steps = self.steps(kind)
        has = (
            f"There are {len(steps):,}, from {steps[0]:,} to {steps[-1]:,}."
            if steps
            else "There are none."
        )
        raise NoRun(f"{self.name}: has no {kind} of step {step}. {has}")

    def samples(self, step: int, kind: str = "rollouts") -> list[Sample]:
        """Return a summary of each rollout of a step, in their order."""
        try:
            return samples_of(self._tokens(step, kind))
        except Unreadable as error:
            raise DamagedRun(
                f"{self.name}: {kind} of step {step} cannot be shown: the file {error}"
            ) from None

    def sample(self, step: int, sample: int, kind: str = "rollouts") -> dict[str, list[Any]]:
        """Return all columns of one rollout, a number or text per token."""
        import pyarrow.compute as pc

        table = self._tokens(step, kind)
        table = (
            table.filter(pc.equal(table.column("sample"), sample))
            if 0 <= sample < records.MAX_STEP
            else table[:0]
        )
        if table.num_rows == 0:
            raise NoRun(f"{self.name}: step {step} has no sample {sample}.")
        return {name: values(table.column(name)) for name in table.column_names}

    @property
    def _described(self) -> dict[str, Any]:
        """The last event with descriptions of the run's own parts, which a reader cannot import."""
        return next((e for e in reversed(self.events) if e["event"] == "definitions"), {})

    @property
    def clipping(self) -> Clipping | None:
        """How the run's policy loss clips; None where it did not say over which ratios."""
        clip = self._described.get("clip")
        return None if clip is None else Clipping.read(clip)

    @property
    def rounding(self) -> str:
        """Which of the doctor's tolerances holds for the RL stage: a key of `TOLERANCES`."""
        rounding: str = self._described.get("rounding", "fp32")
        return rounding

    @property
    def definitions(self) -> list[Definition]:
        """The metrics of the user's own, as the run described them."""
        rows: list[dict[str, Any]] = self._described.get("metrics", [])
        known = {field.name for field in dataclasses.fields(Definition)}
        return [Definition(**{k: v for k, v in row.items() if k in known}) for row in rows]

    def cases(self, sample: Mapping[str, Sequence[Any]]) -> list[str]:
        """Return a phrase for each token of a sample on what the update did to it; empty for prompt
        tokens."""
        clipping = self.clipping
        rows = zip(sample["advantage"], sample["ratio"], sample["clipped"], strict=True)
        return [clip_case(clipping, *row) if row[1] is not None else "" for row in rows]

    # --- evaluation

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The summary of the stage `evaluation`, with `samples`; None where there is none."""
        evaluation = self._document(FINAL, MAX_DOCUMENT, parse_json, records.EVALUATION)
        return None if evaluation is None else {"samples": [], **evaluation}

    @property
    def best_of_n(self) -> list[dict[str, Any]]:
        """The best-of-n curve of the policy that RL started from: for each n its KL in nats and the
        mean score of the best answer; empty where there is none."""
        return self._document(BEST_OF_N, MAX_DOCUMENT, parse_json, records.BEST_OF_N) or []

    def pairs(self, round: int | None = None) -> list[dict[str, Any]]:
        """Return the held-out pairs of the reward model, with its scores; of an ensemble, with the
        mean of its members' scores. `round` is that of its labels, the last one if it is None."""
        numbers = [stage.partition("reward_model-")[2] for stage in self.series]
        names = [PAIRS.replace(".", f"-{n}.") for n in numbers if n.isdecimal()] or [PAIRS]
        files = [name if round is None else place_of(self.config, round, name) for name in names]
        return records.mean_pairs([rows for name in files if (rows := self._pairs(name))])

    def _pairs(self, name: str) -> list[dict[str, Any]]:
        """Return the pairs in one file."""
        self._problems.pop(name, None)
        try:
            file = self._folder.open(name)
            if file is None:
                return []
            with file:
                table, faults = read_parquet(file, PAIR_COLUMNS)
        except Unreadable as error:
            self._problems[name] = [f"{name} {error}"]
            return []
        columns = [values(table.column(name)[:MAX_PAIRS]) for name in table.column_names]
        rows = [
            dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)
        ]
        whole = [row for row in rows if all(_usable(row[name]) for name in PAIR_COLUMNS)]
        if len(whole) < table.num_rows:
            faults.append(
                f"{table.num_rows - len(whole):,} of {table.num_rows:,} pairs are too many or lack "
                f"a value"
            )
        if faults:
            self._problems[name] = [left_out(name, faults)]
        return whole

    def answers(self) -> Iterator[dict[str, Any]]:
        """Yield the responses to the held-out prompts of the policy before and after training."""
        self._problems.pop(ANSWERS, None)
        faults: list[str] = []
        size = 0
        try:
            for number, line in enumerate(records.read_lines(self._folder, ANSWERS), 1):
                size += len(line)
                if number > MAX_ANSWERS or size > MAX_ANSWER_BYTES:
                    faults.append(f"line {number:,} and what follows is too much to read")
                    break
                try:
                    value, wrong = checked(records.ANSWERS, parse_json(line)[0])
                except Unreadable as error:
                    value, wrong = None, [str(error).rstrip(".")]
                faults += [f"in line {number:,}, {fault}" for fault in wrong]
                if value is not None:
                    yield value
        except Unreadable as error:
            self._problems[ANSWERS] = [f"{ANSWERS} {error}"]
        if faults:
            self._problems[ANSWERS] = [left_out(ANSWERS, faults)]

    # --- display

    def figure(self, name: str, stage: str | None = None) -> "plotly.graph_objects.Figure":
        """Return a Plotly figure: "frontier", "phases", or a metric by its name."""
        from quartet.runs.figures import figure

        return figure(self, name, stage)

    def __repr__(self) -> str:
        stages = ", ".join(
            f"{stage} {len(series.steps):,}" for stage, series in self.series.items()
        )
        return f"Run({self.name}: {self.status}; {stages or 'no stage yet'})"

    def _repr_html_(self) -> str:
        from html import escape

        rows = []
        for stage, series in self.series.items():
            shown = ", ".join(
                f"{name} {series.last(name):.4g}"
                for name in HEADLINE
                if series.last(name) is not None
            )
            rows.append(
                f"<tr><td>{escape(stage)}</td><td>{len(series.steps):,} "
                f"steps</td><td>{escape(shown)}</td></tr>"
            )
        return f"<b>{escape(self.name)}</b> ({self.status})<table>{''.join(rows)}</table>"


HEADLINE = ("loss", "accuracy", "reward", "reward/gold", "kl", "value/explained_variance")


def _usable(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
