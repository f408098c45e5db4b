"""Every way in which a run folder is read, for tests that damage one: each must answer, with a sentence where it cannot."""

import html
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from starlette.testclient import TestClient
from typer.testing import CliRunner

from quartet.cli import app
from quartet.runs.reader import NoRun, Run
from quartet.studio.app import make_app

PAGES = (
    "",
    "samples",
    "samples?kind=probes",
    "samples?step=1",
    "tokens?step=1&sample=0",
    "tokens?kind=probes&step=0&sample=0",
    "frontier",
    "answers",
    "labels",
    "reward-model",
    "doctor",
    "config",
)
DATA = ("sample?step=1&sample=0", "token?sample=0&position=1")
WHOLE = "other-run"
VICTIM = "damaged-run"


def lean(run: Path, to: Path) -> Path:
    """A copy without models and checkpoints, with few steps and pairs, so that it is read in no time."""
    to.mkdir(parents=True)
    for name in ("config.resolved.toml", "env.json"):
        shutil.copy(run / name, to)
    shutil.copytree(run / "evaluation", to / "evaluation")
    pairs = to / "evaluation" / "pairs.parquet"
    pq.write_table(pq.read_table(pairs)[:50], pairs)
    answers = to / "evaluation" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:4]))
    events = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (to / "events.jsonl").write_text(
        "".join(line for line in events if (json.loads(line).get("step") or 0) < 5)
    )
    for kind, steps in (("rollouts", (1, 2)), ("probes", (0, 4))):
        (to / kind).mkdir()
        for step in steps:
            shutil.copy(run / kind / f"{step:06d}.parquet", to / kind)
    return to


class Readers:
    """The studio and the verbs over a folder with the run that is damaged and one that is whole."""

    def __init__(self, run: Path, root: Path) -> None:
        self.original = lean(run, root / "original")
        self.root = root / "runs"
        self.victim = self.root / VICTIM
        lean(run, self.root / WHOLE)
        self.client: TestClient | None = None

    def restore(self) -> Path:
        """The run as it was, and a studio that has not seen it yet."""
        shutil.rmtree(self.victim, ignore_errors=True)
        self.client = TestClient(make_app([self.root]), base_url="http://127.0.0.1")
        return Path(shutil.copytree(self.original, self.victim, symlinks=True))

    def listed(self) -> str:
        """The list of runs, which has the other one in any case."""
        page = self.client.get("/")
        assert (
            page.status_code == 200 and f'href="/run/{WHOLE}/"' in page.text and VICTIM in page.text
        )
        return readable(page.text)

    def pages(self, chosen: Sequence[str] = PAGES) -> str:
        """Pages of the damaged run, one after another."""
        texts = []
        for page in chosen:
            answer = self.client.get(f"/run/{VICTIM}/{page}")
            assert answer.status_code in {200, 404}, page
            texts.append(readable(answer.text))
        return "\n".join(texts)

    def data(self, chosen: Sequence[str] = DATA) -> None:
        for address in chosen:
            answer = self.client.get(f"/api/run/{VICTIM}/{address}")
            assert answer.status_code in {200, 404}, address
            json.loads(answer.text, parse_constant=no_number)

    def comparison(self) -> None:
        assert self.client.get(f"/compare?run={VICTIM}&run={WHOLE}").status_code in {200, 404}

    def verbs(self) -> str:
        """`runs`, `inspect`, `report`, `doctor` and `compare`, in this process."""
        said = [verb("runs", self.root)]
        assert WHOLE in said[0]
        said += [
            verb("inspect", self.victim),
            verb("inspect", self.victim, "--step", 1, "--sample", 0),
        ]
        said += [
            verb("report", self.victim),
            verb("doctor", self.victim),
            verb("doctor", self.victim, "--json"),
        ]
        said += [verb("compare", self.victim, self.root / WHOLE)]
        return "\n".join(said)

    def problems(self) -> str:
        """What a run says when all but its rollouts was read."""
        try:
            run = Run(self.victim)
        except NoRun as error:
            return readable(str(error))
        _ = (
            run.metrics,
            run.warnings,
            run.pairs(),
            list(run.answers()),
            run.steps(),
            run.steps("probes"),
        )
        return readable("\n".join(run.problems))

    def methods(self, figures: bool = False) -> str:
        """What a notebook calls, and the problems that it finds."""
        try:
            run = Run(self.victim)
        except NoRun as error:
            return readable(str(error))
        _ = (
            run.status,
            run.metrics,
            run.warnings,
            run.evaluation,
            run.best_of_n,
            run.config_text,
            repr(run),
            run._repr_html_(),
        )
        run.refresh()
        said = []
        for kind in ("rollouts", "probes"):
            for step in run.steps(kind)[:1]:
                for act in (
                    run.rollouts,
                    run.samples,
                    lambda step, kind: run.sample(step, 0, kind),
                ):
                    try:
                        act(step, kind)
                    except NoRun as error:
                        said.append(str(error))
        for name in ("frontier", "phases", "reward") if figures else ():
            try:
                run.figure(name).to_json()
            except NoRun as error:
                said.append(str(error))
        return readable("\n".join([*said, *run.check()]))


def no_number(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def readable(text: str) -> str:
    """What a person gets: no traceback, and what can be sent and printed."""
    assert "Traceback" not in text and "Internal Server Error" not in text
    text.encode("utf-8")
    return html.unescape(text)


def verb(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert "\x1b" not in done.output, "what a terminal would obey"
    return readable(done.output)
