"""Which checkpoint is chosen, what is refused, and what a signal leaves behind."""

import dataclasses
import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from quartet.algorithms.baselines import LeaveOneOut
from quartet.algorithms.correction import SequenceMasked, SequenceTruncated, Truncated
from quartet.algorithms.policy_loss import SequenceClip
from quartet.algorithms.preference import Ipo
from quartet.assembly import build
from quartet.assembly.data import fingerprints
from quartet.config.toml import read_settings
from quartet.errors import NonFinite
from quartet.loops.rl_async import Ahead
from quartet.recipes import recipe_path
from quartet.recording.run_folder import InUse, RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.runs.folders import find_run
from quartet.runtime.events import Advanced
from quartet.runtime.interruption import Interrupted, Interruption, always
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.requests import run_to_resume
from quartet.runtime.resume import (
    CannotResume,
    choose,
    has_begun,
    set_aside,
    with_later_keys,
)
from quartet.runtime.saving import Saving
from quartet.stages.protocol import StageRun
from quartet.training.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from quartet.training.checkpoints import Checkpoints
from quartet.training.state_tree import join_tensors, split_tensors
from tests.runtime.test_runs import TINY_REVIEWS, events, metrics
from tests.support.command import quartet
from tests.support.tiny_run import SMALL, make_run
from tests.support.world import tokenizer
from tests.training.test_guards import stage

GRPO = ("run.steps=6", "run.checkpoint_every=1", "run.keep_last=3", "optim.schedule=constant")


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("checkpointed"), "sums", *GRPO).path


@functools.cache
def wanted(text: str, words: tuple[str, ...]):
    """A config, and what a run of it would be made with."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.toml").write_text(text)
        config = read_settings(Path(folder) / "config.toml", words).config
    return config, build(config).made_with


def chosen(run: Path, *words: str, accept=()):
    return choose(run, *wanted((run / "config.resolved.toml").read_text(), words), accept)


def test_a_state_goes_to_disk_and_comes_back_to_the_bit(tmp_path):
    state = {
        "a": {
            "w": torch.tensor([1.5, -0.0, 1e-45]),
            "none": None,
            "list": [1, torch.arange(3, dtype=torch.uint8), {"x": 0.1}],
        },
        "inf": float("inf"),
        "text": "“é”",
    }
    write_checkpoint(tmp_path / "ppo-000001", state, {"stage": "ppo", "step": 1})
    again = read_checkpoint(tmp_path / "ppo-000001").state()
    assert again["a"]["w"].view(torch.int32).tolist() == state["a"]["w"].view(torch.int32).tolist()
    assert again["a"]["list"][1].dtype == torch.uint8 and again["a"]["list"][2] == {"x": 0.1}
    assert again["inf"] == float("inf") and again["text"] == "“é”" and again["a"]["none"] is None
    tree, tensors = split_tensors(state)
    assert join_tensors(tree, tensors)["a"]["list"][0] == 1 and set(tensors) == {"a/w", "a/list/1"}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_written(tmp_path, number):
    with pytest.raises(NonFinite, match="the checkpoint's actor/w is not finite"):
        write_checkpoint(tmp_path / "ppo-000001", {"actor": {"w": torch.tensor([1.0, number])}}, {})
    assert not (tmp_path / "ppo-000001").exists()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    made = Checkpoints(tmp_path, {"sft": 0, "ppo": 1}, keep_last=2, keep_best=True)
    for step, merit in ((0, None), (1, 0.1), (2, 0.9), (3, 0.3), (4, None), (5, 0.2)):
        made.write("ppo", step, {}, {"merit": merit})
    assert [p.name for p in made.newest_first()] == [
        "ppo-000005",
        "ppo-000004",
        "ppo-000002",
        "ppo-000000",
    ]
    made.write("sft", 9, {}, {"merit": None})
    assert made.newest_first()[0].name == "ppo-000005", "a later stage is newer, whatever its step"


def test_a_checkpoint_that_a_kill_left_goes_when_the_run_goes_on(tmp_path):
    """Killed after the last checkpoint of a stage and before an older one was deleted: no later one would have done it."""
    stages = {"ppo": 0, "evaluation": 1}
    for step in range(6):
        Checkpoints(tmp_path, stages, keep_last=9).write("ppo", step, {}, {})
    made = Checkpoints(tmp_path, stages, keep_last=2)
    made.remove_superfluous("ppo-000004")
    names = [p.name for p in made.newest_first()]
    assert names == ["ppo-000005", "ppo-000004", "ppo-000003", "ppo-000000"], "5 may be damaged"
    made.write("evaluation", 0, {}, {})
    made.remove_superfluous("evaluation-000000")
    assert [p.name for p in made.newest_first()] == ["evaluation-000000", "ppo-000005", "ppo-000004", "ppo-000000"]  # fmt: skip


def test_the_newest_is_chosen_and_a_run_that_is_done_has_nothing_to_skip(checkpointed):
    found = chosen(checkpointed)
    assert found.checkpoint.name == "evaluation-000000" and not found.skipped and not found.accepted


def corruptions(seed: int):
    """What happens to files: something is cut, changed, lost or put in another's place."""
    rng = random.Random(seed)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))

    def lose(path: Path) -> None:
        path.unlink()

    def append(path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\0")

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    return rng.choice([truncate, flip, lose, append, empty]), rng


@pytest.mark.parametrize("seed", range(50))
def test_what_is_damaged_is_never_loaded_and_never_forgotten(checkpointed, tmp_path, seed):
    run = Path(
        shutil.copytree(
            checkpointed,
            tmp_path / "run",
            ignore=shutil.ignore_patterns("rollouts", "probes", "*.html"),
        )
    )
    shutil.rmtree(run / "checkpoints" / "evaluation-000000")
    corrupt, rng = corruptions(seed)
    newest = run / "checkpoints" / "grpo-000006"
    target = rng.choice([*sorted(newest.iterdir()), run / "sft" / "model.safetensors"])
    before = target.read_bytes()
    corrupt(target)
    harmless = newest.is_dir() and target.name == "manifest.json" and _same_json(target, before)
    if target.parent.name == "sft":  # what all of them started from
        found = chosen(run)
        assert (
            found.checkpoint.name == "sft-000000" and "sft/model.safetensors" in found.skipped[0][1]
        )
        return
    found = chosen(run)
    if not harmless:
        assert found.checkpoint.name == "grpo-000005"
        [(path, reason)] = found.skipped
        assert path == newest and any(
            name in reason for name in ("manifest", "state", "is missing")
        )
        set_aside(found.skipped)
        assert chosen(run).checkpoint.name == "grpo-000005" and list(
            (run / "checkpoints").glob("grpo-000006.skipped-1")
        )


def _same_json(path: Path, before: bytes) -> bool:
    """A byte after the end of JSON, or another space in it, changes nothing."""
    try:
        return json.loads(path.read_text()) == json.loads(before)
    except (ValueError, OSError):
        return False


def test_with_nothing_left_to_go_on_from_it_says_so_and_changes_nothing(checkpointed, tmp_path):
    run = Path(shutil.copytree(checkpointed, tmp_path / "run"))
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    with pytest.raises(
        CannotResume, match=r"no checkpoint can be used \(evaluation-000000: state.json has 2 bytes"
    ):
        chosen(run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before
    shutil.rmtree(run / "checkpoints")
    assert has_begun(run), "metrics were written: it must not begin again"
    with pytest.raises(CannotResume, match="there are none"):
        chosen(run)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    write_checkpoint(tmp_path / "a-000001", {}, {})
    manifest = tmp_path / "a-000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedCheckpoint, match="is of format 2, this Quartet reads format 1"):
        read_checkpoint(tmp_path / "a-000001")


CHANGES = [
    (
        "optim.lr=5e-6",
        "made with optim.lr = .*, the config says 5e-06. Pass --accept optim.lr, or change it back.",
    ),
    ("seed=1", "made with seed = 0, the config says 1"),
    ("rollout.temperature=0.5", "rollout.temperature = 1.0, the config says 0.5"),
    ("sft.lr=1e-4", "sft.lr"),
    ("algorithm.policy_loss.low=0.3", "algorithm.policy_loss.low"),
    ("optim.micro_batch_tokens=64", "optim.micro_batch_tokens"),
]


@pytest.mark.parametrize(("word", "sentence"), CHANGES)
def test_a_config_that_would_have_made_another_past_is_refused_until_it_is_accepted(
    checkpointed, word, sentence
):
    with pytest.raises(CannotResume, match=sentence):
        chosen(checkpointed, word)
    found = chosen(checkpointed, word, accept=[word.partition("=")[0]])
    assert len(found.accepted) == 1 and found.accepted[0].endswith("Accepted.")


@pytest.mark.parametrize(
    "word",
    [
        'run.track=["tensorboard"]',
        "run.max_minutes=5",
        "run.keep_last=9",
        "run.checkpoint_every=7",
        "evaluation.best_of=0",
        "run.offload=true",
        "rollout.staleness=0",
    ],
)
def test_what_cannot_change_the_past_may_change(checkpointed, word):
    assert not chosen(checkpointed, word).accepted


def test_a_run_may_go_on_with_rollouts_in_advance_if_that_is_accepted(checkpointed):
    with pytest.raises(
        CannotResume,
        match=r"rollout.staleness = 0, the config says 1\. Pass --accept rollout.staleness",
    ):
        chosen(checkpointed, "rollout.staleness=1")
    assert chosen(checkpointed, "rollout.staleness=1", accept=["rollout.staleness"]).accepted
    work = StageRun(lambda _: iter(()), dict, {"ahead": Ahead(1)})
    work.load_state({})
    assert work.state() == {"ahead": []}, "none are waiting"


def test_more_steps_go_on_from_the_last_of_them(checkpointed):
    found = chosen(checkpointed, "run.steps=9")
    assert found.checkpoint.name == "grpo-000006"
    assert found.skipped[0][1] == "grpo had 6 steps when it was made, and has 9 now"
    with pytest.raises(
        CannotResume,
        match="has done 6 steps already, and the config asks for 3. Set run.steps to 6 or more",
    ):
        chosen(checkpointed, "run.steps=3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "rate",
    [("schedule=linear",), ("schedule=constant", "warmup_steps=0", "warmup_ratio=0.5")],
    ids=["falling", "warming up by a ratio"],
)
def test_more_steps_would_have_been_other_steps_where_the_rate_depends_on_them(tmp_path, rate):
    run = make_run(tmp_path, "sums", *GRPO[:3], *(f"optim.{word}" for word in rate)).path
    with pytest.raises(CannotResume, match="made with run.steps = 6, the config says 9"):
        chosen(run, "run.steps=9")


def test_other_data_are_noticed(checkpointed, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n')
    (tmp_path / "sft.toml").write_text(
        f'recipe = "sft"\ndata.train = "{file}"\n[policy]\ncreate = {{ type = "llama" }}\ntokenizer = {{ type = "train" }}\n'
    )
    config = read_settings(tmp_path / "sft.toml").config
    before = fingerprints(config)
    file.write_text(file.read_text().replace("2", "3"))
    after = fingerprints(config)
    assert set(before) == {str(file)} == set(after) and before != after
    config, made_with = wanted((checkpointed / "config.resolved.toml").read_text(), ())
    with pytest.raises(
        CannotResume,
        match=rf"with other contents of {file}. Pass --accept {file}, or put the old file back.",
    ):
        choose(checkpointed, config, {**made_with, "data": after}, [])
    assert choose(checkpointed, config, {**made_with, "data": after}, [str(file)]).accepted


def test_a_planted_mistake_stays_planted(checkpointed):
    config, made_with = wanted((checkpointed / "config.resolved.toml").read_text(), ())
    with pytest.raises(
        CannotResume, match="was made with no --break. Pass --accept break, or leave --break out"
    ):
        choose(checkpointed, config, {**made_with, "fault": "stale"}, [])


def test_a_record_that_was_changed_is_noticed(checkpointed, tmp_path):
    run = Path(shutil.copytree(checkpointed, tmp_path / "run"))
    text = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(text.replace('"step": 1,', '"step": 7,', 1))
    with pytest.raises(CannotResume, match="--accept events.jsonl"):
        chosen(run)


def test_two_processes_do_not_write_one_run(tmp_path):
    folder = RunFolder.create(tmp_path, "x", {})
    with pytest.raises(InUse, match="another process is writing this run"):
        RunFolder(folder.path)
    folder.close()
    RunFolder(folder.path).close()


def test_a_run_is_found_by_its_name(tmp_path):
    for name in ("1121-0900-ppo", "1121-0901-ppo-2", "1121-0902-other-ppo", "1121-0903-ppo-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text("")
        time.sleep(0.01)
    (tmp_path / "latest").symlink_to("1121-0903-ppo-x")
    found = find_run(tmp_path, "ppo")
    assert found is not None and found.name == "1121-0901-ppo-2"
    assert find_run(tmp_path, "grpo") is None


@pytest.mark.parametrize(
    ("began", "kept"),
    [('type = "none"', True), ('type = "truncated"\ncap = 2.0', False)],
)
def test_a_run_with_servers_that_began_before_they_were_corrected_for_is_resumed_without(
    tmp_path, monkeypatch, began, kept
):
    """From its file; its own folder says `none` itself."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "1121-0900-served"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text("")
    (run / "config.resolved.toml").write_text(f"[algorithm.correction]\n{began}\n")
    words = ["generator={type='vllm', urls=['http://x']}", "run.name=served", "run.folder=runs"]
    request = run_to_resume("reviews", words)
    assert request.path is not None and request.settings.config.algorithm is not None
    assert request.settings.config.algorithm.correction.type == ("none" if kept else "truncated")
    assert [note for note in request.notes if "keeps it" in note] == request.notes
    assert bool(request.notes) == kept


# --- signals ---------------------------------------------------------------------------------------------------------------


def test_a_signal_waits_where_it_would_tear_something():
    heard, before = [], signal.getsignal(signal.SIGTERM)
    with Interruption(notice=heard.append) as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["SIGTERM"]
        with pytest.raises(Interrupted, match="SIGTERM"):
            interruption.check()
        with pytest.raises(Interrupted, match="SIGTERM"), interruption.only_if(always):
            pass
        with pytest.raises(Interrupted, match="Ctrl-C"):
            signal.raise_signal(signal.SIGINT)  # the second does not wait
    assert signal.getsignal(signal.SIGTERM) == before, "handlers are put back"


def test_a_signal_is_heard_at_once_where_nothing_is_lost():
    free = [True]
    with Interruption() as interruption:
        interruption.check()
        with pytest.raises(Interrupted, match="Ctrl-C"), interruption.only_if(lambda: free[0]):
            signal.raise_signal(signal.SIGINT)
    with Interruption() as interruption:
        with interruption.only_if(lambda: free[0]):
            free[0] = False
            signal.raise_signal(signal.SIGINT)
        assert interruption.reason == "Ctrl-C"


@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_between_steps_saves_the_step_before(tmp_path, monkeypatch, at):
    """As it comes while somebody else prints what a step gave."""
    folder = RunFolder.create(tmp_path, "x", {})
    with Interruption() as interruption:
        told = Pipeline(
            [stage(monkeypatch, set())],
            folder,
            TokenTexts(tokenizer()),
            Saving(every=100),
            None,
            interruption,
        ).run()
        with pytest.raises(Interrupted, match="SIGTERM"):
            for event in told:
                if isinstance(event, Advanced) and event.progress.number == at:
                    signal.raise_signal(signal.SIGTERM)
    folder.close()
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == [
        "sft-000000",
        f"sft-{at:06d}",
    ]


def stopped(
    tmp_path: Path, number: signal.Signals, words: list[str]
) -> subprocess.CompletedProcess[str]:
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from quartet.cli import main; main()"
    command = [sys.executable, "-c", heed, *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    third, deadline = (
        tmp_path / "runs" / "latest" / "rollouts" / "000003.parquet",
        time.monotonic() + 120,
    )
    while not third.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


@pytest.mark.slow
def test_sigterm_saves_the_step_it_is_in_and_the_resumed_run_is_the_run(tmp_path):
    """Checkpoints are far apart here: what is saved is what the signal saved."""
    words = [w for w in TINY_REVIEWS if not w.startswith("run.steps")] + [
        "run.steps=16",
        "run.checkpoint_every=1000",
    ]
    first = stopped(tmp_path, signal.SIGTERM, words)
    assert first.returncode == 75, first.stderr
    assert "stopped by SIGTERM. Nothing is lost; go on with: quartet run runs/" in first.stdout
    run = (tmp_path / "runs" / "latest").resolve()
    steps = len([e for e in events(run) if e.get("stage") == "ppo" and e["event"] == "metrics"])
    assert (run / "checkpoints" / f"ppo-{steps:06d}").is_dir() and steps >= 3
    again = quartet(*words, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resume ppo-{steps:06d}" in again.stdout
    whole = quartet(*words, "run.name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    other = next((tmp_path / "runs").glob("*-whole"))
    assert metrics(run) == metrics(other) and len(metrics(run)) == len(metrics(other))
    for name in ("policy", "critic"):
        ours, theirs = (
            (folder / name / "model.safetensors").read_bytes() for folder in (run, other)
        )
        assert ours == theirs
    done = quartet("run", "runs/latest", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "is done" in done.stdout


@pytest.mark.slow
def test_a_time_limit_saves_and_stops(tmp_path):
    words = [w for w in TINY_REVIEWS if not w.startswith("run.steps")] + [
        "run.steps=100000",
        "run.max_minutes=0.12",
    ]
    done = quartet(*words, cwd=tmp_path)
    assert done.returncode == 75 and "stopped by run.max_minutes" in done.stdout, done.stderr
    assert list((tmp_path / "runs" / "latest" / "checkpoints").glob("*-*"))


def test_words_for_what_cannot_be_resumed(tmp_path):
    nothing = quartet("run", "--resume", cwd=tmp_path)
    assert nothing.returncode == 2 and "there is no run to resume" in nothing.stderr
    alone = quartet("run", "reviews", "--accept", "optim.lr", cwd=tmp_path)
    assert alone.returncode == 2 and "--accept: needs --resume." in alone.stderr


def test_resume_begins_a_run_that_there_is_not_yet(tmp_path):
    settings = read_settings(recipe_path("sums"), SMALL, "recipe sums")
    assert settings.config
    done = quartet(
        "run",
        "sums",
        *SMALL,
        "policy.create.max_length=32",
        "run.steps=1",
        "--resume",
        cwd=tmp_path,
    )
    assert (
        done.returncode == 0
        and "There is no run of this name to resume: a new one begins." in done.stdout
    )


@pytest.mark.parametrize(
    ("place", "part", "later"),
    [
        ("algorithm.advantage", LeaveOneOut(), {"std", "eps"}),
        ("algorithm.policy_loss", SequenceClip(), {"ratio"}),
        ("algorithm.correction", Truncated(), {"floor"}),
        ("algorithm.correction", SequenceTruncated(), {"ratio"}),
        ("algorithm.correction", SequenceMasked(), {"ratio", "weight"}),
        ("preference.loss", Ipo(), {"per"}),
    ],
)
def test_a_part_of_an_older_version_is_what_it_is_today_without_being_told(place, part, later):
    today = {f"{place}.{name}": value for name, value in dataclasses.asdict(part).items()}
    then = {key: value for key, value in today.items() if key.rpartition(".")[2] not in later}
    assert len(today) - len(then) == len(later)
    found = with_later_keys(then)
    assert {key: found[key] for key in found if key.startswith(place)} == today
    # A part of another type, and settings that were written, are left alone.
    other = {f"{place}.type": "other"}
    assert not any(key.startswith(f"{place}.") for key in with_later_keys(other).keys() - other)
    changed = today | {f"{place}.{min(later)}": "mine"}
    assert with_later_keys(changed)[f"{place}.{min(later)}"] == "mine"


def test_a_key_that_is_no_setting_cannot_be_accepted(checkpointed):
    """One that could differ, but does not, is passed over."""
    with pytest.raises(CannotResume, match=r"--accept optim\.lrr: no such .* mean optim\.lr\?"):
        chosen(checkpointed, accept=("optim.lrr",))
    assert chosen(checkpointed, accept=("optim.lr", "rollout.top_p")).checkpoint


def test_a_signal_that_comes_as_a_run_ends_is_the_programs():
    with Interruption() as kept:
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        kept.pass_on()
    with Interruption() as none:
        pass
    none.pass_on()
