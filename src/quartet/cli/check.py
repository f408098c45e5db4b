"""The commands that check a reward or a data file: reward, data."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import CHECK_FAILED, app, columns_of, console, print_json, refuse

if TYPE_CHECKING:
    from quartet.data.report import Report
    from quartet.data.row_shape import RowShape
    from quartet.evaluation.trial import RewardTrial


MAX_SHOWN = 2000
"""The characters of one part of a row that `quartet data` prints."""


@app.command()
def reward(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:NAME",
            help="A function in a file, a dotted path, or exact, number or math.",
        ),
    ],
    on: Annotated[
        Path,
        typer.Option(help="The file to score: prompts with completions, or comparisons."),
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="The name that the file has for a column."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the call may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Score the answers in a file with a reward, and print what the scores are like.

    Shows their range, missing values, the time, and the correlation with length.
    """
    from quartet.data import DataError
    from quartet.evaluation.trial import findings, trial_on_file
    from quartet.rewards.protocol import RewardError

    try:
        trial = trial_on_file(function, on, columns_of(columns), timeout)
    except (DataError, RewardError) as error:
        refuse(str(error))
    if as_json:
        print_json(dataclasses.asdict(trial) | {"findings": findings(trial)})
        return
    for line in _trial_lines(trial):
        console.print(line, soft_wrap=True)
    for sentence in findings(trial):
        console.print(f"▲ {sentence}", style="yellow", soft_wrap=True)


def _trial_lines(trial: "RewardTrial") -> list[str]:
    milliseconds = 1e3 * trial.seconds / trial.answers
    lines = [f"answers   {trial.answers:,} in {trial.seconds:.2f} s ({milliseconds:.2f} ms each)"]
    if trial.mean is not None and trial.deviation is not None:
        lines.append(
            f"scores    {trial.least:g} to {trial.most:g}, mean {trial.mean:.3g} ± "
            f"{trial.deviation:.3g}, {trial.different:,} different"
        )
    if trial.length_correlation is not None:
        lines.append(f"length    r = {trial.length_correlation:.2f} with the answer's length")
    if trial.accuracy is not None:
        lines.append(f"pairs     the chosen side scores higher in {trial.accuracy:.0%}")
    for score, text in trial.examples:
        shown = " ".join(text.split())
        lines.append(f"  {score:>9.3g}  {shown[:100] + ' …' if len(shown) > 100 else shown}")
    return lines


@app.command()
def data(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .jsonl, .jsonl.gz, .json, .csv or .parquet file, or a folder of them."
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A model or tokenizer folder. Default: count words, not tokens."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help='The chat template: "chatml" or a file.')
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option("--eval", help="Held-out rows, which must not have the same prompts."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="The name that the file has for a column."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME", help="How rows become prompts and answers, as data.shape."
        ),
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Print the shape and lengths of a data file, and what is wrong with it.

    Shows two rows with the trained text between ⟦ and ⟧. The exit code is 3 if rows
    cannot be used.
    """
    from quartet.data import DataError
    from quartet.data.report import report, words

    limits = {"prompt": max_prompt_tokens, "response": max_response_tokens}
    try:
        named = _shape(shape)
        if tokenizer is None:
            summary = report(
                file, columns_of(columns), words, "words", held_out=held_out, shape=named
            )
        else:
            summary = _report_in_tokens(
                file, columns_of(columns), tokenizer, chat_template, limits, held_out, named
            )
    except DataError as error:
        refuse(str(error))
    if as_json:
        print_json(dataclasses.asdict(summary))
    else:
        for line, style in _report_lines(summary):
            console.print(line, style=style, soft_wrap=True)
    if summary.problems:
        raise typer.Exit(CHECK_FAILED)


def _shape(name: str | None) -> "RowShape | None":
    """Return the shape of rows that a user names; None where none is named."""
    from pydantic import TypeAdapter, ValidationError

    from quartet.data.row_shape import RowShape

    if name is None:
        return None
    try:
        found: RowShape = TypeAdapter(RowShape).validate_python(name)
    except ValidationError as error:
        refuse(f'--shape "{name}": {error.errors()[0]["msg"].removeprefix("Value error, ")}')
    return found


def _report_in_tokens(
    file: Path,
    columns: dict[str, str],
    folder: str,
    chat_template: str | None,
    limits: dict[str, int],
    held_out: Path | None,
    shape: "RowShape | None" = None,
) -> "Report":
    from quartet.data.encoding import Encoder
    from quartet.data.report import report
    from quartet.models.chat import ChatError, set_chat_template
    from quartet.models.language_model import ModelError, load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
        if chat_template:
            set_chat_template(tokenizer, chat_template)
    except (ModelError, ChatError) as error:
        refuse(str(error))
    encoder = Encoder(tokenizer, max_prompt_tokens=10**9, max_response_tokens=10**9)
    return report(
        file,
        columns,
        encoder.sizes,
        "tokens",
        encoder.pieces,
        limits,
        held_out,
        encoder.oddities,
        shape,
    )


def _cut(text: str) -> str:
    """Return the beginning of a text, and how much of it is left out."""
    rest = len(text) - MAX_SHOWN
    return f"{text[:MAX_SHOWN]} … ({rest:,} more characters)" if rest > 0 else text


def _report_lines(summary: "Report") -> list[tuple[str, str]]:
    plain, dim, warning = "", "dim", "yellow"
    shapes = ", ".join(
        f"{count:,} × {shape}" if len(summary.shapes) > 1 else shape
        for shape, count in summary.shapes.items()
    )
    lines = [(f"rows       {summary.rows:,}", plain), (f"shape      {shapes}", plain)]
    for part, sizes in summary.lengths.items():
        over = "" if sizes.over is None else f", {sizes.over:.1%} over the limit"
        lines.append(
            (
                f"{part:<11}median {sizes.median:,}, 95% up to {sizes.p95:,}, longest "
                f"{sizes.longest:,} {summary.unit}{over}",
                plain,
            )
        )
    for place, pieces in summary.examples:
        lines.append((f"--- {place}", dim))
        shown = [(_cut(text), trained) for text, trained in pieces]
        lines.append(("".join(f"⟦{text}⟧" if trained else text for text, trained in shown), plain))
    return lines + [(f"▲ {finding}", warning) for finding in summary.findings]
