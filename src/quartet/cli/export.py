"""Verbs that use what a run has made."""

import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from quartet.cli.common import (
    FAILED,
    app,
    complaints,
    console,
    is_loopback,
    listening,
    refuse,
    refusing,
    url_of,
    without_progress_bars,
)


@app.command()
def chat(
    run_folder: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, such as runs/latest.")
    ] = "runs/latest",
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Talk to the policy of a run. `/compare` turns the answers of before and after side by side on
    and off."""
    from quartet.cli.chat import ChatSession
    from quartet.errors import NonFinite
    from quartet.models.language_model import ModelError

    try:
        session = ChatSession(Path(run_folder), temperature, max_new_tokens)
    except ModelError as error:
        refuse(str(error))
    try:
        session.talk(console, sys.stdin)
    except NonFinite:
        refuse(
            f"{run_folder}: its policy gives no finite numbers: the training diverged, or the "
            f"weights were damaged."
        )


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/latest.")
    ],
    target: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    part: Annotated[
        str, typer.Option(help="policy, policy_ema, sft, reward_model or critic.")
    ] = "policy",
    dtype: Annotated[
        Precision | None, typer.Option(help="Left out, the precision it was trained in.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help='Of this checkpoint, such as ppo-000060, or "best"; left out, of the end of the '
            "stage."
        ),
    ] = None,
) -> None:
    """A Hugging Face folder with a model card, adapters merged, that transformers loads without
    Quartet."""
    from quartet.models.export import DamagedModel
    from quartet.models.export import export as write
    from quartet.models.language_model import ModelError
    from quartet.recording.model_card import ROLES

    if checkpoint is not None:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _at_checkpoint(run_folder, checkpoint, Path(scratch))
            export(Path(scratch), target, part, dtype)
        return
    without_progress_bars()
    there = [role for role in ROLES if (run_folder / role / "config.json").is_file()]
    if part not in there:
        has = (
            f"It has {', '.join(there)}." if there else "It has none: has the run finished a stage?"
        )
        refuse(f"{run_folder}: has no model called {part}. {has}")
    named: Literal["float32", "bfloat16", "float16"] | None = None if dtype is None else dtype.value
    try:
        write(run_folder / part, target, named)
    except (DamagedModel, OSError) as error:
        reason = (
            f"{target}: cannot be written ({error.strerror or error})."
            if isinstance(error, OSError)
            else error
        )
        complaints.print(f"{reason} Nothing was written.", style="red", soft_wrap=True)
        raise typer.Exit(FAILED) from None
    except ModelError as error:
        refuse(str(error))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    console.print(f"{target} written, {size / 1e6:,.1f} MB", soft_wrap=True)


def _at_checkpoint(run_folder: Path, name: str, scratch: Path) -> None:
    """The models of a checkpoint, as its stage would have left them, in a run folder of their
    own."""
    from quartet.assembly import Assembler, stage
    from quartet.config.toml import ConfigError, read_settings
    from quartet.recording.model_card import write_cards
    from quartet.runtime.replay import models_at
    from quartet.training.checkpoint import DamagedCheckpoint, read_checkpoint
    from quartet.training.checkpoints import Checkpoints, merit

    without_progress_bars()
    folder = run_folder / "checkpoints"
    try:
        config = read_settings(run_folder / "config.resolved.toml").config
        there = Checkpoints(
            folder, {stage: place for place, stage in enumerate(config.recipe)}
        ).newest_first()
        full = [path for path in there if not path.name.endswith("-000000")]
        measured = [path for path in full if merit(path) is not None]
        if name == "best" and not measured:
            refuse(
                f"{run_folder}: no checkpoint was measured. Runs with run.keep_best measure them."
            )
        best = max(measured, key=lambda path: merit(path) or 0.0, default=None)
        chosen = (
            best if name == "best" else next((path for path in full if path.name == name), None)
        )
        if chosen is None:
            refuse(
                f"{run_folder}: has no checkpoint {name}. There are "
                f"{', '.join(path.name for path in full) or 'none'}."
            )
        found = read_checkpoint(chosen)
    except ConfigError as error:
        refuse(str(error))
    except DamagedCheckpoint as error:
        refuse(f"{chosen}: {error}.")
    with refusing():
        of_checkpoint = stage(Assembler(config, found.facts["fault"]), found.facts["stage"])
    models_at(of_checkpoint, run_folder, found, scratch)
    write_cards(scratch)


@app.command("serve-reward")
def serve_reward(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a reward model's.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535)] = 9000,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; others than this machine reach it only if you say so."
        ),
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None, typer.Option(help="An environment variable with the token to ask for.")
    ] = None,
) -> None:
    """Serve a reward model over HTTP, for `type = "server"` rewards and OpenRLHF's remote reward
    models."""
    import os

    from quartet.io.http_server import make_server
    from quartet.rewards.serve import LOOPBACK
    from quartet.rewards.serve import app as make_app

    if token_env is not None and not os.environ.get(token_env):
        refuse(f"--token-env {token_env}: no such environment variable. Set it to the token.")
    if token_env is None and not is_loopback(host):
        refuse(
            f"--host {host}: others could reach it, so it must ask for a token: --token-env NAME."
        )
    listener = listening(host, port)
    from quartet.assembly.models import device
    from quartet.assembly.serving import Scorer
    from quartet.models.language_model import ModelError

    try:
        scorer = Scorer(folder, device("auto"))
    except ModelError as error:
        listener.close()
        refuse(str(error))
    console.print(
        f"serving {scorer.place} on {url_of(listener, host)} (POST), Ctrl-C ends it", soft_wrap=True
    )
    hosts = (*LOOPBACK, host) if is_loopback(host) else ("*",)
    make_server(make_app(scorer, token_env, hosts), host, port).run(sockets=[listener])
