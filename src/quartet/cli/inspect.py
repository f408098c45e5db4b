"""Verbs that look at runs."""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import (
    CHECK_FAILED,
    app,
    complaints,
    console,
    is_loopback,
    listening,
    print_json,
    refuse,
    refusing,
    url_of,
    without_progress_bars,
)
from quartet.io.texts import typed

if TYPE_CHECKING:
    from quartet.loops.rl import Step
    from quartet.runs.reader import Run


@app.command()
def studio(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, or folders of them. Default: runs.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8700,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; others than this machine reach it only if you say so."
        ),
    ] = "127.0.0.1",
) -> None:
    """Every run in the browser: curves, samples, each token with its numbers, live while it
    trains."""
    from quartet.io.http_server import make_server
    from quartet.runs.reader import NoRun, find_runs
    from quartet.studio.app import LOOPBACK, make_app

    roots = runs or [Path("runs")]
    try:
        count = sum(len(find_runs(root)) for root in roots)
    except NoRun as error:
        refuse(str(error))
    hosts, token = (
        ((*LOOPBACK, host), None) if is_loopback(host) else (("*",), secrets.token_urlsafe(24))
    )
    listener = listening(host, port)
    server = make_server(make_app(roots, hosts, token), host, port)
    asked = "" if token is None else f"?token={token}"
    console.print(
        f"{count} run{'s' * (count != 1)} on {url_of(listener, host)}{asked}  Ctrl-C ends it",
        soft_wrap=True,
    )
    server.run(sockets=[listener])


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")] = Path("runs/latest"),
) -> None:
    """One HTML file that opens from disk anywhere: what was trained, what came of it, whether to
    trust it."""
    from quartet.studio.report import write_report

    run = _run(run_folder)
    try:
        console.print(f"{write_report(run)} written", soft_wrap=True)
    except OSError as error:
        refuse(f"{run.path / 'report.html'}: cannot be written ({error.strerror}).")
    _say_problems(run)


@app.command()
def inspect(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")] = Path("runs/latest"),
    step: Annotated[
        int | None, typer.Option(min=0, help="Left out, the last that was written.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=0, help="Left out, the samples of the step are listed.")
    ] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="The answers that are looked at again and again.")
    ] = False,
) -> None:
    """One rollout in the terminal, a row per token: reward, value, advantage, ratio, and what the
    clip did."""
    from quartet.runs.reader import NoRun
    from quartet.runs.tables import sample_table, token_rows
    from quartet.runs.untrusted import printable
    from quartet.studio.views import glance

    run, kind = _run(run_folder), "probes" if probes else "rollouts"
    steps = run.steps(kind)
    if not steps:
        _say_problems(run)
        refuse(f"{run.name} has no {kind}. An RL stage writes them.")
    step = steps[-1] if step is None else step
    try:
        if sample is None:
            console.print(sample_table(run.samples(step, kind), step))
            console.print(
                f"next   quartet inspect {typed(run_folder)} --step {step} --sample 0",
                soft_wrap=True,
            )
            _say_problems(run)
            return
        rows = run.sample(step, sample, kind)
    except NoRun as error:
        refuse(str(error))
    for sentence in glance(rows):
        console.print(printable(sentence), soft_wrap=True)  # it quotes what the model wrote
    console.print(token_rows(rows, run.cases(rows), console.width))
    _say_problems(run)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs")) -> None:
    """The runs in a folder, the newest first, with their last numbers."""
    from quartet.runs.reader import NoRun, Run, find_runs
    from quartet.runs.tables import run_table
    from quartet.runs.untrusted import printable
    from quartet.studio.views import run_row, unreadable_row

    try:
        found = find_runs(folder)
    except NoRun as error:
        refuse(str(error))
    if not found:
        console.print(f"{folder} has no runs yet.", soft_wrap=True)
        return
    rows = []
    for path in found:
        try:
            rows.append(run_row(Run(path)))
        except NoRun as error:
            rows.append(unreadable_row(printable(path.name), str(error)))
    console.print(run_table(rows))
    for row in rows:
        _say(row["name"], row["problems"])


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN …", help="Two run folders or more.")
    ],
) -> None:
    """Runs side by side: what was set differently, and where they ended."""
    from quartet.runs.tables import comparison
    from quartet.studio.views import differences, headline

    if len(folders) < 2:
        refuse("compare needs two runs or more.")
    chosen = [_run(folder) for folder in folders]
    numbers = [dict(headline(run)) for run in chosen]
    labels = dict.fromkeys(label for table in numbers for label in table)
    names = [run.name for run in chosen]
    console.print(
        comparison(
            "ended with", names, [(label, [t.get(label, "–") for t in numbers]) for label in labels]
        )
    )
    console.print(comparison("set differently", names, differences([run.config for run in chosen])))


@app.command()
def replay(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE …]", help="Settings of algorithm or optim to change."),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="Which update.")] = 1,
) -> None:
    """Compute one update of an RL stage again: as it was, to the bit; or, of the same rollouts,
    with a setting changed. Nothing is written."""
    from quartet.assembly import Assembler
    from quartet.assembly.stages import rl_stage
    from quartet.config.toml import ConfigError, read_settings
    from quartet.runs.tables import comparison
    from quartet.runtime.replay import CannotReplay, checkpoint_before, cosine, differences
    from quartet.runtime.replay import replay as compute

    without_progress_bars()
    run, words = _run(run_folder), words or []
    if strange := [word for word in words if not word.startswith(("algorithm.", "optim."))]:
        refuse(
            f"{strange[0]}: a replay learns from the same rollouts again; only algorithm.* and "
            f"optim.* can be changed."
        )
    recorded = run.series.get(run.rl_stage or "")
    if run.rl_stage is None or recorded is None:
        refuse(f"{run.name} has no RL stage whose updates could be computed again.")
    if step not in recorded.steps:
        refuse(
            f"{run.name}: {run.rl_stage} has the steps 1 to {recorded.steps[-1]:,}, not {step:,}."
        )
    try:
        since = checkpoint_before(run.path, run.rl_stage, step)
        configs = [
            read_settings(run.path / "config.resolved.toml", chosen).config
            for chosen in ([], words)
        ]
    except (ConfigError, CannotReplay) as error:
        refuse(str(error))
    fault = since.facts["fault"]
    with refusing():
        stages = [rl_stage(Assembler(config, fault), run.rl_stage) for config in configs]
    console.print(
        f"from {since.name}: {step - since.facts['step']} steps to compute", soft_wrap=True
    )
    same: list[str] = []

    def told(done: "Step") -> None:
        place = recorded.steps.index(done.number) if done.number in recorded.steps else None
        there = (
            {}
            if place is None
            else {name: column[place] for name, column in recorded.columns.items()}
        )
        same[:] = differences(
            {name: x for name, x in there.items() if not math.isnan(x)}, done.metrics
        )

    was, other = compute(stages[0], run.path, since, step, stages[1] if words else None, told)
    if same:
        console.print(
            f"not as it was: {', '.join(same)} differ from the record",
            style="yellow",
            soft_wrap=True,
        )
    else:
        console.print(
            f"step {step} again: every metric is the recorded one, to the bit", soft_wrap=True
        )
    sides = [was] if other is None else [was, other]
    rows = [
        ("tokens clipped", [f"{int(o.clipped.sum()):,} of {o.tokens:,}" for o in sides]),
        ("KL(π_old ‖ π) after, per token", [f"{o.kl_after:.3g}" for o in sides]),
        ("length of the actor's step", [f"{float(o.moved.norm()):.3g}" for o in sides]),
        *(
            (name, [f"{o.metrics[name]:.4g}" if name in o.metrics else "–" for o in sides])
            for name in REPLAYED
        ),
    ]
    console.print(
        comparison("", ["as it was", *([] if other is None else ["with " + " ".join(words)])], rows)
    )
    if other is not None:
        console.print(
            f"angle between the two steps: cosine {cosine(was.moved, other.moved):.4f}",
            soft_wrap=True,
        )


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
"""Metrics that a replay shows."""


@app.command()
def doctor(
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Left out, it looks at this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What is wrong with a run, with evidence and remedy; or what this machine has. Exit code 3:
    there are findings."""
    if run_folder is None:
        _machine(as_json)
        return
    from quartet.runs.doctor import RULES, examine, unread

    run = _run(run_folder)
    found = [*unread(run.check()), *examine(run)]
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in found])
    for finding in () if as_json else found:
        where = f"{finding.stage}, step {finding.step}: " if finding.stage else ""
        console.print(f"▲ {where}{finding.sentence}", style="yellow", soft_wrap=True)
        console.print(f"  {finding.rule}. {finding.why}", style="dim", soft_wrap=True)
    if found:
        raise typer.Exit(CHECK_FAILED)
    if not as_json:
        console.print(f"{run.name}: nothing found by {len(RULES)} rules.", soft_wrap=True)


def _machine(as_json: bool) -> None:
    """Versions, hardware, extras and what isolates programs."""
    import importlib.util
    import shutil

    import torch

    from quartet.recording.run_folder import environment

    extras = {"lora": "peft", "math": "math_verify", "json": "jsonschema", "datasets": "datasets"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        **environment(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "extras": {
            extra: importlib.util.find_spec(package) is not None
            for extra, package in extras.items()
        },
        "bubblewrap": shutil.which("bwrap"),
    }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        console.print(f"{name:<12}{'none' if value in (None, []) else shown}", soft_wrap=True)
    missing = [extra for extra, there in facts["extras"].items() if not there]
    if missing:
        console.print(
            f'to add      pip install "quartet-rlhf[{",".join(missing)}]"',
            style="yellow",
            soft_wrap=True,
        )


def _say_problems(run: "Run") -> None:
    _say(run.name, run.problems)


def _say(name: str, problems: Sequence[str]) -> None:
    """What could not be read of a run, beside what is printed of it."""
    for sentence in problems:
        text = sentence if sentence.startswith(f"{name}: ") else f"{name}: {sentence}"
        complaints.print(text, style="yellow", soft_wrap=True)


def _run(folder: Path) -> "Run":
    from quartet.runs.reader import NoRun, Run

    try:
        return Run(folder)
    except NoRun as error:
        refuse(str(error))
