"""Verbs that run, plan and start a run's file."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quartet import __version__
from quartet.cli.common import FAILED, RESUMABLE, app, complaints, console, refuse, without_progress_bars
from quartet.recipes import recipe_names, recipe_path, template_names, template_path

if TYPE_CHECKING:
    from quartet.build import Job
    from quartet.observability.run import RunFolder
    from quartet.plan import Plan
    from quartet.resume import Choice
    from quartet.settings import Settings

What = Annotated[
    str | None, typer.Argument(metavar="[RECIPE or FILE.toml]", help="A recipe's name, a TOML file or, with --resume, a run.")
]
DEFAULT = "reviews"
Words = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE …]", help="Settings that win over the file.")]


@app.command()
def run(
    what: What = None,
    words: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run of this name stopped.")] = False,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", metavar="KEY", help="With --resume: a setting that may have changed.")
    ] = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="Say what the run would take, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print it as JSON.")] = False,
    fault: Annotated[
        str | None, typer.Option("--break", help="Plant a mistake in the RL stage, for the doctor to find: see docs/doctor.md.")
    ] = None,
) -> None:
    """Run a recipe or a TOML file: one stage, or a pipeline of them. Without a name: `reviews`."""
    resumed = _run_to_resume(what, words or []) if resume else None
    settings = resumed[1] if resumed else _settings(DEFAULT if what is None else what, words or [])
    if show_plan:
        _print_plan(settings, as_json)
        return
    if accept and not resume:
        refuse("--accept: goes with --resume.")
    if settings.config.launch.type == "torchrun":
        from quartet.launch.start import follow_the_first, follows

        if follows(settings.config.launch):
            follow_the_first(settings.config.launch)
            return
    raise typer.Exit(_go_on(resumed[0], settings, fault, accept or []) if resumed else _run(settings, fault))


@app.command()
def plan(
    what: Annotated[str, typer.Argument(metavar="[RECIPE or FILE.toml]", help="A recipe's name, or a TOML file.")],
    words: Words = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    cluster: Annotated[str | None, typer.Option("--on", metavar="8xh200", help="Plan for these GPUs.")] = None,
    simulated: Annotated[
        int | None, typer.Option("--simulate", metavar="STALENESS", help="With --on: play 200 steps, answer by answer.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Run a few steps of each stage here, twice, and reckon the time from them.")
    ] = False,
) -> None:
    """Models, memory, tokens, time, and the resolved config with the origin of each value. Loads no model."""
    settings = _settings(what, words or [])
    if measured:
        _print_measured(settings)
    elif cluster is not None:
        _print_cluster(settings, cluster, simulated)
    elif simulated is not None:
        refuse("--simulate: goes with --on.")
    else:
        _print_plan(settings, as_json)


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="sft, reward_model, ppo, grpo or dpo.")],
    file: Annotated[Path | None, typer.Argument(help="Where to write it. Default: RECIPE.toml.")] = None,
) -> None:
    """Write a commented file to start from."""
    template = template_path({"rm": "reward_model"}.get(recipe, recipe))
    if template is None:
        refuse(f'"{recipe}": no such file to start from. Known are {", ".join(template_names())}.')
    target = file or Path(template.name)
    if target.exists():
        refuse(f"{target}: exists already. Give another name: quartet init {recipe} NAME.toml")
    try:
        target.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        refuse(f"{target}: cannot be written ({error.strerror}).")
    console.print(f"{target} written. Fill it in, then: quartet plan {target}, quartet run {target}", soft_wrap=True)


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(metavar="[PRESET]", help="Print this one as the TOML that recreates it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """The presets with their parts; with a name, the record as TOML, to be changed and put into a run's file."""
    from quartet.algorithms.preference import PREFERENCES
    from quartet.algorithms.presets import ALGORITHMS
    from quartet.config import did_you_mean, without_none
    from quartet.settings import preset_toml

    everything = ALGORITHMS | PREFERENCES
    if name is not None and name not in everything:
        refuse(f'"{name}": no such preset.{did_you_mean(name, everything)} `quartet algorithms` lists them.')
    chosen = {name: everything[name]} if name else everything
    if as_json:
        print(json.dumps({key: without_none(dataclasses.asdict(value)) for key, value in chosen.items()}, indent=2))
    elif name:
        console.print(preset_toml(everything[name]), soft_wrap=True, end="")
    else:
        _print_presets()


def _settings(what: str, words: list[str]) -> "Settings":
    from quartet.settings import ConfigError, read_settings

    if (Path(what) / "events.jsonl").is_file():
        refuse(f"{what}: is a run's folder. To go on with it: quartet run {what} --resume")
    if "=" in what and not Path(what).exists():  # quartet run seed=1: the default recipe with a setting
        what, words = DEFAULT, [what, *words]
    path = recipe_path(what)
    shown = f"recipe {what}" if path else None
    if path is None and not what.endswith(".toml"):
        from quartet.config import did_you_mean

        near = did_you_mean(what, recipe_names())
        refuse(f'"{what}": no such recipe, and not a .toml file.{near} Recipes are {", ".join(recipe_names())}.')
    try:
        return read_settings(path or Path(what), words, shown)
    except ConfigError as error:
        refuse(str(error))


def _print_plan(settings: "Settings", as_json: bool) -> None:
    from quartet.config import json_ready
    from quartet.plan import in_words
    from quartet.plan import plan as make_plan
    from quartet.settings import resolved_toml

    made = make_plan(settings.config)
    if as_json:
        whole = {"plan": dataclasses.asdict(made), "config": json_ready(settings.config), "origins": settings.origins}
        print(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    console.print(f"plan   {in_words(made)}", soft_wrap=True)
    for phase, size in (made.memory or {}).items():
        console.print(f"       memory   {phase:<22} ≈ {size / 1e6:>9,.0f} MB")
    for stage, count in made.optimizer_steps.items():
        console.print(f"       steps    {stage:<22}   {count:>9,} optimizer steps")
    for stage, tokens in made.tokens.items():
        console.print(f"       tokens   {stage:<22} ≈ {tokens:>9,.0f}")
    if made.disk is not None:
        console.print(f"       disk     {'run folder':<22} ≈ {made.disk / 1e6:>9,.0f} MB")
    console.print()
    console.print(resolved_toml(settings), soft_wrap=True, end="")


def _print_measured(settings: "Settings") -> None:
    from quartet.measure import STEPS, in_words, measure

    config = settings.config
    if config.launch.processes > 1 or config.launch.shard or config.launch.type != "local":
        refuse("--measure: measures one process. Leave [launch] out.")
    without_progress_bars()
    console.print(f"running {STEPS} steps of each stage, twice")
    for line in in_words(config, measure(config)):
        console.print(line, soft_wrap=True)


def _print_cluster(settings: "Settings", words: str, bound: int | None) -> None:
    import statistics

    from quartet.cluster import Cluster, in_words, plan_cluster, simulated

    try:
        made = plan_cluster(settings.config, Cluster.of(words))
    except ValueError as error:
        refuse(str(error))
    for line in in_words(made):
        console.print(line, soft_wrap=True)
    if bound is not None:
        found = simulated(made, bound)
        age = statistics.fmean(found.staleness)
        console.print(
            f"played  {found.steps} steps of {found.seconds:,.1f} s with a staleness of at most {bound}: on average {age:.2f}; "
            f"trainers wait {found.trainer_idle:.0%} of the time, slots of generators {found.generators_idle:.0%}",
            soft_wrap=True,
        )


def _print_presets() -> None:
    from rich.table import Table
    from rich.text import Text

    from quartet.algorithms.describe import in_short, main_parts, other_parts
    from quartet.algorithms.preference import PREFERENCES
    from quartet.algorithms.presets import FAMILIES

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("preset", no_wrap=True, style="bold")
    table.add_column("advantage · policy loss · KL · aggregation · and what else does something")
    for family, members in FAMILIES.items():
        table.add_row("", Text(family, style="dim"))
        for name, algorithm in members.items():
            table.add_row(name, " · ".join([*main_parts(algorithm), *other_parts(algorithm)]))
    table.add_row("", Text("from comparisons instead of rewards; only online_dpo samples, and needs both", style="dim"))
    for name, loss in PREFERENCES.items():
        table.add_row(name, f"loss {in_short(loss)}")
    console.print(table, width=None if console.is_terminal else 200)


def _run_to_resume(what: str | None, words: list[str]) -> "tuple[Path | None, Settings]":
    """The run folder, None where there is none of that name yet, and the config to go on with."""
    from quartet.resume import find_run

    if what is not None and "=" in what and not Path(what).exists():
        words = [what, *words]
        what = None
    folder = Path(what or "runs/latest")
    if (folder / "events.jsonl").is_file():
        if not (folder / "config.resolved.toml").is_file():
            refuse(f"{folder}: has no config.resolved.toml, so it is not known what to go on with.")
        return folder.resolve(), _settings(str(folder / "config.resolved.toml"), words)
    if what is None:
        refuse("runs/latest: there is no run to resume. Name one: quartet run runs/… --resume")
    settings = _settings(what, words)
    run = settings.config.run
    return find_run(Path(run.folder), run.name or settings.name), settings


def _run(settings: "Settings", fault: str | None) -> int:
    """A new run. Everything that can be refused is refused before its folder exists."""
    from quartet.observability.run import RunFolder
    from quartet.settings import resolved_toml

    job, config = _build(settings, fault), settings.config
    files = {"config.toml": settings.text, "config.resolved.toml": resolved_toml(settings)}
    try:
        folder = RunFolder.create(Path(config.run.folder), config.run.name or settings.name, files)
    except OSError as error:
        refuse(f'run.folder = "{config.run.folder}": cannot be written ({error.strerror}).')
    return _work(settings, job, folder, fault)


def _go_on(path: Path | None, settings: "Settings", fault: str | None, accept: list[str]) -> int:
    """From the newest checkpoint that can be used."""
    from quartet import durable
    from quartet.observability.reader import Run
    from quartet.observability.run import RunFolder
    from quartet.resume import CannotResume, choose, has_begun, set_aside
    from quartet.settings import resolved_toml

    if path is None:
        console.print("There is no run of this name to resume: a new one begins.", soft_wrap=True)
        return _run(settings, fault)
    try:
        folder = RunFolder(path)
    except OSError as error:
        refuse(str(error) if error.errno is None else f"{path}: cannot be written ({error.strerror}).")
    job = _build(settings, fault)
    choice = None
    if has_begun(path):
        try:
            choice = choose(path, settings.config, job.made_with, accept)
        except CannotResume as error:
            refuse(str(error))
        run = Run(path)
        if run.status == "done" and not choice.skipped:
            console.print(f"{path} is done: {run!r}", soft_wrap=True)
            return 0
        for checkpoint, reason in choice.skipped:
            console.print(f"note   checkpoint {checkpoint.name} was skipped: {reason}", style="yellow", soft_wrap=True)
        set_aside(choice.skipped)
    else:
        console.print(f"{path} had not begun when it stopped: it begins now.", soft_wrap=True)
        folder.cut_back(0, -1)
    durable.replace(path / "config.toml", settings.text)
    durable.replace(path / "config.resolved.toml", resolved_toml(settings))
    return _work(settings, job, folder, fault, choice)


def _work(settings: "Settings", job: "Job", folder: "RunFolder", fault: str | None, choice: "Choice | None" = None) -> int:
    """From the first event to the last, whatever ends it."""
    from quartet.config import json_ready
    from quartet.interruption import Interrupted, Interruption
    from quartet.launch.start import crew
    from quartet.observability.screen import Screen, sample_lines
    from quartet.observability.sinks import Tracking
    from quartet.observability.tokens import TokenTexts
    from quartet.pipeline import Finished, Pipeline, StageFailed
    from quartet.worker import WorkerLost

    config = settings.config
    _send_chatter_to(folder.path / "run.log")
    screen = Screen(console)
    tracking = Tracking(config.run.track, folder.path, json_ready(config))
    interruption = Interruption(config.run.max_minutes, screen.notice)
    saving, texts = job.saving(config.run), TokenTexts(job.tokenizer)
    pipeline = Pipeline(job.stages, folder, texts, saving, tracking, interruption, strict=fault is None)
    since = None if choice is None else choice.checkpoint
    if since is not None:
        pipeline.cut_back(since)
    planned = _say_what(settings, job, folder, fault, choice)
    evaluation: dict[str, Any] | None = None
    began = time.monotonic()
    try:
        with interruption, crew(config, job, folder.path, fault) as group:
            for event in pipeline.run(since, group):
                screen.show(event)
                if isinstance(event, Finished) and event.stage.name == "evaluation":
                    evaluation = event.summary
    except (Interrupted, WorkerLost) as reason:
        screen.close()
        folder.event("interrupted", reason=str(reason))
        said = f"stopped by {reason}" if isinstance(reason, Interrupted) else f"stopped: {str(reason).rstrip('.')}"
        lost = "Nothing is lost" if isinstance(reason, Interrupted) else "The last checkpoint is whole"
        console.print(f"{said}. {lost}; go on with: quartet run {folder.path} --resume", soft_wrap=True)
        return RESUMABLE
    except (StageFailed, OSError) as error:
        screen.close()
        with contextlib.suppress(OSError):  # a full disk may be the reason
            folder.event("failed", error=str(error))
        complaints.print(f"failed: {error}", style="red", soft_wrap=True)
        complaints.print(f"The record so far is in {folder.path}, details in run.log.", soft_wrap=True)
        _log_traceback()
        return FAILED
    finally:
        tracking.close()
        screen.close()
    folder.event(
        "done",
        peak_bytes=_peak_bytes(),
        planned_peak_bytes=planned.peak,
        seconds=round(time.monotonic() - began, 1),
        planned_seconds=planned.seconds,
    )
    folder.close()
    if evaluation:
        for line in sample_lines(evaluation["samples"]):
            console.print(line, soft_wrap=True)
    _say_where(folder.path, config.run.folder)
    return 0


def _say_what(settings: "Settings", job: "Job", folder: "RunFolder", fault: str | None, choice: "Choice | None") -> "Plan":
    """What will be run, what it takes, and what a person should know before."""
    from quartet.plan import in_words
    from quartet.plan import plan as make_plan

    console.print(_first_line(settings, job, folder.path), soft_wrap=True)
    planned = make_plan(settings.config)
    console.print(f"plan   {in_words(planned)}", soft_wrap=True)
    if choice is not None:
        since = choice.checkpoint
        folder.event("resumed", checkpoint=since.name, accepted=list(choice.accepted), skipped=dict(choice.reasons()))
        console.print(f"resume {since.name}, of {folder.path}", soft_wrap=True)
        for sentence in choice.accepted:
            console.print(f"note   {sentence}", style="yellow", soft_wrap=True)
    planted = [] if fault is None else [f"--break {fault}: this run has a mistake on purpose."]
    for note in [*planted, *job.notes]:
        folder.event("note", sentence=note)
        console.print(f"note   {note}", style="yellow", soft_wrap=True)
    return planned


def _say_where(folder: Path, root: str) -> None:
    """What there is now, and what one can do with it."""
    from quartet.observability.reader import Run
    from quartet.studio.report import write_report

    console.print(f"run    {folder}    peak {_peak_bytes() / 1e6:,.0f} MB", soft_wrap=True)
    try:
        write_report(Run(folder))
        console.print(f"report {folder / 'report.html'}", soft_wrap=True)
    except Exception:  # the run is done whatever becomes of the page about it
        _log_traceback()
        console.print("report could not be written, see run.log", style="yellow", soft_wrap=True)
    talk = f", quartet chat {folder}" if (folder / "policy").is_dir() else ""
    console.print(f"next   quartet studio{'' if root == 'runs' else f' {root}'}{talk}", soft_wrap=True)


def _build(settings: "Settings", fault: str | None) -> "Job":
    from quartet.machine import keep_freed_memory, unmet

    if wrong := unmet():
        refuse("\n".join(wrong))
    from quartet.build import build
    from quartet.data import DataError
    from quartet.faults import FAULTS
    from quartet.launch.start import team_of
    from quartet.models.adapters import AdapterError
    from quartet.models.chat import ChatError
    from quartet.models.language_model import ModelError
    from quartet.observability.sinks import TrackerMissing
    from quartet.rewards.protocol import RewardError

    keep_freed_memory()
    if fault is not None and (fault not in FAULTS or settings.config.rl_stage is None):
        refuse(
            f"--break {fault}: " + ("there is no RL stage to break." if fault in FAULTS else f"known are {', '.join(FAULTS)}.")
        )
    try:
        return build(settings.config, fault, team_of(settings.config.launch))
    except (DataError, ModelError, AdapterError, ChatError, RewardError, TrackerMissing) as error:
        refuse(str(error))


def _first_line(settings: "Settings", job: "Job", folder: Path) -> str:
    import torch

    place = job.device.type
    threads = f", {torch.get_num_threads()} threads" if place == "cpu" else ""
    return f"quartet {__version__} · {place}{threads} · fp32 · seed {settings.config.seed} · {folder}"


def _send_chatter_to(path: Path) -> None:
    """What other libraries log and warn about goes to the run's log, not over the live lines."""
    import logging
    import warnings

    import transformers

    logging.basicConfig(filename=path, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    without_progress_bars()


def _log_traceback() -> None:
    import logging

    logging.exception("the run failed")


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
