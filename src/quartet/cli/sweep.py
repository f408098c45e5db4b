"""The command sweep: one file over many settings."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quartet import __version__
from quartet.cli.common import (
    FAILED,
    RESUMABLE,
    SettingsCommand,
    app,
    complaints,
    console,
    print_json,
    refusing,
)
from quartet.io.texts import typed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from quartet.runs.sweeps import Sweep
    from quartet.sweeps.conduct import ActiveRun, Change, Conductor
    from quartet.sweeps.life import PreparedSweep
    from quartet.sweeps.request import SweepRequest

SHOWN = 20
"""The most trials of a plan that are listed."""


@app.command(cls=SettingsCommand)
def sweep(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE.toml",
            help="A TOML file with a \\[sweep] table, a sweep that ships with Quartet, or, with "
            "--resume, a sweep's folder.",
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE …]",
            help="Settings that replace those of the file, sweep.parallel=2 among them.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the newest sweep of this name, or this folder."),
    ] = False,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Print the trials and what they would take, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run a file over many settings: a grid, at random, or by Bayesian search.

    Each trial is an ordinary run. docs/sweeps.md describes the \\[sweep] table.
    """
    from quartet.sweeps.life import beginning_of

    with refusing():
        beginning = beginning_of(what, words or [], resume)
    if show_plan:
        _print_plan(beginning.request, as_json)
        return
    raise typer.Exit(_carry_out(beginning, as_json))


def _carry_out(beginning: "PreparedSweep", as_json: bool) -> int:
    """Carry out a sweep and print what happens; return the exit code."""
    from quartet.cli.printing import outlive_readers
    from quartet.runtime.interruption import Interrupted, Interruption
    from quartet.sweeps.conduct import SweepFailed

    shown = complaints if as_json else console
    outlive_readers()
    with refusing():
        conductor = beginning.open(lambda: shown.print("waiting for runs of this sweep to end"))
    path = conductor.folder.path
    _say_what(shown, beginning.request, conductor)
    stopped: BaseException | None = None
    try:
        interruption = Interruption()
        with interruption, _lines(shown, conductor) as show:
            for change in conductor.changes(interruption.check):
                show(change)
    except (Interrupted, SweepFailed, OSError) as reason:
        stopped = reason
    finally:
        conductor.close()
    if isinstance(stopped, Interrupted):
        shown.print(
            f"stopped by {stopped}. Runs have saved what they had; go on with: quartet sweep "
            f"{typed(_near(path))} --resume",
            soft_wrap=True,
        )
        return RESUMABLE
    if stopped is not None:
        complaints.print(f"failed: {stopped}", style="red", soft_wrap=True)
        return FAILED
    return _print_results(conductor.sweep, as_json)


def _say_what(shown: "Console", request: "SweepRequest", conductor: "Conductor") -> None:
    spec, seeds = request.spec, request.seeds
    count = f"{spec.num_trials} trials × {len(seeds)} seeds" if len(seeds) > 1 else None
    runs, threads = count or f"{spec.num_trials} trials", conductor.processes.threads
    shown.print(
        f"quartet {__version__} · sweep {request.name} · {spec.method} · {runs} · "
        f"{spec.parallel} at once{' on Ray' if spec.ray else ''}, {threads} "
        f"thread{'s' * (threads != 1)} each · "
        f"{_near(conductor.folder.path)}",
        soft_wrap=True,
    )
    for note in request.base.notes:
        shown.print(f"note   {note}", style="yellow", soft_wrap=True)


@contextlib.contextmanager
def _lines(shown: "Console", conductor: "Conductor") -> Iterator[Any]:
    """Yield what prints a change: a line each, and on a terminal below them a live line for each
    run that is under way."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def show(change: "Change") -> None:
        if change.kind == "ended" or not shown.is_terminal:
            shown.print(Text(_change_line(change), style=_style(change)), soft_wrap=True)

    def render() -> Group:
        return Group(*(_job_line(conductor, job) for job in list(conductor.jobs)))

    if not shown.is_terminal:
        yield show
        return
    with Live(console=shown, refresh_per_second=4, transient=True, get_renderable=render):
        yield show


def _change_line(change: "Change") -> str:
    from quartet.runs.sweep_figures import in_words
    from quartet.runs.wording import number

    if change.trial is None or change.run is None:
        return f"{change.name:<18} {'done' if change.kind == 'ended' else 'started'}"
    name = f"trial {change.trial.number} seed {change.run.seed}"
    if change.kind == "started":
        return f"{name:<18} started  {in_words(change.trial)}"
    run = change.run
    if run.state == "done":
        measures = "  ".join(f"{key} {number(value)}" for key, value in run.measures.items())
        reached = f"{number(run.objective)}  {measures}"
        return f"{name:<18} done     {reached}  {in_words(change.trial)}"
    return f"{name:<18} {run.state:<8} {run.reason}"


def _style(change: "Change") -> str:
    state = change.run.state if change.run is not None else "done"
    return {"pruned": "yellow", "failed": "red"}.get(state, "default")


def _job_line(conductor: "Conductor", job: "ActiveRun") -> "Text":
    """Return the live line of a run: its stage, step, and the objective so far."""
    from rich.text import Text

    from quartet.runs.sweeps import curve
    from quartet.runs.wording import number

    words = f"{job.name:<22} "
    run = job.run
    if run is None or not run.series:
        return Text(f"{words}starting", style="dim", no_wrap=True, overflow="ellipsis")
    stage, series = list(run.series.items())[-1]
    step = series.steps[-1] if series.steps else 0
    points = curve(run, conductor.request.spec.objective)
    value = f"  {conductor.request.spec.objective} {number(points[-1][1])}" if points else ""
    return Text(f"{words}{stage} step {step}{value}", no_wrap=True, overflow="ellipsis")


def _print_results(sweep: "Sweep", as_json: bool) -> int:
    """Print the table of a sweep that is done; return the exit code."""
    if as_json:
        print_json(results(sweep))
    else:
        _print_table(sweep)
        console.print(f"sweep  {_near(sweep.path)}", soft_wrap=True)
        console.print(f"next   quartet studio {typed(_near(sweep.path))}", soft_wrap=True)
    return 0 if sweep.ranked() else FAILED


def _near(path: Path) -> Path:
    """Return a path as it is written from here: relative where it is below."""
    here = Path.cwd().resolve()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _print_table(sweep: "Sweep") -> None:
    from quartet.runs.sweep_figures import in_words, measure_names, objective_text, sweep_rows
    from quartet.runs.tables import comparison

    columns = [*sweep.keys, sweep.objective, *measure_names(sweep), "", "note"]
    rows = [
        (
            f"trial {row['trial'].number}",
            [*row["values"], row["objective"], *row["measures"], row["state"], row["note"]],
        )
        for row in sweep_rows(sweep)
    ]
    seeds = len(sweep.facts["seeds"])
    title = f"{sweep.objective}, mean ± deviation over {seeds} seeds" if seeds > 1 else ""
    console.print(comparison(title or sweep.objective, columns, rows))
    if sweep.best is None:
        console.print("best   none: no trial is done and keeps all bounds", style="yellow")
    else:
        console.print(
            f"best   {in_words(sweep.best)} · {sweep.objective} {objective_text(sweep.best)}",
            soft_wrap=True,
        )
    for key, (share, chance) in sweep.importance().items():
        console.print(
            f"       {key} explains {share:.0%} of the variance (without effect {chance:.0%})",
            soft_wrap=True,
        )


def results(sweep: "Sweep") -> dict[str, Any]:
    """Return the results of a sweep as JSON."""
    from quartet.runs.sweep_figures import measure_names, sweep_rows

    rows = []
    for row in sweep_rows(sweep):
        trial = row["trial"]
        rows.append(
            {
                "trial": trial.number,
                "values": trial.values,
                "state": trial.state,
                "allowed": trial.is_allowed,
                "mean": trial.mean,
                "deviation": trial.deviation,
                "measures": {name: trial.measure(name) for name in measure_names(sweep)},
                "reason": trial.reason or None,
                "runs": [
                    {"seed": r.seed, "state": r.state, "run": r.run, "objective": r.objective}
                    for r in trial.runs.values()
                ],
            }
        )
    best = sweep.best
    explained = {
        key: {"share": share, "without_effect": chance}
        for key, (share, chance) in sweep.importance().items()
    }
    return {
        "sweep": str(sweep.path),
        "objective": sweep.objective,
        "direction": sweep.facts["direction"],
        "best": None if best is None else best.number,
        "importance": explained,
        "trials": rows,
    }


def _print_plan(request: "SweepRequest", as_json: bool) -> None:
    from quartet.sweeps.plan import plan_sweep

    plan = plan_sweep(request)
    if as_json:
        print_json(
            {
                "runs": plan.num_runs,
                "seconds": plan.seconds,
                "trials": plan.trials,
                "note": plan.note,
            }
        )
        return
    console.print(f"plan   {plan.in_words()}", soft_wrap=True)
    for number, values in enumerate(plan.trials[:SHOWN]):
        words = " · ".join(f"{key} {json.dumps(value)}" for key, value in values.items())
        console.print(f"       trial {number:<4} {words}", soft_wrap=True)
    if len(plan.trials) > SHOWN:
        console.print(f"       and {len(plan.trials) - SHOWN:,} more")
    if plan.note:
        console.print(f"       {plan.note}", soft_wrap=True)
