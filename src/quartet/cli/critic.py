"""The command critic: a run's critic against Monte Carlo returns."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quartet.cli.common import (
    app,
    complaints,
    console,
    print_json,
    refuse,
    refusing,
)


@app.command()
def critic(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")] = Path("runs/latest"),
    step: Annotated[
        int | None,
        typer.Option(min=1, help="The checkpoint's step. Default: that of the newest checkpoint."),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=2, help="Held-out prompts, each with one answer of the policy.")
    ] = 32,
    prefixes: Annotated[
        int, typer.Option(min=1, help="States of each answer: before the first token, and others.")
    ] = 4,
    continuations: Annotated[
        int,
        typer.Option(min=2, help="Responses sampled from each state and after each next token."),
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare a run's critic with Monte Carlo returns.

    The policy of a checkpoint answers held-out prompts. From states within its answers,
    continuations are sampled and rewarded as in training, and their mean return is compared with
    the critic's value: calibration, error by position, ranking of next tokens, and bias and
    variance of the advantage over λ. The results are kept in the run's folder.
    """
    from quartet.runs.reader import NoRun, Run

    try:
        Run(run_folder)
    except NoRun as error:
        refuse(str(error))
    from quartet.assembly.critic import audit_critic
    from quartet.cli.screen import working
    from quartet.evaluation.critic_samples import AuditSizes

    sizes = AuditSizes(prefixes, continuations, seed)
    with refusing(), working(complaints, "reading the run") as work:
        try:
            path, result = audit_critic(run_folder.resolve(), step, prompts, sizes, work.rename)
        except OSError as error:
            refuse(f"{error.filename or run_folder}: cannot be written ({error.strerror}).")
    if as_json:
        print_json(result)
        return
    print_audit(result)
    console.print(f"kept   {path}", soft_wrap=True)


def print_audit(result: dict[str, Any]) -> None:
    """Print the tables of an audit, and what they mean."""
    from quartet.runs.critic_audits import audit_sentences, audit_tables
    from quartet.runs.tables import comparison
    from quartet.runs.untrusted import printable

    console.print(
        f"{result['stage']} at step {result['step']:,}: {result['states']:,} states of "
        f"{result['prompts']:,} answers, {result['continuations']:,} continuations each. A return "
        f"is the sum of token rewards (γ = {result['gamma']:g}): {'; '.join(result['compared'])}.",
        soft_wrap=True,
    )
    for table in audit_tables(result):
        console.print(comparison(*table))
    for sentence in audit_sentences(result):
        console.print(printable(sentence), soft_wrap=True)
