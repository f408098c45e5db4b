"""The command that reads another library's configuration: import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import CHECK_FAILED, app, console, print_json, refuse, refusing

if TYPE_CHECKING:
    from quartet.config.foreign.translate import Translation


@app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(help="A .py or .sh script or a .yaml file of TRL, OpenRLHF or veRL."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write. Default: the name of the other one, as .toml, here."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what became of each option as JSON.")
    ] = False,
) -> None:
    """Write another library's configuration as a run's file, and list what differs.

    The file is read and never run. Exit code 3 if what was written does not pass the check yet.
    """
    from quartet import files
    from quartet.config.foreign.read import read_foreign
    from quartet.config.foreign.translate import translate

    target = output or Path(f"{file.stem}.toml")
    if target.exists():
        refuse(f"{target}: exists already. Name another file with --output.")
    with refusing():
        made = translate(read_foreign(file))
    try:
        files.write(target, f"# From {file.name}, by quartet import.\n{made.toml()}")
    except OSError as error:
        refuse(f"{target}: cannot be written ({error.strerror}).")
    if as_json:
        print_json(_as_json(made, target))
    else:
        _show(made, target)
    if made.refusal:
        raise typer.Exit(CHECK_FAILED)


def _show(made: "Translation", target: Path) -> None:
    def block(title: str, rows: dict[str, str]) -> None:
        if rows:
            console.print(f"{title} ({len(rows)})", style="bold")
            width = min(max(map(len, rows)), 44)
            for name, text in rows.items():
                console.print(f"  {name:{width}}  {text}", soft_wrap=True, markup=False)

    from quartet.config.errors import toml_value

    taken = {name: f"{key} = {toml_value(value)}" for name, (key, value) in made.taken.items()}
    block("taken over", taken)
    block("means something else here, not taken over", made.differs)
    block("has no counterpart", made.missing)
    block("not known", dict.fromkeys(made.unknown, ""))
    block("to fill in", {need.partition(",")[0]: need.partition(", ")[2] for need in made.needs})
    console.print(f"written    {target}", soft_wrap=True, markup=False)
    if made.refusal:
        console.print(
            f"▲ it does not pass the check yet: {made.refusal}", soft_wrap=True, markup=False
        )
    else:
        console.print(f"next       quartet plan {target}", soft_wrap=True, markup=False)


def _as_json(made: "Translation", target: Path) -> dict[str, object]:
    return {
        "file": str(target),
        "taken": {name: {"key": key, "value": value} for name, (key, value) in made.taken.items()},
        "differs": made.differs,
        "missing": made.missing,
        "unknown": made.unknown,
        "to_fill_in": made.needs,
        "refusal": made.refusal,
    }
