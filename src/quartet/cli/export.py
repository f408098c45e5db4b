"""The commands that use the models of a run: chat, export, serve-reward."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from quartet.cli.common import (
    FAILED,
    app,
    bound_socket,
    complaints,
    console,
    is_loopback,
    refuse,
    refusing,
    url_of,
)
from quartet.errors import QuartetError


@app.command()
def chat(
    run_folder: Annotated[
        str,
        typer.Argument(
            metavar="RUN or FOLDER",
            help="A run folder, such as runs/latest, or the Hugging Face folder of a model.",
        ),
    ] = "runs/latest",
    temperature: Annotated[float, typer.Option(min=0.01)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Talk to the policy of a run, or to any model in a Hugging Face folder.

    `/help` lists what can be typed beside messages.
    """
    from quartet.cli.chat import ChatSession
    from quartet.cli.screen import working
    from quartet.errors import NonFinite
    from quartet.models.language_model import ModelError

    try:
        with working(complaints, f"loading {run_folder}"):
            session = ChatSession(Path(run_folder), temperature, max_new_tokens)
    except ModelError as error:
        refuse(str(error))
    try:
        session.talk(console, sys.stdin)
    except NonFinite:
        refuse(
            f"{run_folder}: the policy's outputs are not finite: the training diverged, or the "
            "weights are damaged."
        )


NO_MODELS = "It has none: has the run finished a stage?"


class Precision(StrEnum):
    """The values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Source = Annotated[
    Path,
    typer.Argument(
        metavar="RUN or LABELS",
        help="A run folder, such as runs/latest; or a file of labels.",
    ),
]
Target = Annotated[Path, typer.Option("--to", help="The folder to write.")]
Part = Annotated[
    str,
    typer.Option(
        help="The model to export: policy, policy_ema, sft, reward_model (of an ensemble "
        "reward_model-1, …) or critic."
    ),
]
Dtype = Annotated[
    Precision | None, typer.Option(help="The precision to write. Default: that of the training.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help='Export from this checkpoint, such as ppo-000060, or "best". Default: from the end of '
        "the stage."
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Of a run of ilql: the policy with this beta in place of ilql.beta. 0 imitates the "
        "data.",
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="Upload the folder to the Hugging Face hub, too. A repository that does not exist yet "
        "is created as a private one.",
    ),
]


@app.command()
def export(
    run_folder: Source,
    target: Target,
    part: Part = "policy",
    dtype: Dtype = None,
    checkpoint: Checkpoint = None,
    beta: Beta = None,
    push: Push = None,
) -> None:
    """Write a model as a Hugging Face folder with a model card, or labels as a data set.

    Adapters are merged, and transformers loads the folder without Quartet.
    """
    from quartet.models.hub import check_push

    if push is not None:
        with refusing():
            check_push(push)
    if run_folder.is_file():
        _export_labels(run_folder, target)
    elif not run_folder.is_dir():
        refuse(f"{run_folder}: no such folder.")
    elif checkpoint is None:
        _export_model(run_folder, target, part, dtype, beta)
    else:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _write_checkpoint_models(run_folder, checkpoint, Path(scratch))
            _export_model(Path(scratch), target, part, dtype, beta)
    if push is not None:
        _push(target, push, "dataset" if run_folder.is_file() else "model")


def _export_model(
    run_folder: Path, target: Path, part: str, dtype: Precision | None, beta: float | None
) -> None:
    """Write a model of a run as a Hugging Face folder."""
    from quartet.cli.screen import working
    from quartet.models.export import DamagedModel
    from quartet.models.export import export as write
    from quartet.models.language_model import ModelError
    from quartet.recording.model_card import complete, models_in

    if beta is not None and part != "policy":
        refuse(f"--beta: is of the policy, and --part is {part}. Take one of the two out.")
    roles = models_in(run_folder)
    if part not in roles:
        models = f"It has {', '.join(roles)}." if roles else NO_MODELS
        refuse(
            f"{run_folder}: has no model called {part}. {models}{_or_checkpoint(run_folder, part)}"
        )
    try:
        with working(complaints, f"writing {part}"), _extracted(run_folder, beta) as folder:
            write(folder / part, target, None if dtype is None else dtype.value)
        complete(target, run_folder, part)
    except (DamagedModel, OSError) as error:
        _fail(target, error)
    except ModelError as error:
        refuse(str(error))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    console.print(f"{target} written, {size / 1e6:,.1f} MB", soft_wrap=True)


def _or_checkpoint(run_folder: Path, part: str) -> str:
    """Return a sentence about the newest checkpoint of a run that has not finished; "" if there is
    none, or it would not have this model."""
    from quartet.assembly.checkpoint_models import with_weights

    if part not in {"policy", "critic"} or not (run_folder / "checkpoints").is_dir():
        return ""
    with contextlib.suppress(QuartetError):  # a settings file that cannot be read
        if written := with_weights(run_folder):
            return f" Its newest checkpoint: --checkpoint {written[0].name}."
    return ""


def _export_labels(path: Path, target: Path) -> None:
    """Write a file of labels as a data set."""
    from quartet.labels.dataset import write_dataset
    from quartet.labels.log import LabelError, is_label_file

    if not is_label_file(path):
        refuse(f"{path}: is neither a run folder nor a file of labels (quartet label).")
    try:
        count = write_dataset(path, target)
    except LabelError as error:
        refuse(str(error))
    except OSError as error:
        _fail(target, error)
    console.print(f"{target} written, {count:,} comparisons", soft_wrap=True)


def _fail(target: Path, error: Exception) -> NoReturn:
    """Say that nothing was written, and why, and end the command."""
    reason: object = error
    if isinstance(error, OSError):
        reason = f"{target}: cannot be written ({error.strerror or error})."
    complaints.print(f"{reason} Nothing was written.", style="red", soft_wrap=True)
    raise typer.Exit(FAILED) from None


def _push(folder: Path, name: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Upload a folder to the hub, and say where it is."""
    from quartet.cli.screen import working
    from quartet.models.hub import CannotPush
    from quartet.models.hub import push as upload

    try:
        with working(console, f"uploading {folder.name}"):
            address = upload(folder, name, kind)
    except CannotPush as error:
        complaints.print(str(error), style="red", soft_wrap=True)
        raise typer.Exit(FAILED) from None
    console.print(f"{address} uploaded", soft_wrap=True)


@contextlib.contextmanager
def _extracted(run_folder: Path, beta: float | None) -> Iterator[Path]:
    """Give a folder whose `policy` is that of a run of ilql with another beta; without one, the
    run's folder."""
    if beta is None:
        yield run_folder
        return
    from quartet.models.language_model import load_tokenizer, save
    from quartet.models.q_heads import extracted_with

    model = extracted_with(run_folder, beta)
    with tempfile.TemporaryDirectory() as scratch:
        save(model, load_tokenizer(run_folder / "policy"), Path(scratch) / "policy")
        yield Path(scratch)


def _write_checkpoint_models(run_folder: Path, name: str, scratch: Path) -> None:
    """Write the models of a checkpoint to `scratch`."""
    from quartet.assembly.checkpoint_models import checkpoint_path, write_models
    from quartet.cli.screen import working

    with refusing(), working(complaints, f"loading {name}"):
        write_models(run_folder, checkpoint_path(run_folder, name), scratch)


@app.command("serve-reward")
def serve_reward(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder or a reward model's folder.")
    ],
    port: Annotated[int, typer.Option(min=0, max=65535)] = 9000,
    host: Annotated[
        str,
        typer.Option(help="The address to listen on; by default only this machine can connect."),
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None,
        typer.Option(
            help="The environment variable that holds the token which requests must carry."
        ),
    ] = None,
) -> None:
    """Serve a reward model over HTTP.

    It answers `type = "server"` rewards and OpenRLHF's requests to remote reward models.
    """
    import os

    from quartet.io.http_server import make_server
    from quartet.rewards.serve import LOOPBACK
    from quartet.rewards.serve import app as make_app

    if token_env is not None and not os.environ.get(token_env):
        refuse(f"--token-env {token_env}: no such environment variable. Set it to the token.")
    if token_env is None and not is_loopback(host):
        refuse(
            f"--host {host}: other machines can connect, so it must ask for a token: "
            "--token-env NAME."
        )
    listener = bound_socket(host, port)
    from quartet.assembly.device import device
    from quartet.assembly.serving import TextScorer
    from quartet.cli.screen import working
    from quartet.models.language_model import ModelError

    try:
        with working(complaints, f"loading {folder}"):
            scorer = TextScorer(folder, device("auto"))
    except ModelError as error:
        listener.close()
        refuse(str(error))
    console.print(
        f"serving {scorer.path} on {url_of(listener, host)} (POST), Ctrl-C ends it", soft_wrap=True
    )
    hosts = (*LOOPBACK, host) if is_loopback(host) else ("*",)
    make_server(make_app(scorer, token_env, hosts), host, port).run(sockets=[listener])
