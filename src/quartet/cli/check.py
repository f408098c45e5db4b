"""Verbs that try a reward or look into a file."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import CHECK_FAILED, app, console, print_json, refuse

if TYPE_CHECKING:
    from quartet.data.report import Report
    from quartet.evaluation.trial import Trial


@app.command()
def reward(
    function: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:NAME", help="A function, a dotted path, or exact, number, math."
        ),
    ],
    on: Annotated[
        Path, typer.Option(help="A file with prompts and completions, or with comparisons.")
    ],
    columns: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="What a column is called there.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the call may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Try a reward on answers from a file: range, constancy, None and NaN, time, and whether it
    pays for length."""
    from quartet.data import DataError
    from quartet.evaluation.trial import findings, trial_on_file
    from quartet.rewards.protocol import RewardError

    try:
        tried = trial_on_file(function, on, _columns(columns), timeout)
    except (DataError, RewardError) as error:
        refuse(str(error))
    if as_json:
        print_json(dataclasses.asdict(tried) | {"findings": findings(tried)})
        return
    for line in _trial_lines(tried):
        console.print(line, soft_wrap=True)
    for sentence in findings(tried):
        console.print(f"▲ {sentence}", style="yellow", soft_wrap=True)


def _trial_lines(tried: "Trial") -> list[str]:
    each = tried.seconds / tried.answers
    lines = [f"answers   {tried.answers:,} in {tried.seconds:.2f} s ({1e3 * each:.2f} ms each)"]
    if tried.mean is not None and tried.deviation is not None:
        lines.append(
            f"scores    {tried.least:g} to {tried.most:g}, mean {tried.mean:.3g} ± "
            f"{tried.deviation:.3g}, "
            f"{tried.different:,} different"
        )
    if tried.length_correlation is not None:
        lines.append(f"length    r = {tried.length_correlation:.2f} with the answer's length")
    if tried.accuracy is not None:
        lines.append(f"pairs     the chosen side scores higher in {tried.accuracy:.0%}")
    for score, text in tried.examples:
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
        typer.Option(help="A model or tokenizer folder: count and render in its tokens."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help='"chatml" or a file with a template.')
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option("--eval", help="A file that should share no prompts with it.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="What a column is called there.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What is in a file: its shape, two rows with what the loss is on between ⟦ and ⟧, lengths, and
    what is wrong with it."""
    from quartet.data import DataError
    from quartet.data.report import report, words

    limits = {"prompt": max_prompt_tokens, "response": max_response_tokens}
    try:
        if tokenizer is None:
            made = report(file, _columns(columns), words, "words", None, None, held_out)
        else:
            made = _report_in_tokens(
                file, _columns(columns), tokenizer, chat_template, limits, held_out
            )
    except DataError as error:
        refuse(str(error))
    if as_json:
        print_json(dataclasses.asdict(made))
    else:
        for line, style in _report_lines(made):
            console.print(line, style=style, soft_wrap=True)
    if made.problems:
        raise typer.Exit(CHECK_FAILED)


def _columns(words: list[str] | None) -> dict[str, str]:
    mapping = {}
    for word in words or []:
        ours, equals, theirs = word.partition("=")
        if not equals:
            refuse(f'--columns "{word}": write ours=theirs, such as prompt=question.')
        mapping[ours] = theirs
    return mapping


def _report_in_tokens(
    file: Path,
    columns: dict[str, str],
    folder: str,
    chat_template: str | None,
    limits: dict[str, int],
    held_out: Path | None,
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
    return report(file, columns, encoder.count, "tokens", encoder.pieces, limits, held_out)


def _report_lines(made: "Report") -> list[tuple[str, str]]:
    plain, dim, warning = "", "dim", "yellow"
    shapes = ", ".join(
        f"{count:,} × {shape}" if len(made.shapes) > 1 else shape
        for shape, count in made.shapes.items()
    )
    lines = [(f"rows       {made.rows:,}", plain), (f"shape      {shapes}", plain)]
    for part, sizes in made.lengths.items():
        over = "" if sizes.over is None else f", {sizes.over:.1%} over the limit"
        lines.append(
            (
                f"{part:<11}median {sizes.median:,}, 95 % up to {sizes.p95:,}, longest "
                f"{sizes.longest:,} {made.unit}{over}",
                plain,
            )
        )
    for place, pieces in made.examples:
        lines.append((f"--- {place}", dim))
        lines.append(("".join(f"⟦{text}⟧" if trained else text for text, trained in pieces), plain))
    return lines + [(f"▲ {finding}", warning) for finding in made.findings]
