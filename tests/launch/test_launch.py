"""Runs of several ranks: what one process does, to rounding; and what is said and kept when a rank is lost."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from quartet.assembly import build
from quartet.assembly.device import device
from quartet.config.run import Launch
from quartet.config.toml import ConfigError, read_settings
from quartet.distributed.process_group import TorchProcessGroup
from quartet.errors import NonFinite
from quartet.launch import spmd
from quartet.launch.processes import Follower, how_it_ended, wait_for
from quartet.launch.spmd import ProcessWorkers, by_another, follow
from quartet.launch.start import local_rank_of
from quartet.models.language_model import ModelError
from quartet.recipes import recipe_path
from quartet.runtime.worker import LocalWorkers, WorkerLost
from tests.support import killing
from tests.support.tiny_run import SMALL_REVIEWS

pytestmark = pytest.mark.slow

QUARTET = str(Path(sys.executable).parent / "quartet")
WORDS = [
    "run",
    "reviews",
    *SMALL_REVIEWS,
    "run.steps=6",
    "run.checkpoint_every=2",
    "launch.deadline=60",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TWO, SHARDED = ("launch.processes=2",), ("launch.processes=2", "launch.shard=true")
GAMES = [
    w
    for w in SMALL_REVIEWS
    if w.split(".")[0] not in {"policy", "reward_model"} and "max_new" not in w
]
ROWS = ("launch.processes=4", "launch.shard=2")


def begun(folder, *words):
    return subprocess.Popen(
        [QUARTET, *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def done(folder, *words):
    process = begun(folder, *words)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def metrics(folder, name):
    [run] = folder.glob(f"runs/*-{name}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {(e["stage"], e["step"]): e["metrics"] for e in events if e["event"] == "metrics"}


def weights(root, name, file):
    """The tensors of a file of a run's models, without its ending."""
    return load_file(next((root / "runs").glob(f"*-{name}")) / f"{file}.safetensors")


def assert_near(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < tolerance


def assert_alike(ours, theirs, tolerance):
    """Which of two that are nearly the same is greater, rounding decides: of 64 pairs, one or two may be counted elsewhere."""
    assert ours.keys() == theirs.keys()
    for step, mine in ours.items():
        for name, value in mine.items():
            apart = max(tolerance, 2 / 64 * (name == "accuracy" and "dpo" in step[0]))
            assert value == pytest.approx(theirs[step][name], rel=tolerance, abs=apart), (
                step,
                name,
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    code, said = done(folder, *WORDS, "run.name=alone")
    assert code == 0, said
    return metrics(folder, "alone")


@pytest.mark.parametrize(
    "launch",
    [
        SHARDED,
        *(pytest.param(other, marks=pytest.mark.long) for other in (TWO, ("launch.shard=true",))),
    ],
)
def test_a_run_of_several_ranks_is_the_run_of_one(tmp_path, alone, launch):
    code, said = done(tmp_path, *WORDS, "run.name=x", *launch)
    assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)
    [run] = (tmp_path / "runs").glob("*-x")
    assert {p.name for p in run.iterdir()} >= {
        "sft",
        "reward_model",
        "policy",
        "critic",
        "probes",
        "report.html",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("launch", "more", "tolerance"),
    [
        (SHARDED, (), 2e-5),
        (TWO, (), 2e-5),
        # up to the first answers that rounding changes
        (SHARDED, ("run.precision=bf16", "run.steps=2"), 5e-2),
    ],
)
def test_so_is_one_of_adapters_on_one_trunk(tmp_path, launch, more, tolerance):
    """Policy, reward model and critic are adapters, the reference is none; what is saved is whole."""
    words = [*WORDS, "policy.adapter={type='lora',rank=2}", "run.checkpoint_every=6"]
    words += ["reward_model.lr=0.01", *more]
    for name, started in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, *words, f"run.name={name}", *started)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), tolerance)
    for file in ("policy/adapter/adapter_model", "policy/model", "critic/model"):
        assert_near(*(weights(tmp_path, name, file) for name in ("x", "one")), tolerance / 2)


@pytest.mark.long
@pytest.mark.parametrize("launch", [TWO, SHARDED])
def test_so_is_one_that_samples_while_it_learns(tmp_path, launch):
    """Two threads of each rank speak to their likes of the other, and neither hears the wrong one."""
    words = [*WORDS, "rollout.staleness=1", "run.checkpoint_every=6"]
    for name, more in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, *words, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "launch"),
    [("grpo", TWO), ("dpo", TWO), ("online_dpo", TWO), ("online_dpo", SHARDED), ("kto", TWO)],
)
def test_other_recipes_too(tmp_path, recipe, launch):
    shape = [
        w
        for w in SMALL_REVIEWS
        if not w.startswith("reward_model") or recipe in {"grpo", "online_dpo"}
    ]
    stages = ["sft", *(["reward_model"] if recipe in {"grpo", "online_dpo"} else []), recipe]
    more = ["rollout.samples_per_prompt=2"] if recipe == "grpo" else []
    steps = "run.steps=3" if recipe == "grpo" else "preference.steps=3"
    words = ["run", "reviews", *shape, *more, steps, f"recipe={json.dumps(stages)}"]
    words += (
        [f"algorithm={{preset='{recipe}'}}"]
        if recipe == "grpo"
        else [f"preference.loss.type='{recipe}'"] * (recipe == "kto")
    )
    for name, more in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, *words, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.parametrize("launch", [SHARDED, pytest.param(TWO, marks=pytest.mark.long)])
def test_so_is_one_of_a_users_own_stage(tmp_path, launch):
    (tmp_path / "stage.py").write_text(killing.STAGE)
    for name, more in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, "run", *killing.CUSTOM, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.long
@pytest.mark.parametrize("launch", [SHARDED, ROWS])
def test_so_is_one_with_frozen_layers_and_an_average(tmp_path, launch):
    words = [
        *WORDS,
        "policy.create.num_layers=2",
        "policy.frozen_layers=1",
        "optim.ema=0.9",
        "run.checkpoint_every=6",
    ]
    for name, more in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, *words, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), 2e-5)
    for file in ("policy_ema/model", "policy/model", "critic/model"):
        assert_near(*(weights(tmp_path, name, file) for name in ("x", "one")))


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("launch", [(), ("policy.gradient_checkpointing=true",), SHARDED])
def test_so_is_one_that_is_compiled(tmp_path, alone, launch):
    code, said = done(tmp_path, *WORDS, "run.name=x", "policy.compile=true", *launch)
    assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), alone, 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("launch", [TWO, SHARDED])
def test_so_is_one_of_games(tmp_path, launch):
    """The lead plays them, and all hear what was said."""
    words = ["run", "guess", *GAMES, "run.steps=4", "launch.deadline=60"]
    for name, more in (("one", ()), ("x", launch)):
        code, said = done(tmp_path, *words, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "x"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.long
@pytest.mark.parametrize("launch", [TWO, SHARDED])
def test_torchrun_starts_the_same(tmp_path, alone, launch):
    words = [*WORDS, "run.name=x", *launch[1:], "launch.type=torchrun"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        "--no-python",
    ]
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [*command, QUARTET, *words],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


def said_for(folder, *words):
    code, said = done(folder, *words)
    assert code == 0, said
    return said


def test_how_to_start_it_on_several_nodes_is_said(tmp_path):
    said = said_for(
        tmp_path, "run", "reviews", "launch.shard=8", "run.name=it is", "--nodes", "2x8"
    )
    assert said.startswith("2 x 8 = 16 ranks: 8 hold each model in parts, 2 such rows; ")
    for way in (
        "torchrun --nnodes=2 --nproc-per-node=8 ",
        "srun --nodes=2 --ntasks-per-node=8 ",
        "launch.processes=16",
    ):
        assert way in said
    assert said.count("'run.name=it is'") == 3
    only = said_for(tmp_path, "run", "reviews", "launch.type=ray", "--nodes", "1x4")
    assert (
        "torchrun" not in only
        and "on the others" not in only
        and only.count("launch.type=ray") == 1
    )
    assert not (tmp_path / "runs").exists()
    for words, sentence in (
        (["--nodes", "two"], '--nodes two: say how many nodes of how many ranks each, as "2x8".'),
        (
            ["--nodes", "1x3", "launch.shard=2"],
            "launch.shard = 2: launch.processes = 3 is no multiple of it",
        ),
        (
            ["launch.type=torchrun"],
            'launch.type = "torchrun": RANK is not set, so torchrun or srun did not start this process.',
        ),
    ):
        code, refused = done(tmp_path, "run", "reviews", *words)
        assert code == 2 and sentence in " ".join(refused.split()), refused


@pytest.mark.long
@pytest.mark.parametrize("way", ["torchrun --", "srun --"])
def test_what_is_said_starts_it(tmp_path, alone, way):
    """On one node, which is this one; without Slurm, what it would start is started with the numbers it would give."""
    said = said_for(tmp_path, *WORDS, "run.name=x", "--nodes", "1x2").replace("NODE0", "127.0.0.1")
    [line] = [line.strip() for line in said.splitlines() if line.strip().startswith(way)]
    environment = ENVIRONMENT | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(QUARTET).parent}:{os.environ['PATH']}",
    }
    commands = [["bash", "-c", line]]
    if way == "srun --":
        *_, inner = shlex.split(line)
        commands = [
            ["bash", "-c", f"SLURM_PROCID={rank} SLURM_NTASKS=2; {inner}"] for rank in range(2)
        ]
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment) for command in commands]
    assert [process.wait(timeout=240) for process in started] == [0] * len(commands)
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


@pytest.mark.long
def test_torchrun_starts_again_what_lost_a_rank(tmp_path, alone):
    words = [*WORDS, "run.name=x", "launch.type=torchrun", "--resume"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    process = subprocess.Popen(
        [*command, "--no-python", QUARTET, *words],
        cwd=tmp_path,
        env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    at_step(tmp_path, process, "ppo", 3)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    said, _ = process.communicate(timeout=240)
    # Step 3 is recorded before its checkpoint, which may be written when the rank is killed.
    resumed = any(f"resume ppo-00000{step}" in said for step in (2, 3))
    assert process.returncode == 0 and resumed, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


@pytest.mark.long
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
        for run in folder.glob("runs/[!.]*/events.jsonl"):
            if (
                run.read_text().count(f'"stage": "{stage}"') > step
                and f'"stage": "{stage}", "step": {step}' in run.read_text()
            ):
                return run.parent
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[0])


def children(parent):
    """What each is called with, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(folder.name)] = words
        except (OSError, ValueError):
            continue
    return found


def followers(process):
    """Process ids of the other ranks, by rank."""
    return {
        int(words[3]): child
        for child, words in children(process.pid).items()
        if b"quartet.launch.follower" in words
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SHARDED, ()),
        pytest.param((), SHARDED, marks=pytest.mark.long),
        pytest.param(TWO, SHARDED, marks=pytest.mark.long),
        pytest.param(SHARDED, ("launch.processes=4", "launch.shard=true"), marks=pytest.mark.long),
        pytest.param(ROWS, (), marks=pytest.mark.long),
        pytest.param(TWO, ROWS, marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, alone, before, after):
    process = begun(tmp_path, *WORDS, "run.name=x", *before)
    at_step(tmp_path, process, "ppo", 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by SIGTERM. Nothing is lost" in said
    code, said = done(
        tmp_path, *WORDS, "run.name=x", *(after or ["launch.processes=1"]), "--resume"
    )
    assert code == 0 and "resume ppo-00000" in said, said
    assert_alike(metrics(tmp_path, "x"), alone, 2e-5)


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(SHARDED, ()), ((), SHARDED)])
def test_so_does_one_of_adapters_with_a_reward_model_on_the_trunk(tmp_path, before, after):
    """A model in parts is sampled from a copy, to which the reward model is then attached."""
    words = [*WORDS, "policy.adapter={type='lora',rank=2}", "reward_model.lr=0.01"]
    code, said = done(tmp_path, *words, "run.name=one")
    assert code == 0, said
    (aside := tmp_path / "aside").mkdir()
    process = begun(aside, *words, "run.name=x", *before)
    at_step(aside, process, "ppo", 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    code, said = done(aside, *words, "run.name=x", *(after or ["launch.processes=1"]), "--resume")
    assert code == 0 and "resume ppo-00000" in said, said
    assert_alike(metrics(aside, "x"), metrics(tmp_path, "one"), 2e-5)


@pytest.mark.long
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_to_the_same_bits(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    code, said = done(aside, *WORDS, "run.name=whole", *TWO)
    assert code == 0, said
    process = begun(tmp_path, *WORDS, "run.name=x", *TWO, "launch.restarts=1")
    at_step(tmp_path, process, "ppo", 3)
    os.kill(followers(process)[1], signal.SIGKILL)
    run = at_step(tmp_path, process, "ppo", 5)  # it went on by itself
    os.kill(followers(process)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 75
        and said.count("stopped: rank 1 of the run was lost: its process has ended") == 2
    )
    assert (
        said.count("The last checkpoint is whole; the run goes on from it") == 1
        and "go on with: quartet run" in said
    )
    code, said = done(tmp_path, *WORDS, "run.name=x", *TWO, "--resume")
    assert code == 0, said
    [whole] = aside.glob("runs/*-whole")
    for part in ("policy", "critic", "reward_model", "sft"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (run, whole))
        assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.long
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
        tmp_path,
        "run",
        "reviews",
        *shape,
        recipe,
        reward,
        "algorithm={preset='rloo'}",
        "rollout.samples_per_prompt=2",
        *TWO,
    )
    assert code == 1 and re.search(
        r"failed: rloo, before it began: .*r.py:odd returned \d+ values for", said
    ), said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["launch.shard=3", "launch.processes=4"],
            "launch.shard = 3: launch.processes = 4 is no multiple of it",
        ),
        (
            [
                "launch.shard=true",
                "algorithm.preset=trpo",
                'recipe=["sft", "reward_model", "trpo"]',
            ],
            "launch.shard: second",
        ),
        (
            [
                "policy.compile=true",
                "algorithm.preset=trpo",
                'recipe=["sft", "reward_model", "trpo"]',
            ],
            "policy.compile: algo",
        ),
        (
            ["launch.type=torchrun", "launch.restarts=2"],
            "launch.restarts: torchrun starts its ranks again itself",
        ),
        (["launch.address='10.0.0.1'"], "launch.address: is a Ray cluster's"),
        (["launch.processes=0"], "launch.processes"),
    ],
)
def test_what_several_ranks_cannot_do_is_said(words, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read_settings(recipe_path("reviews"), words, "recipe reviews")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(
        "quartet.assembly.assembler.device", lambda name, process_group: torch.device("cuda")
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = read_settings(recipe_path("reviews"), ["launch.processes=2"], "recipe reviews").config
    with pytest.raises(
        ModelError,
        match="launch.processes = 2: each rank takes a GPU of its own, and this machine has 1.",
    ):
        build(config, process_group=TorchProcessGroup(0, 2))


def test_torchruns_number_of_ranks_must_be_a_multiple_too_and_one_that_is_no_rank_may_build():
    """Ray's driver, a replay: they hold no part."""
    rays = ["launch.type='ray'", "launch.shard=2", "launch.processes=4"]
    assert build(read_settings(recipe_path("reviews"), rays, "recipe reviews").config).stages
    config = read_settings(
        recipe_path("reviews"), ["launch.type='torchrun'", "launch.shard=2"], "recipe reviews"
    ).config
    with pytest.raises(
        ModelError, match="launch.shard = 2: there are 3 ranks, which is no multiple of it"
    ):
        build(config, process_group=TorchProcessGroup(0, 3))


# --- groups ----------------------------------------------------------------------------------------------------------------


WRONG = r"seven is no number of legs \(ValueError, test_launch.py, line \d+\)"


class Doubles:
    """A worker, and what can go wrong with one."""

    def __init__(self, rank=0):
        self.rank, self.seen, self.free = rank, [], threading.Event()

    def double(self, rows):
        self.seen.append(rows)
        return [2 * row for row in rows]

    def fail(self, kind):
        if self.rank == 0:
            raise RuntimeError(
                "gloo: connection closed by peer"
            )  # what it is told, where another is the cause
        match kind:
            case "wrong":
                raise ValueError("seven is no number of legs")
            case "wordless":
                raise MemoryError
            case "not finite":
                raise NonFinite("the loss")
        self.free.wait()

    def fail_elsewhere(self, kind, seconds=60.0):
        """Rank 0 is in a collective of NCCL, which does not notice that the other has failed."""
        if self.rank == 0:
            self.free.wait(seconds)
            raise NonFinite("the loss")
        self.fail(kind)

    def untouched(self):
        return True


@pytest.fixture
def two(monkeypatch):
    """A group of two in threads; the other worker, and the thread that it is."""
    monkeypatch.setattr(spmd, "SILENCE", 1.0)
    monkeypatch.setattr(spmd, "BEAT", 0.05)
    store, other = dist.HashStore(), Doubles(1)
    following = threading.Thread(target=follow, args=(other, store, 1))
    following.start()
    group = ProcessWorkers(Doubles(), store, 2, deadline=20.0)
    yield group, other, following
    other.free.set()
    group.close()
    following.join(10)
    assert not following.is_alive()


def test_a_call_in_one_process():
    group = LocalWorkers(Doubles())
    assert group.call("double", [1, 2]) == [[2, 4]]
    assert group.world_size == 1 and group.untouched()


def test_a_call_in_two(two):
    group, other, _ = two
    assert group.call("double", [1, 2]) == [[2, 4], [2, 4]]
    assert (group.worker.seen, other.seen) == ([[1, 2]], [[1, 2]])
    assert group.untouched()


def test_a_group_is_not_untouched_while_a_call_is_under_way(two):
    group, *_ = two
    untouched = []
    group.worker.double = lambda rows: untouched.append(group.untouched())
    group.call("double", [3])
    assert untouched == [False] and group.untouched()


def test_the_rank_that_failed_is_the_cause_and_ends(two):
    group, _, following = two
    with pytest.raises(RuntimeError, match=rf"^rank 1: {WRONG}$"):
        group.call("fail", "wrong")
    following.join(10)
    assert not following.is_alive(), "others would wait for it in a collective"


def test_an_error_of_another_rank_has_a_kind_and_a_place_and_its_traceback_is_logged(two, caplog):
    group, _, following = two
    with pytest.raises(RuntimeError, match=r"^rank 1: MemoryError \(test_launch.py, line \d+\)$"):
        group.call("fail", "wordless")
    following.join(10)
    [record] = [r for r in caplog.records if r.getMessage() == "rank 1 failed"]
    assert record.exc_info[0] is MemoryError


def test_numbers_that_are_not_finite_end_no_rank(two):
    group, other, following = two
    with pytest.raises(RuntimeError, match="the loss is not finite"):
        group.call("fail", "not finite")
    assert group.call("double", [4]) == [[8], [8]] and following.is_alive() and other.seen == [[4]]


def test_a_rank_that_gives_no_sign_of_life_is_lost_and_one_that_does_is_stuck(two):
    group, _, _ = two
    with pytest.raises(WorkerLost, match="rank 1 of the run was lost: no sign of life for 1 s"):
        group.call("fail", "silent")
    group.store.add("beat/1", 1)
    beating = threading.Thread(
        target=lambda: [group.store.add("beat/1", 1) and time.sleep(0.05) for _ in range(80)]
    )
    beating.start()
    with pytest.raises(
        WorkerLost,
        match="rank 1 of the run was lost: alive, but not where the others waited for it .*"
        r"longer than launch.deadline = 20 s, resume with a longer one\.",
    ):
        group.call("fail", "silent")
    beating.join()


class Ended:
    """A follower whose process has ended; what it did before that is noticed."""

    rank = 1

    def __init__(self, before=lambda: None):
        self.process, self.before = self, before

    def poll(self):
        self.before()
        return -9

    def end(self):
        pass


def test_a_process_that_has_ended_is_lost_at_once(two, monkeypatch):
    group, *_ = two
    monkeypatch.setattr(spmd, "SILENCE", 60.0)
    group.followers = [Ended()]
    with pytest.raises(WorkerLost, match="rank 1 of the run was lost: its process has ended"):
        group.call("fail", "silent")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (-9, "by SIGKILL, which the system sends when memory runs out (then resume with a smaller"),
        (-11, "by SIGSEGV; see run.log."),
        (3, "with code 3; see run.log."),
        (-99, "with code -99; see run.log."),
    ],
)
def test_how_a_process_has_ended_is_said(code, sentence):
    assert how_it_ended(code).startswith(f"its process has ended {sentence}")


def test_a_rank_that_reports_its_error_and_ends_is_not_called_lost(two):
    """However late the report is read: it is written before the end."""
    group, *_ = two
    report = json.dumps({"error": "seven is no number of legs", "by_another": False})
    group.followers = [Ended(lambda: group.store.set("done/1/1", report))]
    with pytest.raises(RuntimeError, match="^rank 1: seven is no number of legs$"):
        group.call("fail", "silent")


def test_rank_zero_does_not_wait_for_a_rank_that_has_failed(two, monkeypatch):
    """As in a collective of NCCL, in which nothing says that the other has left."""
    group, *_ = two
    monkeypatch.setattr(spmd, "GRACE", 0.2)
    with pytest.raises(RuntimeError, match=rf"^rank 1: {WRONG}$"):
        group.call("fail_elsewhere", "wrong")  # whose own error would come after a minute
    assert not group.untouched()
    group.worker.free.set()


def test_nor_for_one_whose_process_has_ended(two, monkeypatch):
    group, *_ = two
    monkeypatch.setattr(spmd, "GRACE", 0.2)
    group.followers = [Ended()]
    with pytest.raises(WorkerLost, match="rank 1 of the run was lost: its process has ended"):
        group.call("fail_elsewhere", "silent")
    group.worker.free.set()


def test_it_waits_for_its_own_error_where_every_rank_has_one(two, monkeypatch):
    """A rank that comes later to numbers that are not finite finds them too."""
    group, _, following = two
    monkeypatch.setattr(spmd, "GRACE", 0.1)
    with pytest.raises(NonFinite, match="the loss is not finite"):
        group.call("fail_elsewhere", "not finite", 1.0)
    assert group.call("double", [4]) == [[8], [8]] and following.is_alive()


@pytest.mark.long
def test_on_ray_a_long_step_is_not_a_lost_rank_and_a_dead_one_is():
    ray = pytest.importorskip("ray")
    from quartet.launch.on_ray import RayWorkers

    class Slow:
        def alive(self):
            return True

        def work(self, seconds):
            time.sleep(seconds)
            return seconds

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    try:
        group = object.__new__(RayWorkers)
        group.deadline, group.ranks = (
            0.3,
            [ray.remote(max_concurrency=2)(Slow).remote() for _ in range(2)],
        )
        assert group._all([rank.work.remote(2.0) for rank in group.ranks]) == [2.0, 2.0]
        asked = [rank.work.remote(60.0) for rank in group.ranks]
        ray.kill(group.ranks[1])
        with pytest.raises(WorkerLost, match="rank 1 of the run was lost: its process is gone"):
            group._all(asked)
    finally:
        ray.shutdown()


def test_a_rank_that_ends_or_does_not_come_before_it_has_begun_is_lost():
    for command, patience, said in (
        ("exit 3", 60.0, "ended with code 3 before"),
        ("sleep 60", 0.2, "did not begin within 0.2 s"),
    ):
        process = subprocess.Popen(["sh", "-c", command])
        with pytest.raises(WorkerLost, match=f"rank 1 of the run was lost: it {said}"):
            wait_for([Follower(1, process)], dist.HashStore(), patience)
        process.kill()
        process.wait()


def test_the_lost_are_named():
    assert str(WorkerLost([2], "gone.")) == "rank 2 of the run was lost: gone."
    assert str(WorkerLost([1, 3], "gone.")) == "ranks 1, 3 of the run were lost: gone."
    assert by_another(
        RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")
    ) and not by_another(RuntimeError("x"))


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(
        torch, "ones", lambda size, device: chosen.append(device) or torch.zeros(size)
    )
    for rank in range(4):
        device("auto", TorchProcessGroup(rank, 4))
    device("cuda:1", TorchProcessGroup(0, 4))
    device("auto", TorchProcessGroup(3, 6, local_rank=0))  # the first of the second machine's three
    assert chosen == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:1", "cuda:0"]


def test_torchrun_says_which_rank_of_its_machine_a_process_is(monkeypatch):
    """torchrun's ranks of a machine need not follow each other; those of `local` are on one machine."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_rank_of(Launch(type="torchrun")) == 2
    assert local_rank_of(Launch(type="local")) is None
    monkeypatch.delenv("LOCAL_RANK")
    assert local_rank_of(Launch(type="torchrun")) is None


def test_one_process_builds_no_process_group():
    job = build(read_settings(recipe_path("sums"), [], "recipe sums").config)
    assert job.process_group.world_size == 1
