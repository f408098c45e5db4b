"""The commands that start with a recipe: run, plan, init, algorithms."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import (
    SettingsCommand,
    app,
    console,
    print_json,
    refuse,
    refusing,
)
from quartet.cli.lifecycle import go_on, new_run
from quartet.io.texts import did_you_mean, typed
from quartet.recipes import (
    recipe_names,
    recipe_path,
    sweep_names,
    sweep_path,
    template_names,
    template_path,
)

if TYPE_CHECKING:
    from quartet.config.run import Launch
    from quartet.config.toml import Settings

What = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE or FILE.toml]",
        help="A recipe's name, a TOML file or, with --resume, a run folder.",
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE …]", help="Settings that replace those of the file."),
]


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="The model to start from, a folder or hub id: policy.model, in place of one that the "
        "recipe creates.",
    ),
]


@app.command(cls=SettingsCommand)
def run(
    what: What = None,
    words: Words = None,
    model: Model = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run of this name from its last checkpoint.")
    ] = False,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            metavar="KEY",
            help="With --resume: a setting that may differ from the checkpoint's.",
        ),
    ] = None,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Print what the run would take, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print it as JSON.")] = False,
    nodes: Annotated[
        str | None,
        typer.Option(
            "--nodes",
            metavar="2x8",
            help="Print the commands that start it on 2 nodes of 8 ranks, and stop.",
        ),
    ] = None,
    fault: Annotated[
        str | None,
        typer.Option(
            "--break",
            help="Plant a mistake in the RL stage for the doctor to find (docs/doctor.md).",
        ),
    ] = None,
) -> None:
    """Run a recipe or a TOML file: one stage or a pipeline of stages.

    The default is the recipe `reviews`.
    """
    from quartet.runtime.requests import DEFAULT, run_to_resume, settings_of

    words = with_model(words, model)
    if nodes is not None:
        _print_commands(
            DEFAULT if what is None else what,
            [*words, *(["--resume"] if resume else [])],
            nodes,
        )
        return
    with refusing():
        request = run_to_resume(what, words) if resume else None
        settings = request.settings if request else settings_of(what or DEFAULT, words)
    if show_plan:
        _print_plan(settings, as_json)
        return
    if accept and not resume:
        refuse("--accept: needs --resume.")
    if settings.config.launch.type == "torchrun" and _followed(settings.config.launch):
        return
    if request is not None:
        raise typer.Exit(go_on(request, fault, accept or []))
    raise typer.Exit(new_run(settings, fault))


def _followed(launch: "Launch") -> bool:
    """Carry out what rank 0 says, in a process that torchrun started as another rank; return
    whether it is one."""
    from quartet.launch.start import RANK_VARIABLES, follow_rank_zero, starts_as_follower

    if missing := [name for name in RANK_VARIABLES if name not in os.environ]:
        refuse(
            f'launch.type = "torchrun": {missing[0]} is not set, so torchrun or srun did not '
            "start this process. quartet run … --nodes 2x8 prints the commands."
        )
    if not starts_as_follower(launch):
        return False
    follow_rank_zero(launch)
    return True


def with_model(words: Sequence[str] | None, model: str | None) -> list[str]:
    """Return the words of a command with its --model among them."""
    return [*(words or []), *([] if model is None else [f"policy.model={json.dumps(model)}"])]


@app.command(cls=SettingsCommand)
def plan(
    what: Annotated[
        str,
        typer.Argument(metavar="[RECIPE or FILE.toml]", help="A recipe's name, or a TOML file."),
    ],
    words: Words = None,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option("--on", metavar="8xh200", help="Plan for these GPUs instead of this machine."),
    ] = None,
    simulated: Annotated[
        int | None,
        typer.Option(
            "--simulate",
            metavar="STALENESS",
            help="With --on: simulate 200 steps, response by response.",
        ),
    ] = None,
    measured: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run a few steps of each stage here, twice, and compute the time from them.",
        ),
    ] = False,
) -> None:
    """Print what a run would take: models, memory, tokens and time.

    Also prints the resolved config with the origin of each value. No model is loaded.
    """
    from quartet.config.rules import untrained_filter
    from quartet.runtime.requests import settings_of

    with refusing():
        settings = settings_of(what, with_model(words, model))
    if (problem := untrained_filter(settings.config)) is not None:
        refuse(problem)
    if measured:
        _print_measured(settings)
    elif cluster is not None:
        _print_cluster(settings, cluster, simulated, as_json)
    elif simulated is not None:
        refuse("--simulate: needs --on.")
    else:
        _print_plan(settings, as_json)


@app.command()
def init(
    recipe: Annotated[
        str,
        typer.Argument(
            help="sft, reward_model, ppo, grpo, dpo, ilql or on_policy_distillation, or a recipe "
            "or a sweep that ships with Quartet, such as reviews."
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(help="The file to write. Default: RECIPE.toml.")
    ] = None,
) -> None:
    """Write a commented TOML file to start from."""
    stage = template_path({"rm": "reward_model"}.get(recipe, recipe))
    sweep = sweep_path(recipe)
    source = stage or recipe_path(recipe) or sweep
    if source is None:
        names = [*template_names(), *recipe_names(), *sweep_names()]
        near = did_you_mean(recipe, names)
        refuse(f'"{recipe}": no such file to start from.{near} Known are {", ".join(names)}.')
    target = file or Path(source.name)
    if target.exists():
        refuse(f"{target}: exists already. Give another name: quartet init {recipe} NAME.toml")
    try:
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        refuse(f"{target}: cannot be written ({error.strerror}).")
    path, first = typed(target), "Fill it in, then" if stage else "Change it, then"
    plan, run = (
        (f"quartet sweep {path} --plan", f"quartet sweep {path}")
        if source is sweep
        else (f"quartet plan {path}", f"quartet run {path}")
    )
    console.print(f"{target} written. {first}: {plan}, {run}", soft_wrap=True)


@app.command()
def algorithms(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET or FILE.py]",
            help="Print this preset as the TOML that recreates it, or the parts that a file of "
            "yours defines. The file is run.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """List the presets of algorithms with their parts.

    With a name, print that preset as TOML, to be changed and put into a run's file. With a file,
    list the parts that it defines.
    """
    if name is not None and name.endswith(".py"):
        _print_own_parts(name)
        return
    from quartet.algorithms.preference import PREFERENCES
    from quartet.algorithms.presets import ALGORITHMS
    from quartet.config.tables import without_none
    from quartet.config.toml import preset_toml

    presets = ALGORITHMS | PREFERENCES
    if name is not None and name not in presets:
        refuse(
            f'"{name}": no such preset.{did_you_mean(name, presets)} `quartet algorithms` lists '
            "them."
        )
    if as_json:
        selected = {name: presets[name]} if name else presets
        print_json(
            {key: without_none(dataclasses.asdict(preset)) for key, preset in selected.items()}
        )
    elif name:
        console.print(preset_toml(presets[name]), soft_wrap=True, end="")
    else:
        _print_presets()


def _print_own_parts(file: str) -> None:
    """Print the parts that a user's file defines, with their settings."""
    from quartet.parts import parts_in

    try:
        parts = parts_in(file)
    except ValueError as error:
        refuse(f"{error}.")
    if not parts:
        refuse(f"{file}: defines no part. A part is a subclass of quartet.PolicyLoss or the like.")
    for family, part in parts:
        fields = part.__pydantic_fields__
        console.print(f'{family}: type = "{fields["type"].default}"', soft_wrap=True)
        for name, field in fields.items():
            if name != "type":
                default = "needed" if field.is_required() else f"default {field.default}"
                sentence = f"  {field.description}" if field.description else ""
                console.print(f"    {name} ({default}){sentence}", soft_wrap=True)


def _print_plan(settings: "Settings", as_json: bool) -> None:
    from quartet.config.tables import json_ready
    from quartet.config.toml import resolved_toml
    from quartet.planning.device import CPU, device_named
    from quartet.planning.gpu_plan import plan_on
    from quartet.planning.hardware import GB, MEASURED, marked
    from quartet.planning.plan import in_words, remarks

    run_plan = plan_on(settings.config, device_named(settings.config.run.device))
    on_cpu = run_plan.device == CPU
    if as_json:
        unmeasured = [] if on_cpu else sorted({"memory", "seconds", "span"} - MEASURED)
        whole = {
            "plan": dataclasses.asdict(run_plan) | {"never_measured_on_a_gpu": unmeasured},
            "config": json_ready(settings.config),
            "origins": settings.origins,
        }
        print_json(whole)
        return
    for note in settings.notes:
        console.print(f"note   {note}", style="yellow", soft_wrap=True)
    console.print(f"plan   {in_words(run_plan)}", soft_wrap=True)
    for phase, size in (run_plan.memory or {}).items():
        words = f"≈ {size / 1e6:>9,.0f} MB"
        if not on_cpu:
            words = marked("memory", f"{size / GB:>9,.2f} GB on each GPU")
        console.print(f"       memory   {phase:<22} {words}")
    for stage, count in run_plan.optimizer_steps.items():
        console.print(f"       steps    {stage:<22}   {count:>9,} optimizer steps")
    for stage, tokens in run_plan.tokens.items():
        console.print(f"       tokens   {stage:<22} ≈ {tokens:>9,.0f}")
    if run_plan.disk is not None:
        console.print(f"       disk     {'run folder':<22} ≈ {run_plan.disk / 1e6:>9,.0f} MB")
    for sentence in remarks(run_plan):
        console.print(f"       {sentence}", soft_wrap=True)
    console.print()
    console.print(resolved_toml(settings), soft_wrap=True, end="")


def _print_commands(what: str, words: list[str], nodes: str) -> None:
    from quartet.launch.commands import commands, nodes_of
    from quartet.runtime.requests import settings_of

    try:
        num_nodes, ranks_each = nodes_of(nodes)
        changes = [word for word in words if "=" in word]
        settings = settings_of(what, [*changes, f"launch.processes={num_nodes * ranks_each}"])
        lines = commands([what, *words], settings.config.launch, num_nodes, ranks_each)
    except ValueError as error:
        refuse(str(error))
    print("\n".join(lines))


def _print_measured(settings: "Settings") -> None:
    from quartet.assembly import build
    from quartet.planning.measure import STEPS, in_words, measure

    config = settings.config
    if config.launch.processes > 1 or config.launch.shard or config.launch.type != "local":
        refuse("--measure: measures one process only. Leave [launch] out.")
    console.print(f"running {STEPS} steps of each stage, twice")
    for line in in_words(config, measure(config, build)):
        console.print(line, soft_wrap=True)


def _print_cluster(
    settings: "Settings", words: str, max_staleness: int | None, as_json: bool
) -> None:
    import statistics

    from quartet.planning import cluster as planning
    from quartet.planning.hardware import Cluster
    from quartet.planning.simulation import simulated

    try:
        cluster_plan = planning.plan_cluster(settings.config, Cluster.of(words))
    except ValueError as error:
        refuse(str(error))
    simulation = None if max_staleness is None else simulated(cluster_plan, max_staleness)
    if as_json:
        steps = {} if simulation is None else {"simulation": dataclasses.asdict(simulation)}
        print_json(planning.as_json(cluster_plan) | steps)
        return
    for line in planning.in_words(cluster_plan):
        console.print(line, soft_wrap=True)
    if simulation is not None:
        mean = statistics.fmean(simulation.staleness)
        console.print(
            f"simulated  {simulation.steps} steps of {simulation.seconds:,.1f} s; staleness at "
            f"most {max_staleness}, on average {mean:.2f}; trainers wait "
            f"{simulation.trainer_idle:.0%} of the time, slots of generators "
            f"{simulation.generators_idle:.0%}",
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
    table.add_column("advantage · policy loss · KL · aggregation · other parts")
    for family, members in FAMILIES.items():
        table.add_row("", Text(family, style="dim"))
        for name, algorithm in members.items():
            table.add_row(name, " · ".join([*main_parts(algorithm), *other_parts(algorithm)]))
    table.add_row(
        "",
        Text(
            "learn from comparisons; only online_dpo samples responses and needs rewards",
            style="dim",
        ),
    )
    for name, loss in PREFERENCES.items():
        table.add_row(name, f"loss {in_short(loss)}")
    console.print(table, width=None if console.is_terminal else 200)
