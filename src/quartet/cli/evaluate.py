"""The command eval: any policies on any sets by any measures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quartet.cli.common import app, columns_of, complaints, console, print_json, refuse, refusing

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL…",
        help="Run folders, RUN@STEP, RUN@all (its checkpoints), RUN@start, model folders, hub "
        "ids, or URL#MODEL of an OpenAI-compatible server. name=MODEL gives a name.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]FILE",
        help="A set: a data file. Can be repeated. Default: the rows that the run held out.",
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        help="gold, model:FOLDER, judge:URL#MODEL, number, exact, math or another reward, "
        "perplexity, kl, or accuracy (of reward models). Can be repeated. Default: the run's "
        "gold reward, or its reward model."
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The policy that others are compared with. Default: the first of several, or what "
        "a single run started from.",
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Answers to each prompt.")]
Rows = Annotated[int, typer.Option(min=1, help="The most rows of a set that are used.")]
Seed = Annotated[int, typer.Option(help="The seed of the answers.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Default: the first run's, or 256.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.01, help="Default: the first run's, or 1.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(metavar="OURS=THEIRS", help="The name that the files have for a column."),
]
To = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the results and the answers are kept. Default: evaluation/ of the first "
        "run, or here.",
    ),
]
Name = Annotated[str | None, typer.Option(help="The name of the results' file, without .json.")]
TokenEnv = Annotated[
    str | None, typer.Option(help="The environment variable with the servers' token.")
]
RubricFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file of criteria with weights, which a judge that compares answers one by "
        "one; the weighted sum decides.",
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare", help="Compare two results instead: quartet eval --compare A.json B.json."
    ),
]


@app.command("eval")
def evaluate(
    models: Models,
    on: Sets = None,
    measure: Measures = None,
    against: Against = None,
    samples: Samples = 1,
    rows: Rows = 500,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    columns: Columns = None,
    to: To = None,
    name: Name = None,
    token_env: TokenEnv = None,
    rubric: RubricFile = None,
    compare: Compare = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate models on held-out sets, with intervals and paired tests.

    Answers are kept as they come: the same command goes on where one was stopped.
    """
    if compare:
        _compare(models, as_json)
        return
    from quartet.assembly.evaluation import EvaluationRequest
    from quartet.assembly.evaluation import evaluate as carry_out
    from quartet.cli.screen import working

    if name is not None and (Path(name).name != name or name in {"final", "best_of_n"}):
        refuse(f"--name {name}: is no name for a file here. Use letters, digits, - and _.")
    with refusing(), working(complaints, "evaluating"):
        request = EvaluationRequest(
            policies=tuple(models),
            on=tuple(on or ()),
            measures=tuple(measure or ()),
            against=against,
            samples=samples,
            rows=rows,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            columns=columns_of(columns),
            folder=to,
            name=name,
            token_env=token_env,
            rubric=rubric,
        )
        path, result = carry_out(request, _progress())
    if as_json:
        print_json(result)
        return
    print_tables(result)
    console.print(f"kept   {path}", soft_wrap=True)


def print_tables(result: Mapping[str, Any]) -> None:
    """Print the results of an evaluation."""
    from quartet.runs.evaluations import evaluation_tables
    from quartet.runs.tables import comparison

    for table in evaluation_tables(result):
        console.print(comparison(*table))


def _compare(paths: Sequence[str], as_json: bool) -> None:
    from quartet.evaluation.results import compare_evaluations, pairwise_in_both
    from quartet.runs.evaluations import comparison_table
    from quartet.runs.tables import comparison

    if len(paths) != 2:
        refuse("--compare needs two files of results: quartet eval --compare A.json B.json")
    first, second = (_results(Path(path)) for path in paths)
    try:
        comparisons = compare_evaluations(first, second)
        pairwise = pairwise_in_both(first, second)
    except (KeyError, IndexError, TypeError) as error:
        refuse(f"{paths[0]}, {paths[1]}: not both are results of quartet eval ({error!r}).")
    left_out = (
        f"{', '.join(pairwise)}: left out, because a judge compared each policy with another one "
        "of its own evaluation. Evaluate both in one command: quartet eval A B."
    )
    if not comparisons and pairwise:
        refuse(left_out)
    if not comparisons:
        refuse(
            f"{paths[0]}, {paths[1]}: have no set with the same rows and measure in common. Give "
            "the sets the same names, and use the same measures."
        )
    if pairwise:
        complaints.print(left_out, soft_wrap=True)
    if as_json:
        print_json(comparisons)
        return
    console.print(comparison(*comparison_table(comparisons)))


def _results(path: Path) -> Any:
    from quartet.files import read_json

    try:
        value = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        refuse(f"{path}: cannot be read: {reason}.")
    if not isinstance(value, dict) or not isinstance(value.get("items"), dict):
        refuse(f"{path}: holds no results of quartet eval.")
    return value


def _progress() -> Any:
    """Return what prints each new thing that is done, to standard error."""
    last = ""

    def say(words: str) -> None:
        nonlocal last
        if words != last:
            complaints.print(words, style="dim", soft_wrap=True)
        last = words

    return say
