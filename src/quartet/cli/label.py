"""The command that collects comparisons: `quartet label`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quartet.cli.common import app, bound_socket, console, exposure, refuse, refusing, url_of

if TYPE_CHECKING:
    from quartet.assembly.reward_model_labels import RewardModelLabeller
    from quartet.labels.log import LabelLog
    from quartet.labels.pairs import Pair
    from quartet.labels.session import LabelSession
    from quartet.rewards.pair_judge import PairJudge


What = Annotated[
    Path, typer.Argument(metavar="RUN or FILE", help="A run's folder, or a file of pairs.")
]
Source = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="SOURCE",
        help="The answers of a run: evaluation (the trained policy against the first), "
        "rollouts, or best-of-n. Default: the pairs of its stage label, else evaluation.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="The file of labels, which is appended to. Default: RUN/labels.jsonl, or "
        "FILE.labels.jsonl beside the file."
    ),
]
Pairs = Annotated[int | None, typer.Option(min=1, help="The most pairs to label. Default: all.")]
UncertainFirst = Annotated[
    bool,
    typer.Option(
        "--uncertain-first",
        help="Begin with the pairs whose scores the ensemble of reward models is least sure of.",
    ),
]
Repeat = Annotated[
    float,
    typer.Option(min=0, max=1, help="The share of pairs that is shown twice, for self-agreement."),
]
Overlap = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="The share of pairs that every labeller labels; the others are labelled once.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seeds the order of pairs and answers.")]
Host = Annotated[
    str, typer.Option(help="The address to listen on; by default only this machine can connect.")
]
Judge = Annotated[
    str | None,
    typer.Option(
        metavar="URL or FOLDER",
        help="Let a model label instead: a language model behind an OpenAI-compatible address, "
        "such as http://127.0.0.1:8000/v1/chat/completions, or the reward model of a folder or "
        "a run.",
    ),
]
JudgeModel = Annotated[str | None, typer.Option(help="The judge's model, as its server calls it.")]
JudgePrompt = Annotated[
    Path | None,
    typer.Option(help="A file with the judge's prompt: {prompt}, {first} and {second}."),
]
RubricFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file of criteria with weights, which the language model answers one by "
        "one; the weighted sum decides.",
    ),
]
TokenEnv = Annotated[
    str | None, typer.Option(help="The environment variable with the server's token.")
]
Summary = Annotated[
    bool, typer.Option("--summary", help="Print counts and agreement, and serve nothing.")
]


@app.command()
def label(
    what: What,
    source: Source = None,
    output: Output = None,
    pairs: Pairs = None,
    uncertain_first: UncertainFirst = False,
    repeat: Repeat = 0.1,
    overlap: Overlap = 1.0,
    seed: Seed = 0,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8701,
    host: Host = "127.0.0.1",
    judge: Judge = None,
    judge_model: JudgeModel = None,
    judge_prompt: JudgePrompt = None,
    rubric: RubricFile = None,
    judge_token_env: TokenEnv = None,
    summary: Summary = False,
) -> None:
    """Compare answers in the browser, by keyboard: 1, 2, t (tie), b (both bad), s (skip), u (undo).

    The file of labels is data that a reward model and DPO are trained on.
    """
    from quartet.labels.log import LabelLog
    from quartet.labels.session import LabelSession

    path = output or labels_path(what, source)
    with refusing():
        if summary:
            _print_summary(path)
            return
        found = _ordered_pairs(what, source, seed, uncertain_first)[:pairs]
        if rubric is not None and judge is None:
            refuse("--rubric: is for a language model. Name its address with --judge.")
        log = LabelLog(path)
        if judge is not None:
            try:
                labeller = _labeller(judge, judge_model, judge_prompt, rubric, judge_token_env)
                _let_label(labeller, found, log)
            finally:
                log.close()
            _print_summary(path)
            return
    try:
        _serve(LabelSession(found, log, seed, repeat, overlap), what.name, path, host, port)
    finally:
        log.close()
        _print_summary(path)


def _ordered_pairs(
    what: Path, source: str | None, seed: int, uncertain_first: bool
) -> "list[Pair]":
    """Return the pairs to label, in the order in which they are labelled."""
    from quartet.labels.pairs import in_order

    found = pairs_of(what, source, seed)
    if uncertain_first and all(pair.uncertainty is None for pair in found):
        refuse(
            f"--uncertain-first: {what} has no deviations of an ensemble. They are recorded "
            "with reward_model.members = 2 or more, and are in the pairs of --from rollouts "
            "and best-of-n."
        )
    return in_order(found, seed, uncertain_first)


def _serve(session: "LabelSession", name: str, path: Path, host: str, port: int) -> None:
    """Serve the page of a session until Ctrl-C."""
    from quartet.io.http_server import make_server
    from quartet.labels.log import read_labels
    from quartet.studio.labelling import make_label_app

    hosts, token = exposure(host)
    listener = bound_socket(host, port)
    server = make_server(make_label_app(session, name, hosts, token), host, port)
    query = "" if token is None else f"?token={token}"
    count = f"{len(session.pairs):,} pair{'s' * (len(session.pairs) != 1)}"
    again = f" ({len(session.repeated):,} shown twice)" if session.repeated else ""
    where = f"{url_of(listener, host)}{query}"
    console.print(f"{count}{again} on {where}  Ctrl-C ends it", soft_wrap=True)
    console.print(f"labels  {path} ({read_labels(path).sentence()})", soft_wrap=True)
    server.run(sockets=[listener])


def _labeller(
    judge: str,
    model: str | None,
    prompt: Path | None,
    rubric: Path | None,
    token_env: str | None,
) -> "PairJudge | RewardModelLabeller":
    """Return the model that --judge names: that of an address or of a folder."""
    if "://" in judge:
        return _pair_judge(judge, model, prompt, rubric, token_env)
    from quartet.assembly.reward_model_labels import RewardModelLabeller

    given = {
        "--judge-model": model,
        "--judge-prompt": prompt,
        "--rubric": rubric,
        "--judge-token-env": token_env,
    }
    for option, value in given.items():
        if value is not None:
            refuse(f"{option}: is for a language model; {judge} is a folder. Leave it out.")
    if not Path(judge).is_dir():
        refuse(
            f"--judge {judge}: is neither an address, such as "
            "http://127.0.0.1:8000/v1/chat/completions, nor the folder of a reward model or a "
            "run."
        )
    return RewardModelLabeller(Path(judge))


def _pair_judge(
    url: str, model: str | None, prompt: Path | None, rubric: Path | None, token_env: str | None
) -> "PairJudge":
    """Return the language model behind an address, which compares two answers."""
    from quartet.rewards.pair_judge import PairJudge
    from quartet.rewards.remote import Endpoint
    from quartet.rewards.rubric import read_rubric

    if model is None:
        refuse("--judge: needs --judge-model, the model's name on that server.")
    try:
        words = None if prompt is None else prompt.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        refuse(f"--judge-prompt {prompt}: cannot be read ({error}).")
    criteria = None if rubric is None else read_rubric(rubric)
    return PairJudge(Endpoint("judge", url, token_env=token_env), model, words, criteria)


def _let_label(
    judge: "PairJudge | RewardModelLabeller", pairs: "list[Pair]", log: "LabelLog"
) -> None:
    """Let a model label the pairs that it has not labelled; print what that took."""
    from quartet.rewards.protocol import RewardError

    labelled = {x.pair.id for _, x in log.labels.labels if x.labeller == judge.labeller}
    errors, count, calls, tokens = [], 0, 0, 0
    for label in judge.labels([pair for pair in pairs if pair.id not in labelled]):
        if isinstance(label, RewardError):
            errors.append(label)
            continue
        log.add(label)
        count += 1
        calls += label.extra["judge"].get("calls", 0)
        tokens += sum(n or 0 for n in label.extra["judge"].get("tokens", {}).values())
    cost = f", {calls:,} calls, {tokens:,} tokens" if calls else ""
    console.print(f"{judge.labeller}: {count:,} labels{cost}", soft_wrap=True)
    if errors:
        left = "1 pair is" if len(errors) == 1 else f"{len(errors):,} pairs are"
        refuse(f"{errors[0]} {left} not labelled; the same command asks again.")


def labels_path(what: Path, source: str | None = None) -> Path:
    """Return the file that labels of a run or a file are written to."""
    if not what.is_dir():
        return what.with_name(f"{what.name.removesuffix('.gz').rpartition('.')[0]}.labels.jsonl")
    from quartet.runs.folders import label_folder

    stage = None if source is not None else label_folder(what)
    return (stage or what) / "labels.jsonl"


def pairs_of(what: Path, source: str | None, seed: int) -> "list[Pair]":
    """Return the pairs of a run's folder or of a file."""
    from quartet.data.label_pairs import read_pairs
    from quartet.runs.folders import label_folder
    from quartet.runs.label_pairs import SOURCES, run_pairs
    from quartet.runs.reader import Run

    if source is not None and source not in SOURCES:
        refuse(f"--from {source}: is no source. Known are {', '.join(SOURCES)}.")
    if not what.is_dir():
        if source is not None:
            refuse(f"--from {source}: {what} is a file, whose pairs are its rows. Leave it out.")
        return read_pairs(what)
    stage = label_folder(what)
    if source is None and stage is not None and (stage / "pairs.jsonl").is_file():
        return read_pairs(stage / "pairs.jsonl")
    return run_pairs(Run(what), source, seed)


def _print_summary(path: Path) -> None:
    """Print how many comparisons a file of labels has, and how far its labellers agree."""
    from quartet.labels.agreement import agreements
    from quartet.labels.log import read_labels

    labels = read_labels(path)
    console.print(f"{path}: {labels.sentence()}", soft_wrap=True)
    for agreement in agreements([entry for _, entry in labels.labels]):
        console.print(f"  {agreement.sentence()}", soft_wrap=True)
