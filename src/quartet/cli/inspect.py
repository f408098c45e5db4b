"""The commands that show runs: studio, report, inspect, runs, compare, replay, doctor."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from quartet.cli.common import (
    CHECK_FAILED,
    app,
    bound_socket,
    complaints,
    console,
    exposure,
    print_json,
    refuse,
    refusing,
    url_of,
)
from quartet.io.install import install_command
from quartet.io.texts import typed

if TYPE_CHECKING:
    from quartet.loops.rl import Step
    from quartet.runs.event_log import Series
    from quartet.runs.reader import Run
    from quartet.runtime.replay import Outcome
    from quartet.stages.rl import RLStage


@app.command()
def studio(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders of them. Default: runs.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8700,
    host: Annotated[
        str,
        typer.Option(help="The address to listen on; by default only this machine can connect."),
    ] = "127.0.0.1",
) -> None:
    """Show runs in the browser: curves, samples and the numbers of each token.

    The pages follow a run while it trains.
    """
    from quartet.io.http_server import make_server
    from quartet.runs.folders import sweep_folders
    from quartet.runs.reader import NoRun, find_runs
    from quartet.studio.app import make_app

    roots = runs or [Path("runs")]
    try:
        count = sum(len(find_runs(root)) for root in roots)
    except NoRun as error:
        refuse(str(error))
    sweeps = sum(len(sweep_folders(root)) for root in roots)
    swept = f" and {sweeps} sweep{'s' * (sweeps != 1)}" if sweeps else ""
    hosts, token = exposure(host)
    listener = bound_socket(host, port)
    server = make_server(make_app(roots, hosts, token), host, port)
    query = "" if token is None else f"?token={token}"
    console.print(
        f"{count} run{'s' * (count != 1)}{swept} on {url_of(listener, host)}{query}  "
        "Ctrl-C ends it",
        soft_wrap=True,
    )
    server.run(sockets=[listener])


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")] = Path("runs/latest"),
) -> None:
    """Write report.html into the run folder.

    It is one file, readable without Quartet, with settings, results and the doctor's findings.
    """
    from quartet.studio.report import write_report

    run = _run(run_folder)
    try:
        console.print(f"{write_report(run)} written", soft_wrap=True)
    except OSError as error:
        refuse(f"{run.path / 'report.html'}: cannot be written ({error.strerror}).")
    _print_problems(run)


@app.command()
def inspect(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")] = Path("runs/latest"),
    step: Annotated[
        int | None, typer.Option(min=0, help="The step to show. Default: the last one recorded.")
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=0, help="The sample to show. Default: list the samples of the step."),
    ] = None,
    probes: Annotated[
        bool,
        typer.Option(
            "--probes", help="Show the probes: responses that are scored again and again."
        ),
    ] = False,
) -> None:
    """Print one rollout, a row per token.

    Shows each token's reward, value, advantage and ratio, and whether its update was clipped.
    """
    from quartet.runs.reader import NoRun
    from quartet.runs.rounds import probe_folders
    from quartet.runs.tables import sample_table, token_rows
    from quartet.runs.untrusted import printable
    from quartet.studio.views import glance

    run, kind = _run(run_folder), "rollouts"
    if probes:
        folders = [*probe_folders(run).values()] or ["probes"]
        kind = next((k for k in reversed(folders) if step in run.steps(k)), folders[-1])
    steps = run.steps(kind)
    if not steps:
        _print_problems(run)
        refuse(f"{run.name} has no {'probes' if probes else kind}. An RL stage writes them.")
    step = steps[-1] if step is None else step
    try:
        if sample is None:
            console.print(sample_table(run.samples(step, kind), step))
            console.print(
                f"next   quartet inspect {typed(run_folder)} --step {step} --sample 0",
                soft_wrap=True,
            )
            _print_problems(run)
            return
        rows = run.sample(step, sample, kind)
    except NoRun as error:
        refuse(str(error))
    for sentence in glance(rows):
        console.print(
            printable(sentence), soft_wrap=True
        )  # the sentence quotes the model, whose text may have control characters
    console.print(token_rows(rows, run.cases(rows), console.width))
    _print_problems(run)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs")) -> None:
    """List the runs and the sweeps in a folder, the newest first, with their last metrics."""
    from quartet.runs.folders import sweep_folders
    from quartet.runs.reader import NoRun, Run, find_runs
    from quartet.runs.tables import run_table
    from quartet.runs.untrusted import printable
    from quartet.studio.views import run_row, unreadable_row

    try:
        paths = find_runs(folder)
    except NoRun as error:
        refuse(str(error))
    sweeps = sweep_folders(folder)
    if not paths and not sweeps:
        console.print(f"{folder} has no runs yet.", soft_wrap=True)
        return
    for sweep in sweeps:
        console.print(_sweep_line(sweep), soft_wrap=True)
    if not paths:
        return
    rows = []
    for path in paths:
        try:
            rows.append(run_row(Run(path)))
        except NoRun as error:
            rows.append(unreadable_row(printable(path.name), str(error)))
    console.print(run_table(rows))
    for row in rows:
        _print_sentences(row["name"], row["problems"])


def _sweep_line(path: Path) -> str:
    """Return a line about a sweep: its status, how many of its trials are done, and the best."""
    from quartet.runs.reader import NoRun
    from quartet.runs.sweep_figures import in_words, objective_text
    from quartet.runs.sweeps import Sweep
    from quartet.runs.untrusted import printable

    try:
        sweep = Sweep(path)
    except NoRun as error:
        return f"sweep  {printable(path.name)}: {error}"
    done = sum(trial.state == "done" for trial in sweep.trials.values())
    line = f"sweep  {sweep.name}  {sweep.status}  {done} of {sweep.facts['trials']} trials done"
    if sweep.best is None:
        return line
    return f"{line}  best {in_words(sweep.best)} · {sweep.objective} {objective_text(sweep.best)}"


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN …", help="Two or more run folders.")
    ],
) -> None:
    """Print runs side by side: their last metrics and the settings that differ."""
    from quartet.runs.tables import comparison
    from quartet.studio.views import differences, last_numbers

    if len(folders) < 2:
        refuse("compare needs two runs or more.")
    opened = [_run(folder) for folder in folders]
    results = [last_numbers(run) for run in opened]
    labels = dict.fromkeys(label for result in results for label in result)
    names = [run.name for run in opened]
    rows = [(label, [result.get(label, "–") for result in results]) for label in labels]
    console.print(comparison("ended with", names, rows))
    settings = differences([run.config for run in opened])
    console.print(comparison("set differently", names, settings))


@app.command()
def replay(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE …]", help="Settings of algorithm or optim to change."),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="The step whose update is computed.")] = 1,
) -> None:
    """Compute one update of an RL stage again, to the bit.

    With settings changed, also the update that they give on the same rollouts.
    Nothing is written.
    """
    from quartet.assembly import Assembler
    from quartet.assembly.stages import stage as stage_of
    from quartet.cli.screen import working
    from quartet.config.toml import ConfigError, read_settings
    from quartet.runtime.replay import CannotReplay, checkpoint_before
    from quartet.runtime.replay import replay as compute

    run, words = _run(run_folder), words or []
    name, series = _recorded_series(run, step, words)
    try:
        since = checkpoint_before(run.path, name, step)
        configs = [
            read_settings(run.path / "config.resolved.toml", settings).config
            for settings in ([], words)
        ]
    except (ConfigError, CannotReplay) as error:
        refuse(str(error))
    steps = step - since.facts["step"]
    console.print(f"from {since.name}: {steps} step{'s' * (steps != 1)} to compute", soft_wrap=True)
    changed_metrics: list[str] = []

    def compare_with_record(replayed: "Step") -> None:
        changed_metrics[:] = _changed_metrics(series, replayed)
        work.done, work.unit = replayed.number - since.facts["step"], "steps"

    with refusing(), working(complaints, "computing") as work:
        work.total = steps
        fault = since.facts["fault"]
        stages = [cast("RLStage", stage_of(Assembler(config, fault), name)) for config in configs]
        original, changed = compute(
            stages[0],
            run.path,
            since,
            step,
            stages[1] if words else None,
            compare_with_record,
        )
    _print_replay(step, changed_metrics, original, changed, words)


def _recorded_series(run: "Run", step: int, words: list[str]) -> tuple[str, "Series"]:
    """Return the RL stage that took a step, and its recorded metrics; refuse a replay that cannot
    be computed."""
    if others := [word for word in words if not word.startswith(("algorithm.", "optim."))]:
        refuse(
            f"{others[0]}: a replay learns from the same rollouts again; only algorithm.* and "
            f"optim.* can be changed."
        )
    if run.rl_stage is None:
        refuse(f"{run.name} has no RL stage whose updates can be computed again.")
    stage = next((each for each in run.rl_stages if step in run.series[each].steps), None)
    if stage is None:
        last = run.series[run.rl_stage].steps[-1]
        refuse(f"{run.name}: {run.rl_stages[0]} has the steps 1 to {last:,}, not {step:,}.")
    return stage, run.series[stage]


def _changed_metrics(series: "Series", replayed: "Step") -> list[str]:
    """Return the names of the metrics that differ from the recorded ones; none if the step is not
    recorded."""
    from quartet.runtime.replay import differences

    if replayed.number not in series.steps:
        return []
    place = series.steps.index(replayed.number)
    recorded = {name: column[place] for name, column in series.columns.items()}
    measured = {name: value for name, value in recorded.items() if not math.isnan(value)}
    return differences(measured, replayed.metrics)


def _print_replay(
    step: int,
    changed_metrics: list[str],
    original: "Outcome",
    changed: "Outcome | None",
    words: list[str],
) -> None:
    """Print whether the replay is exact, and the outcome beside that of the changed settings."""
    from quartet.runs.tables import comparison
    from quartet.runtime.replay import cosine

    if changed_metrics:
        sentence = f"not as recorded: {', '.join(changed_metrics)} differ from the record"
        console.print(sentence, style="yellow", soft_wrap=True)
    else:
        sentence = f"step {step} again: every metric is the recorded one, to the bit"
        console.print(sentence, soft_wrap=True)
    outcomes = [original] if changed is None else [original, changed]
    columns = ["as recorded", *([] if changed is None else ["with " + " ".join(words)])]
    rows = [
        ("tokens clipped", [f"{int(o.clipped.sum()):,} of {o.tokens:,}" for o in outcomes]),
        ("KL(π_old ‖ π) after, per token", [f"{o.kl_after:.3g}" for o in outcomes]),
        ("norm of the actor's change", [f"{float(o.weight_change.norm()):.3g}" for o in outcomes]),
    ]
    for name in REPLAYED:
        values = [f"{o.metrics[name]:.4g}" if name in o.metrics else "–" for o in outcomes]
        rows.append((name, values))
    console.print(comparison("", columns, rows))
    if changed is not None:
        angle = cosine(original.weight_change, changed.weight_change)
        console.print(f"cosine between the two changes: {angle:.4f}", soft_wrap=True)


REPLAYED = (
    "policy/clip_fraction",
    "ratio/max",
    "ratio/min",
    "loss/policy",
    "loss/value",
    "grad_norm/actor",
    "advantage/std",
    "kl/coef",
)
"""The metrics that `quartet replay` prints."""


@app.command()
def doctor(
    run_folder: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run folder. Default: check this machine instead."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print what is wrong with a run, with evidence and remedy.

    Without a run, print the versions and the hardware of this machine. The exit code is 3 if there
    are findings.
    """
    if run_folder is None:
        _print_machine(as_json)
        return
    from quartet.runs.doctor import diagnose, unread
    from quartet.runs.rules import RULES
    from quartet.runs.wording import where

    run = _run(run_folder)
    diagnosis = diagnose(run)
    findings = [*unread(run.check()), *diagnosis.findings]
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    for finding in () if as_json else findings:
        place = f"{where(finding.stage, finding.step)}: " if finding.stage else ""
        console.print(f"▲ {place}{finding.sentence}", style="yellow", soft_wrap=True)
        console.print(f"  {finding.rule}. {finding.why}", style="dim", soft_wrap=True)
    if findings:
        raise typer.Exit(CHECK_FAILED)
    if not as_json:
        console.print(
            f"{run.name}: nothing found by the {diagnosis.num_applied} of {len(RULES)} rules that "
            "apply.",
            soft_wrap=True,
        )


EXTRAS = {
    "lora": "peft",
    "math": "math_verify",
    "json": "jsonschema",
    "datasets": "datasets",
    "bitsandbytes": "bitsandbytes",
    "sweep": "optuna",
}
"""The module of each extra that a model, a reward, data or a sweep may need."""
YES_NO = {True: "yes", False: "no"}


def _print_machine(as_json: bool) -> None:
    """Print versions, hardware, optional packages and the sandbox for programs."""
    import importlib.util
    import shutil

    import torch

    from quartet.recording.run_folder import environment

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        **environment(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "extras": {
            extra: importlib.util.find_spec(package) is not None
            for extra, package in EXTRAS.items()
        },
        "bubblewrap": shutil.which("bwrap"),
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        shown = (
            ", ".join(f"{k} {YES_NO.get(v, v)}" for k, v in value.items())
            if isinstance(value, dict)
            else value
        )
        console.print(f"{name:<12}{'none' if value in (None, []) else shown}", soft_wrap=True)
    missing = [extra for extra, is_installed in facts["extras"].items() if not is_installed]
    if missing:
        console.print(
            f"to add      {install_command(*missing)}",
            style="yellow",
            soft_wrap=True,
        )


def _print_problems(run: "Run") -> None:
    """Print what could not be read of a run to standard error."""
    _print_sentences(run.name, run.problems)


def _print_sentences(name: str, problems: Sequence[str]) -> None:
    for sentence in problems:
        text = sentence if sentence.startswith(f"{name}: ") else f"{name}: {sentence}"
        complaints.print(text, style="yellow", soft_wrap=True)


def _run(folder: Path) -> "Run":
    from quartet.runs.reader import NoRun, Run

    try:
        return Run(folder)
    except NoRun as error:
        refuse(str(error))
