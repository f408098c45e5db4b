"""Runs that are killed and resumed, in processes forked from one that has loaded everything: `python -m tests.support.killing`.

    instants SCENARIO TRIALS SEED    kill −9 whole runs, or one of their ranks, at random instants
    frozen TRIALS SEED               SIGSTOP the second rank at random instants
    servers KIND TRIALS SEED         kill −9 one of two generation servers at random instants, and start it again; vllm is given
                                     whole weights, sglang adapters
    soak MINUTES SEED                one long run, killed every minute and resumed, then watched
    full SHARE …                     whole runs on a disk with room for a share of what they write, and then for all of it
    limited BYTES …                  whole runs that may write files of so many bytes, and then any
    mutations                        kill −9 the writing of a checkpoint at each change that it makes to the file system
    moments [NAME …]                 kill −9 whole runs at each of the moments between which something has to be made complete

Prints JSON.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import torch
import uvicorn

import quartet.assembly
import quartet.cli.lifecycle
import quartet.recording.run_folder as observability_run
import quartet.studio.report  # loaded once, before forks
from quartet import files
from quartet.cli import main
from quartet.cli.common import RESUMABLE
from quartet.models.language_model import save
from quartet.recording.run_folder import RunFolder
from quartet.runtime import pipeline
from quartet.runtime.pipeline import Pipeline
from quartet.training import checkpoint, checkpoints, state_tree
from quartet.training.checkpoints import Checkpoints
from tests.support.fake_server import Engine, free_port, make_app
from tests.support.tiny_run import SMALL, SMALL_REVIEWS
from tests.support.world import model, tokenizer

STEPS = ["run.steps=6", "run.checkpoint_every=2"]
MINIBATCHES = ["optim.epochs=2", "optim.minibatches=2"]
ADAPTIVE = ["algorithm.kl.controller.type=adaptive", "algorithm.kl.controller.target=0.5"]
REVIEWS = ["reviews", *SMALL_REVIEWS, "sft.steps=5", "reward_model.steps=5", *STEPS, *MINIBATCHES]
ROUND = "'label','reward_model','ppo'"
CUSTOM = [
    *(word for word in REVIEWS if not word.startswith(("optim.", "run.steps", "rollout.prompts"))),
    "recipe=['sft','reward_model','custom','evaluation']",
    'custom={type="stage.py:Best", steps=6, batch_size=8}',
]
STAGE = """import quartet


class Best(quartet.StageSource):
    needs_reference = True
    updates = 2

    def step(self, context):
        rollouts = context.sample(context.batch(), 2)
        best = [max(pair, key=lambda r: r.score) for pair in zip(rollouts[::2], rollouts[1::2])]
        mean = context.saved.get("mean", 0.0)
        context.saved["mean"] = 0.9 * mean + 0.1 * sum(r.score for r in best) / len(best)
        for _ in range(self.updates):
            context.update(best, lambda t: 0.1 * (t.logprobs - t.ref_logprobs) ** 2 - t.logprobs)
        return {"mean": context.saved["mean"]}
"""
SCENARIOS: dict[str, list[str]] = {
    "rounds": [
        "labelled-reviews",
        *REVIEWS[1:],
        f"recipe=['sft',{ROUND},{ROUND},'evaluation']",
        *("run.steps=4", "label.pairs=30", "label.labels=20", "label.simulated=0.1"),
    ],
    "adapted_rounds": [
        "labelled-reviews",
        *REVIEWS[1:],
        f"recipe=['sft',{ROUND},{ROUND},'evaluation']",
        *("run.steps=4", "label.pairs=30", "label.labels=20", "label.simulated=0.1"),
        *('policy.adapter={type="lora", rank=2}', "reward_model.members=2"),
    ],
    "ilql": [
        "sums",
        *(word for word in SMALL if not word.startswith("sft.")),
        *("policy.create.max_length=32", "recipe=['ilql','evaluation']", "ilql.steps=16"),
        *("ilql.batch_size=8", "run.checkpoint_every=2"),
    ],
    "custom": CUSTOM,
    "custom_sharded": [*CUSTOM, "launch.processes=2", "launch.shard=true", "launch.deadline=60"],
    "ppo": [*REVIEWS, *ADAPTIVE],
    "shared": [*REVIEWS, "critic.type=shared", "optim.ema=0.9"],
    "lora": [*REVIEWS, 'policy.adapter={type="lora", rank=2}'],
    "grpo": ["sums", *SMALL, "policy.create.max_length=32", "sft.steps=5", *STEPS, *MINIBATCHES],
    "dpo": ["file.toml", "sft.steps=3", "run.checkpoint_every=2"],
    "async": [*REVIEWS, "rollout.staleness=2", 'algorithm.correction={type="truncated"}'],
    "async_lora": [*REVIEWS, "rollout.staleness=1", 'policy.adapter={type="lora", rank=2}'],
    "lora_sharded": [
        *REVIEWS,
        'policy.adapter={type="lora", rank=2}',
        "launch.processes=2",
        "launch.shard=true",
    ],
    "async_two": [*REVIEWS, "rollout.staleness=1", "launch.processes=2", "launch.deadline=60"],
    "async_sharded": [
        *REVIEWS,
        "rollout.staleness=1",
        "launch.processes=2",
        "launch.shard=true",
        "launch.deadline=60",
    ],
    "two": [*REVIEWS, "launch.processes=2", "launch.deadline=60"],
    "sharded": [*REVIEWS, "launch.processes=2", "launch.shard=true", "launch.deadline=60"],
    "rows": [
        *REVIEWS,
        "optim.ema=0.9",
        "launch.processes=4",
        "launch.shard=2",
        "launch.deadline=60",
    ],
    "online_sharded": [
        "file.toml",
        "sft.steps=3",
        "run.checkpoint_every=2",
        "launch.processes=2",
        "launch.shard=true",
    ],
    "games_two": [
        "guess",
        *SMALL,
        "policy.create.max_length=24",
        "sft.steps=5",
        *STEPS,
        "launch.processes=2",
    ],
}
DPO = """recipe = ["sft", "online_dpo", "evaluation"]
[data]
world = "reviews"
max_response_tokens = 64
rows = 64
held_out_rows = 64
[policy]
create = { type = "llama", max_length = 128, hidden_size = 16, num_layers = 1, num_heads = 2 }
[[reward]]
type = "gold"
[rollout]
max_new_tokens = 8
[preference]
steps = 6
batch_size = 8
[sft]
batch_size = 8
[evaluation]
prompts = 8
"""


def children(parent: int) -> list[int]:
    """The other ranks of a run, where it has any."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if (
                b"quartet.launch.follower" in words
                and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            ):
                found.append(int(folder.name))
    return found


def forked(work: Callable[[], None]) -> int:
    """The process id of a child that does it, silently."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """What the child returned; negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in(folder: Path, words: list[str]) -> Callable[[], None]:
    def work() -> None:
        os.chdir(folder)
        Path("file.toml").write_text(DPO)
        Path("stage.py").write_text(STAGE)
        sys.argv = ["quartet", "run", *words, "run.name=x"]
        main()

    return work


def digest(folder: Path) -> dict[str, str]:
    """What two runs must have in common to the bit: weights, optimizers, coefficients, random numbers, metrics, rollouts."""
    run = next(p for p in (folder / "runs").iterdir() if not p.is_symlink())
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors" or name in {
            "evaluation/final.json",
            "evaluation/answers.jsonl",
        }:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".parquet":
            found[name] = hashlib.sha256(repr(pq.read_table(path).to_pydict()).encode()).hexdigest()
        elif name.startswith("checkpoints") and path.name == "state.json":
            found[name] = hashlib.sha256(
                json.dumps(files.read_json(path)["state"]).encode()
            ).hexdigest()
    lines = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    kept = [
        {k: e.get(k) for k in ("event", "stage", "step", "metrics", "summary", "rule")}
        for e in lines
    ]
    ours = [e for e in kept if e["event"] in {"metrics", "started", "finished", "warning", "done"}]
    return found | {"events": json.dumps(ours)}


def said_to_be_lost(folder: Path) -> list[str]:
    """The reasons for which a run ended before its time."""
    [run] = [p for p in (folder / "runs").iterdir() if not p.is_symlink()]
    lines = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    return [e["reason"] for e in lines if e["event"] == "interrupted"]


def recorded(folder: Path) -> int:
    """How far a run has come: the lines of its record."""
    records = [p / "events.jsonl" for p in (folder / "runs").glob("[!.]*") if not p.is_symlink()]
    return sum(path.read_bytes().count(b"\n") for path in records if path.exists())


def wait_for(folder: Path, lines: int, child: int) -> None:
    """Until a run has come so far, or has ended: its own pace, not the clock's, says when, as other work slows it down."""
    while (
        recorded(folder) < lines
        and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.005)


def instants(scenario: str, trials: int, seed: int, how: int = signal.SIGKILL) -> dict[str, object]:
    """Each trial: a run, killed at up to three random instants and resumed after each, against one that was left alone. Where
    it is frozen instead, it is a rank that others wait for, after it has begun, once."""
    words, rng = SCENARIOS[scenario], random.Random(f"{scenario}/{seed}")
    frozen, named = how == signal.SIGSTOP, 0
    root = Path(tempfile.mkdtemp())
    alone = root / "alone"
    alone.mkdir()
    began = time.monotonic()
    assert ended(forked(run_in(alone, words))) == 0
    length, expected = time.monotonic() - began, digest(alone)
    lines = recorded(alone)
    kills, wrong = 0, []
    for trial in range(trials):
        folder = root / str(trial)
        folder.mkdir()
        times = sorted(
            rng.uniform(0.2 * frozen, 1) for _ in range(1 if frozen else rng.choice([1, 1, 2, 3]))
        )
        for number, after in enumerate([*times, None]):
            child = forked(run_in(folder, [*words, *(["--resume"] if number else [])]))
            if after is not None:
                wait_for(folder, int(after * lines), child)
                time.sleep(rng.uniform(0, 1.5 * length / lines))
                victims = [*([] if frozen else [child]), *children(child)]
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(rng.choice(victims), how)
            code = ended(child)
            if frozen and code == RESUMABLE:
                named += "rank 1 of the run was lost" in said_to_be_lost(folder)[-1]
            kills += code in {-signal.SIGKILL, RESUMABLE}
            if code not in ({0} if after is None else {0, -signal.SIGKILL, RESUMABLE}):
                wrong.append({"trial": trial, "code": code})
        found = digest(folder)
        if different := [
            k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)
        ]:
            wrong.append({"trial": trial, "times": times, "different": different})
        else:
            shutil.rmtree(folder)
    return {
        "scenario": scenario,
        "trials": trials,
        "kills": kills,
        "named": named,
        "seconds": round(length, 1),
        "wrong": wrong,
        "root": str(root),
    }


def serving(port: int, model: Path, kind: str) -> int:
    """The process id of a server that answers."""

    def work() -> None:
        uvicorn.run(
            make_app(Engine(model, 0.002), kind), host="127.0.0.1", port=port, log_level="error"
        )

    child = forked(work)
    while True:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")
            return child
        time.sleep(0.01)


def servers(kind: str, trials: int, seed: int) -> dict[str, object]:
    """Each trial: a run whose answers come from two servers, of which one or the other is killed at up to three random instants and
    comes back after a moment, against a run whose servers were left alone."""
    rng, root = random.Random(f"servers/{seed}"), Path(tempfile.mkdtemp())
    save(model(), tokenizer(), root / "first")
    ports = [free_port(), free_port()]
    alive = {port: serving(port, root / "first", kind) for port in ports}
    urls = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports)
    adapter = (
        ['policy.adapter={type="lora", rank=2}', "generator.adapter=true"]
        if kind == "sglang"
        else []
    )
    words = [*REVIEWS, f"generator={{type='{kind}', urls=[{urls}]}}", *adapter]

    def trial(name: str, times: list[float]) -> tuple[dict[str, str], float]:
        (root / name).mkdir()
        began = time.monotonic()
        child = forked(run_in(root / name, words))
        for after in sorted(times):
            time.sleep(max(began + after - time.monotonic(), 0))
            port = rng.choice(ports)
            os.kill(alive[port], signal.SIGKILL)
            ended(alive[port])
            time.sleep(rng.uniform(0, 0.5))
            alive[port] = serving(port, root / "first", kind)
        assert ended(child) == 0, name
        return digest(root / name), time.monotonic() - began

    expected, length = trial("alone", [])
    kills, wrong = 0, []
    for number in range(trials):
        times = [rng.uniform(0, length) for _ in range(rng.choice([1, 1, 2, 3]))]
        found, _ = trial(str(number), times)
        kills += len(times)
        if different := [
            k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)
        ]:
            wrong.append({"trial": number, "times": times, "different": different})
        else:
            shutil.rmtree(root / str(number))
    for child in alive.values():
        os.kill(child, signal.SIGKILL)
    return {
        "trials": trials,
        "kills": kills,
        "seconds": round(length, 1),
        "wrong": wrong,
        "root": str(root),
    }


def soak(minutes: float, seed: int) -> dict[str, object]:
    """One long run: for half of the time it is killed about once a minute and resumed, then it is left alone and watched."""
    rng, root = random.Random(seed), Path(tempfile.mkdtemp())
    words = [
        *SCENARIOS["ppo"],
        "run.steps=1000000",
        "run.checkpoint_every=10",
        "run.rollouts_every=1000",
    ]
    ends, kills, number = time.monotonic() + 60 * minutes, 0, 0
    while time.monotonic() < ends - 30 * minutes:
        child = forked(run_in(root, [*words, *(["--resume"] if number else [])]))
        number += 1
        time.sleep(rng.uniform(20, 100))
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == -signal.SIGKILL
    child = forked(run_in(root, [*words, "--resume"]))
    seen = []
    while time.monotonic() < ends:
        time.sleep(10)
        proc = Path(f"/proc/{child}")
        pages = int((proc / "statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(list((proc / "fd").iterdir()))))
    os.kill(child, signal.SIGTERM)
    code = ended(child)
    run = next(p for p in (root / "runs").iterdir() if not p.is_symlink())
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [e["step"] for e in lines if e["event"] == "metrics" and e["stage"] == "ppo"]
    settled = seen[len(seen) // 4 :]
    found = {
        "minutes": minutes,
        "kills": kills,
        "steps": len(steps),
        "each_once": steps == list(range(1, len(steps) + 1)),
        "exit": code,
        "bytes": [settled[0][0], settled[-1][0]],
        "growth": round(settled[-1][0] / settled[0][0] - 1, 4),
        "descriptors": [settled[0][1], settled[-1][1]],
        "left_over": [p.name for p in run.rglob("*.tmp")]
        + [p.name for p in (run / "checkpoints").glob(".*")],
        "processes": [p for p in Path("/proc").glob("[0-9]*/cwd") if _points_at(p, root)],
    }
    shutil.rmtree(root)
    return found


def _points_at(link: Path, folder: Path) -> bool:
    try:
        return link.resolve() == folder.resolve()
    except OSError:
        return False


class Shim:
    """Counts the changes that are made to the file system, and does something at one of them."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0
        for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, self.watched(getattr(os, name)))
        for module, name in ((checkpoint, "write"), (files, "write"), (state_tree, "save_file")):
            setattr(module, name, self.torn(getattr(module, name), 1 if name == "save_file" else 0))

    def watched(self, change: Callable) -> Callable:
        def wrapper(*arguments, **named):
            self.hit(lambda: None)
            return change(*arguments, **named)

        return wrapper

    def torn(self, write: Callable, path_at: int) -> Callable:
        """Half of the file is there when the process dies."""

        def wrapper(*arguments, **named):
            def half() -> None:
                write(*arguments, **named)
                path = Path(arguments[path_at])
                os.truncate(path, path.stat().st_size // 2)

            self.hit(half)
            return write(*arguments, **named)

        return wrapper

    def hit(self, half: Callable[[], None]) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.how == "torn":
            self.at = 0
            half()
        os.kill(os.getpid(), signal.SIGKILL)


def mutations() -> dict[str, object]:
    """Three checkpoints are safe, the fourth is written and the second goes: at each change, what is the newest then?"""
    states = [{"w": torch.arange(1000.0) + i, "n": i} for i in range(5)]
    counts, wrong = {}, []
    for how in ("plain", "torn", "full"):
        for at in range(1, 10**6):
            root = Path(tempfile.mkdtemp())
            made = Checkpoints(root, {"ppo": 0})
            for i in (1, 2, 3):
                made.write("ppo", i, states[i], {"i": i})

            def fourth(root: Path = root, at: int = at, how: str = how) -> None:
                Shim(at, how)
                try:
                    Checkpoints(root, {"ppo": 0}).write("ppo", 4, states[4], {"i": 4})
                except OSError as error:
                    sys.exit(28 if error.errno == errno.ENOSPC else 1)

            code = ended(forked(fourth))
            if code not in {0, 28, -signal.SIGKILL}:
                raise RuntimeError(f"the writing of a checkpoint ended with {code}")
            again = Checkpoints(root, {"ppo": 0})
            _, newest = next(again.usable(lambda _: None))
            state = newest.state() if not isinstance(newest, str) else {"n": newest}
            good = state["n"] in (3, 4) and torch.equal(state["w"], states[state["n"]]["w"])
            again.write(
                "ppo", 4, states[4], {"i": 4}
            )  # and the run that was resumed gets there too
            _, last = next(again.usable(lambda _: None))
            names = [p.name for p in again.newest_first()]
            if not good or last.state()["n"] != 4 or names != ["ppo-000004", "ppo-000003"]:
                wrong.append({"how": how, "at": at, "newest": str(state["n"]), "names": names})
            shutil.rmtree(root)
            if code == 0:
                counts[how] = at - 1
                break
    return {"changes": counts, "wrong": wrong}


def kill_before(
    owner: object,
    name: str,
    when: Callable[..., bool] = lambda *_: True,
    nth: int = 1,
    after: bool = False,
):
    """Kill this process as it calls a function for the nth time with such arguments, or as that returns."""
    real, count = getattr(owner, name), 0

    def wrapper(*arguments, **named):
        nonlocal count
        count += when(*arguments)
        if count == nth and not after and when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **named)
        if count == nth and after and when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def _called(ending: str) -> Callable[..., bool]:
    return lambda path, *_: str(path).endswith(ending)


def _of_step(stage: str, step: int) -> Callable[..., bool]:
    return lambda _, named, number, *rest: (named, number) == (stage, step)


MOMENTS: dict[str, Callable[[], None]] = {
    "while its folder is made": lambda: kill_before(files, "write"),
    "before its folder has its name": lambda: kill_before(observability_run, "_named"),
    "when its folder has its name": lambda: kill_before(observability_run, "_named", after=True),
    "before its first event": lambda: kill_before(RunFolder, "event"),
    "before its first checkpoint": lambda: kill_before(Checkpoints, "write"),
    "when the first checkpoint is written": lambda: kill_before(Checkpoints, "write", after=True),
    "before it becomes the latest": lambda: kill_before(observability_run, "point_latest"),
    "while it becomes the latest": lambda: kill_before(Path, "replace", _called(".latest.tmp")),
    "before a checkpoint has a manifest": lambda: kill_before(
        checkpoint, "write", _called("grpo-000002.tmp/manifest.json")
    ),
    "before a checkpoint has its name": lambda: kill_before(
        checkpoint, "move", _called("grpo-000002.tmp")
    ),
    "before an older checkpoint goes": lambda: kill_before(checkpoints, "remove_folder", nth=2),
    "while an older checkpoint goes": lambda: kill_before(shutil, "rmtree", _called(".gone")),
    "between a checkpoint and its event": lambda: kill_before(
        Checkpoints, "write", _of_step("grpo", 2), after=True
    ),
    "between the last checkpoint and its event": lambda: kill_before(
        Checkpoints, "write", _of_step("grpo", 3), after=True
    ),
    "while rollouts are written": lambda: kill_before(
        Path, "replace", _called("rollouts/000002.tmp")
    ),
    "while probes are written": lambda: kill_before(Path, "replace", _called("probes/000002.tmp")),
    "before a stage is finished": lambda: kill_before(Pipeline, "_result_fingerprints"),
    "while an evaluation is written": lambda: kill_before(
        files, "replace", _called("answers.jsonl")
    ),
    "before the model cards": lambda: kill_before(pipeline, "write_cards"),
    "while the model cards are written": lambda: kill_before(
        files, "replace", _called("policy/README.md")
    ),
    "before it is done": lambda: kill_before(
        RunFolder, "event", lambda _, kind, *rest: kind == "done"
    ),
    "between done and the report": lambda: kill_before(quartet.cli.lifecycle, "_write_report"),
    "while the report is written": lambda: kill_before(
        Path, "replace", lambda _, to: Path(to).name == "report.html"
    ),
}
"""Each kills the process that calls it when it gets there."""
AGAIN: dict[str, Callable[[], None]] = {
    "while the config is renewed": lambda: kill_before(
        files, "replace", _called("config.resolved.toml")
    ),
    "while what is left over is swept away": lambda: kill_before(shutil, "rmtree", _called(".tmp")),
    "when the record is cut back": lambda: kill_before(RunFolder, "cut_back", after=True),
    "before the run goes on": lambda: kill_before(
        RunFolder, "event", lambda _, kind, *rest: kind == "resumed"
    ),
}
"""The same, of a run that was killed before a checkpoint had a manifest and is resumed."""


def left_over(folder: Path) -> list[str]:
    """Names of what a process that was killed left half made."""
    return [p.name for p in folder.rglob("*") if p.name.endswith((files.UNFINISHED, files.DOOMED))]


SHORT = [
    *SCENARIOS["grpo"],
    "sft.steps=2",
    "run.steps=3",
    "run.checkpoint_every=1",
    "run.keep_last=1",
]
"""A run of five steps with a checkpoint after each."""


def run_alone(words: list[str]) -> Path:
    """A new folder, in whose folder `alone` a run with these words has come to its end."""
    root = Path(tempfile.mkdtemp())
    (root / "alone").mkdir()
    assert ended(forked(run_in(root / "alone", words))) == 0
    return root


def moments(chosen: list[str]) -> dict[str, object]:
    """Each, or each of those chosen: a run that is killed there and resumed, against one that was left alone; what is missing,
    or left over."""
    words, root = SHORT, run_alone(SHORT)
    expected, wrong, kills = digest(root / "alone"), [], 0
    first = MOMENTS["before a checkpoint has a manifest"]
    cases = [(name, [kill]) for name, kill in MOMENTS.items()] + [
        (name, [first, kill]) for name, kill in AGAIN.items()
    ]
    cases = [(name, kills) for name, kills in cases if not chosen or name in chosen]
    for number, (name, places) in enumerate(cases):
        folder = root / str(number)
        folder.mkdir()
        codes = []
        for time_, kill in enumerate([*places, None]):
            resumed = run_in(folder, [*words, *(["--resume"] if time_ else [])])

            def work(
                kill: Callable[[], None] | None = kill, resumed: Callable[[], None] = resumed
            ) -> None:
                if kill is not None:
                    kill()
                resumed()

            codes.append(ended(forked(work)))
        kills += codes.count(-signal.SIGKILL)
        runs = [p for p in (folder / "runs").iterdir() if not p.is_symlink()]
        problems: list[object] = (
            [] if codes == [-signal.SIGKILL] * len(places) + [0] else [f"exit codes {codes}"]
        )
        problems += [f"{p} is left over" for p in left_over(folder)] + (
            [] if len(runs) == 1 else [f"{len(runs)} runs"]
        )
        found = digest(folder)
        problems += [
            f"{k} differs"
            for k in expected.keys() | found.keys()
            if expected.get(k) != found.get(k)
        ]
        [run] = runs[:1]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        named = [e["name"] for e in events if e["event"] == "checkpoint"]
        if named != ["sft-000001", "sft-000002", "grpo-000001", "grpo-000002", "grpo-000003"]:
            problems.append(f"checkpoints in the record: {named}")
        problems += [
            f"{name} is missing"
            for name in ("report.html", "README.md", "env.json")
            if not (run / name).is_file()
        ]
        if (folder / "runs" / "latest").resolve() != run.resolve():
            problems.append("it is not the latest")
        if problems:
            wrong.append({"moment": name, "problems": problems, "folder": str(folder)})
        else:
            shutil.rmtree(folder)
    return {"moments": len(cases), "kills": kills, "wrong": wrong}


def full(shares: list[float]) -> dict[str, object]:
    """Each: a run on a file system with room for a share of what it writes. What it says on stderr, and whether it is the run
    that was left alone once there is room. None where no file system can be mounted."""
    words, root = SHORT, run_alone(SHORT)
    expected, size = (
        digest(root / "alone"),
        sum(-(-p.lstat().st_size // 4096) * 4096 for p in root.rglob("*") if p.suffix != ".html"),
    )
    cases = []
    for share in shares:
        disk = root / f"{share:g}"
        disk.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", disk], check=False
        ).returncode:
            return {"cases": None}
        try:
            first = said_by(run_in(disk, words), root)
            subprocess.run(["mount", "-o", f"remount,size={20 * size}", disk], check=True)
            cases.append({"share": share, **gone_on(first, disk, words, expected, root)})
        finally:
            subprocess.run(["umount", disk], check=True)
    shutil.rmtree(root)
    return {"cases": cases}


def limited(sizes: list[int]) -> dict[str, object]:
    """The same where no file may have more bytes than this."""
    words, root = SHORT, run_alone(SHORT)
    expected, cases = digest(root / "alone"), []
    for size in sizes:
        folder = root / str(size)
        folder.mkdir()

        def work(size: int = size, folder: Path = folder) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            run_in(folder, words)()

        cases.append({"bytes": size, **gone_on(said_by(work, root), folder, words, expected, root)})
    shutil.rmtree(root)
    return {"cases": cases}


def said_by(work: Callable[[], None], root: Path) -> tuple[int, str]:
    """The exit code of a child, and what it printed to stderr."""
    spoken = root / "stderr"

    def silently() -> None:
        os.dup2(os.open(spoken, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        work()

    return ended(forked(silently)), spoken.read_text()


def gone_on(
    first: tuple[int, str], folder: Path, words: list[str], expected: dict[str, str], root: Path
) -> dict[str, object]:
    """What a run said that had no room, and what came of it when it had."""
    then = said_by(run_in(folder, [*words, "--resume"]), root)
    found = digest(folder)
    different = [k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)]
    return {
        "code": first[0],
        "said": first[1],
        "then": then[0],
        "different": different,
        "left_over": left_over(folder),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["mutations"]:
            print(json.dumps(mutations()))
        case ["full", *shares]:
            print(json.dumps(full([float(share) for share in shares])))
        case ["limited", *sizes]:
            print(json.dumps(limited([int(size) for size in sizes])))
        case ["moments", *names]:
            print(json.dumps(moments(names)))
        case ["soak", minutes, seed]:
            print(json.dumps(soak(float(minutes), int(seed)), default=str))
        case ["frozen", trials, seed]:
            print(json.dumps(instants("two", int(trials), int(seed), signal.SIGSTOP)))
        case ["servers", kind, trials, seed]:
            print(json.dumps(servers(kind, int(trials), int(seed))))
        case ["instants", scenario, trials, seed]:
            print(json.dumps(instants(scenario, int(trials), int(seed))))
