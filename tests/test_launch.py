"""Runs of several ranks: what one process does, to rounding; and what is said and kept when a rank is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quartet.build import build
from quartet.launch.spmd import by_another
from quartet.recipes import recipe_path
from quartet.settings import ConfigError, read_settings
from quartet.worker import Local, WorkerLost, mapped
from tests.tiny_run import SMALL_REVIEWS

QUARTET = str(Path(sys.executable).parent / "quartet")
WORDS = ["run", "reviews", *SMALL_REVIEWS, "run.steps=6", "run.checkpoint_every=2", "launch.deadline=60"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TWO, SHARDED = ("launch.processes=2",), ("launch.processes=2", "launch.shard=true")


def begun(folder, *words):
    return subprocess.Popen(
        [QUARTET, *words], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(folder, *words):
    process = begun(folder, *words)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def metrics(folder, name):
    [run] = folder.glob(f"runs/*-{name}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {(e["stage"], e["step"]): e["metrics"] for e in events if e["event"] == "metrics"}


def assert_alike(ours, theirs, tolerance):
    """Metrics that are counts of tokens may differ where rounding decides; none does here."""
    assert ours.keys() == theirs.keys()
    for step, mine in ours.items():
        for name, value in mine.items():
            assert value == pytest.approx(theirs[step][name], rel=tolerance, abs=tolerance), (step, name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, said = done(folder, *WORDS, "run.name=alone")
    assert code == 0, said
    return metrics(folder, "alone")


@pytest.mark.parametrize(
    "launch", [SHARDED, *(pytest.param(other, marks=pytest.mark.slow) for other in (TWO, ("launch.shard=true",)))]
)
def test_a_run_of_several_ranks_is_the_run_of_one(tmp_path, alone, launch):
    code, said = done(tmp_path, *WORDS, "run.name=x", *launch)
    assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)
    [run] = (tmp_path / "runs").glob("*-x")
    assert {p.name for p in run.iterdir()} >= {"sft", "reward_model", "policy", "critic", "probes", "report.html"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grpo", "dpo", "online_dpo", "kto"])
def test_other_recipes_too(tmp_path, recipe):
    shape = [w for w in SMALL_REVIEWS if not w.startswith("reward_model") or recipe in {"grpo", "online_dpo"}]
    stages = ["sft", *(["reward_model"] if recipe in {"grpo", "online_dpo"} else []), recipe]
    more = ["rollout.samples_per_prompt=2"] if recipe == "grpo" else []
    steps = "run.steps=3" if recipe == "grpo" else "preference.steps=3"
    words = ["run", "reviews", *shape, *more, steps, f"recipe={json.dumps(stages)}"]
    words += (
        [f"algorithm={{preset='{recipe}'}}"] if recipe == "grpo" else [f"preference.loss.type='{recipe}'"] * (recipe == "kto")
    )
    for name, launch in (("one", ()), ("two", TWO)):
        code, said = done(tmp_path, *words, f"run.name={name}", *launch)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "two"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TWO, SHARDED])
def test_torchrun_starts_the_same(tmp_path, alone, launch):
    words = [*WORDS, "run.name=x", *launch[1:], "launch.type=torchrun"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--no-python"]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [*command, QUARTET, *words], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stderr
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [TWO, SHARDED])
def test_ray_runs_the_same(tmp_path, alone, launch):
    pytest.importorskip("ray")
    code, said = done(tmp_path, *WORDS, "run.name=x", *launch, "launch.type=ray")
    assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


# --- stopped and gone on with ---------------------------------------------------------------------------------------------


def at_step(folder, process, stage, step):
    """The run folder, once so many steps of a stage are in the record."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        for run in folder.glob("runs/*/events.jsonl"):
            if run.read_text().count(f'"stage": "{stage}"') > step and f'"stage": "{stage}", "step": {step}' in run.read_text():
                return run.parent
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def followers(process):
    """Process ids of the other ranks, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"quartet.launch.follower" in words and parent == process.pid:
            found[int(words[3])] = int(folder.name)
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SHARDED, ()),
        pytest.param((), SHARDED, marks=pytest.mark.slow),
        pytest.param(TWO, SHARDED, marks=pytest.mark.slow),
        pytest.param(SHARDED, ("launch.processes=4", "launch.shard=true"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, alone, before, after):
    process = begun(tmp_path, *WORDS, "run.name=x", *before)
    at_step(tmp_path, process, "ppo", 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by SIGTERM. Nothing is lost" in said
    code, said = done(tmp_path, *WORDS, "run.name=x", *(after or ["launch.processes=1"]), "--resume")
    assert code == 0 and "resume ppo-00000" in said, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_to_the_same_bits(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    code, said = done(aside, *WORDS, "run.name=whole", *TWO)
    assert code == 0, said
    process = begun(tmp_path, *WORDS, "run.name=x", *TWO)
    run = at_step(tmp_path, process, "ppo", 3)
    os.kill(followers(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and time.monotonic() - killed < 30
    assert "stopped: rank 1 of the run was lost: no sign of life" in said and "go on with: quartet run" in said
    code, said = done(tmp_path, *WORDS, "run.name=x", *TWO, "--resume")
    assert code == 0, said
    [whole] = aside.glob("runs/*-whole")
    for part in ("policy", "critic", "reward_model", "sft"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (run, whole))
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_named_at_the_deadline(tmp_path):
    words = [w for w in WORDS if not w.startswith("launch")]
    process = begun(tmp_path, *words, "run.name=x", *TWO, "launch.deadline=6")
    at_step(tmp_path, process, "ppo", 2)
    frozen = followers(process)[1]
    os.kill(frozen, signal.SIGSTOP)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "rank 1 of the run was lost: no sign of life" in said, said
    assert not Path(f"/proc/{frozen}").exists()


def test_what_one_rank_cannot_do_stops_all_with_its_sentence(tmp_path):
    (tmp_path / "r.py").write_text("def odd(responses):\n    return [1.0] * (len(responses) - 1)\n")
    reward = "reward=[{type='function', function='r.py:odd'}]"
    recipe = 'recipe=["sft", "rloo"]'
    shape = [w for w in SMALL_REVIEWS if not w.startswith("reward_model")]
    code, said = done(
        tmp_path, "run", "reviews", *shape, recipe, reward, "algorithm={preset='rloo'}", "rollout.samples_per_prompt=2", *TWO
    )
    assert code == 1 and re.search(r"failed: rloo, before it began: .*r.py:odd returned \d+ values for", said), said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launch.shard=true", "policy.adapter={type='lora'}"], "launch.shard = true: is not written for policy.adapter yet"),
        (["launch.address='10.0.0.1'"], "launch.address: is a Ray cluster's"),
        (["launch.processes=0"], "launch.processes"),
    ],
)
def test_what_several_ranks_cannot_do_is_said(words, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read_settings(recipe_path("reviews"), words, "recipe reviews")
    with pytest.raises(ConfigError, match="answers of several turns are written by one process yet"):
        read_settings(recipe_path("guess"), ["launch.processes=2"], "recipe guess")


# --- groups ----------------------------------------------------------------------------------------------------------------


class Doubles:
    def double(self, rows):
        return [2 * row for row in rows]

    def untouched(self):
        return True


def test_the_three_verbs_in_one_process():
    group = Local(Doubles())
    assert group.call("double", [1, 2]) == [[2, 4]]
    assert group.map("double", [5, 1, 4], [1, 1, 1]) == [10, 2, 8]
    assert group.start("double", [3]).result() == [[6]]
    assert group.world == 1 and group.untouched()


def test_rows_are_dealt_out_by_tokens_and_come_back_in_order():
    dealt = []

    def call(rows):
        dealt.extend(rows)
        return [[10 * row for row in mine] for mine in rows]

    assert mapped([1, 2, 3, 4], [9, 1, 1, 7], 2, call) == [10, 20, 30, 40]
    assert dealt == [[1], [2, 3, 4]] or sum(map(len, dealt)) == 4


def test_the_lost_are_named():
    assert str(WorkerLost([2], "gone.")) == "rank 2 of the run was lost: gone."
    assert str(WorkerLost([1, 3], "gone.")) == "ranks 1, 3 of the run were lost: gone."
    assert by_another(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")) and not by_another(
        RuntimeError("x")
    )


def test_one_process_builds_no_team():
    job = build(read_settings(recipe_path("sums"), [], "recipe sums").config)
    assert job.team.world == 1
