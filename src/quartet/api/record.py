"""`quartet.record`: the record, the doctor and the studio for any loop."""

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quartet.config.errors import Table
from quartet.config.toml import table_toml
from quartet.errors import QuartetError
from quartet.io.texts import type_in_words
from quartet.loops.progress import Progress
from quartet.recording.run_folder import RunFolder
from quartet.recording.step_recorder import InvariantBroken, StepRecorder
from quartet.recording.tokens import TokenTexts
from quartet.runs.doctor import Watch
from quartet.runtime.lifecycle import peak_bytes, write_report


class IdTexts(TokenTexts):
    """The texts of tokens where there is no tokenizer: their ids."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, token: int) -> str:
        return f"⟨{token}⟩"


def record(
    steps: Iterable[Progress],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    name: str = "rl",
    rollouts_every: int = 1,
    kl_target: float | None = None,
    strict: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
    """Yield the steps of a loop, each when it is in the run folder.

    `for step in quartet.record(quartet.rl(...), "runs/mine", tokenizer=tokenizer): ...` gives a
    loop of your own the record that `quartet run` makes: metrics, every token of the rollouts, the
    warnings and invariants of the doctor, a report, and a folder that the studio shows.

    Args:
        steps: `quartet.Step`s, or `quartet.Progress`es, which have a number and metrics.
        folder: the new run folder.
        tokenizer: gives the texts of tokens; without it they are shown as ids.
        name: what the stage is called.
        rollouts_every: how many steps apart rollouts are written.
        kl_target: what the KL is held to, for the doctor.
        strict: stop at the first step at which an invariant of the doctor does not hold, such as
            ratios that do not start at 1.
        config: what should be remembered of the settings; it is written as TOML.

    Raises:
        QuartetError: if the folder exists, or an invariant is broken.
    """
    path = Path(folder)
    table: Table = {"recipe": [name], **(config or {})}
    run = _create(path, table)
    try:
        yield from _recorded(steps, run, tokenizer, name, rollouts_every, kl_target, strict)
    finally:
        run.close()
        write_report(path)


def _create(path: Path, table: Table) -> RunFolder:
    text = table_toml(json.loads(json.dumps(table, default=str)))
    try:
        return RunFolder.create_at(path, {"config.toml": text, "config.resolved.toml": text})
    except FileExistsError:
        raise QuartetError(f"{path}: exists already. Give another folder.") from None


def _numbers(step: Progress, path: Path) -> dict[str, float]:
    """Return the metrics of a step as plain numbers; of numpy and torch they may be, too."""
    metrics: dict[str, float] = {}
    for name, value in step.metrics.items():
        try:
            metrics[name] = value if type(value) in {int, float} else value.__float__()
        except (AttributeError, TypeError, ValueError):  # text has no such method
            raise QuartetError(
                f"{path}, step {step.number}: the metric {name} is {type_in_words(value)}, not a "
                "number."
            ) from None
    return metrics


def _recorded(
    steps: Iterable[Progress],
    run: RunFolder,
    tokenizer: Any,
    name: str,
    rollouts_every: int,
    kl_target: float | None,
    strict: bool,
) -> Iterator[Progress]:
    """Write each step and yield it; write how it ended."""
    texts = IdTexts() if tokenizer is None else TokenTexts(tokenizer)
    recorder = StepRecorder(run, name, texts, Watch(kl_target), rollouts_every, strict=strict)
    began = before = time.monotonic()
    run.event("started", name)
    run.become_latest()
    try:
        for step in steps:
            if not isinstance(step, Progress):
                raise QuartetError(
                    f"{run.path}: {type_in_words(step)} is no step. Yield "
                    "quartet.Progress(number, metrics)."
                )
            plain = dataclasses.replace(step, metrics=_numbers(step, run.path))
            recorder.record(plain, round(time.monotonic() - before, 4))
            yield step
            before = time.monotonic()
    except (GeneratorExit, KeyboardInterrupt):
        run.event("interrupted", reason="the caller")
        raise
    except InvariantBroken as error:
        run.event("failed", error=str(error))
        raise InvariantBroken(f"{run.path}, step {step.number}: {error}") from None
    except Exception as error:
        run.event("failed", error=str(error))
        raise
    seconds = round(time.monotonic() - began, 2)
    run.event("finished", name, summary={}, seconds=seconds)
    run.event("done", peak_bytes=peak_bytes(), seconds=seconds)
