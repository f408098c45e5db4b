"""Sweeps of real processes: what is run, pruned, recorded and resumed. The runs are stand-ins that write the record of a run in a
fraction of a second; one sweep of real runs is in test_real.py."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from quartet.config.toml import ConfigError
from quartet.runs.sweeps import Sweep
from quartet.sweeps import life
from quartet.sweeps.conduct import SweepFailed
from quartet.sweeps.folder import CannotSweep
from quartet.sweeps.life import beginning_of
from tests.support.fake_run import reached
from tests.sweeps.files import GRID, sweep_file

PROJECT = Path(__file__).parents[2]
SEARCH = """
objective = "gold"
method = "tpe"
trials = 12
[sweep.keys]
algorithm.kl.coef = { min = 0.01, max = 1.0, log = true }
"""


def start(folder: Path, *words: str, step: float = 0.02) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    environment |= {
        "PYTHONPATH": f"{PROJECT / 'src'}{os.pathsep}{PROJECT}",
        "FAKE_STEP_SECONDS": str(step),
    }
    command = [sys.executable, "-m", "tests.support.sweeping", "sweep", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def carry_out(folder: Path, *words: str, code: int = 0, step: float = 0.02) -> tuple[str, str]:
    """Run the command to its end; return what it printed."""
    process = start(folder, *words, step=step)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == code, printed + complaints
    return printed, complaints


def sweep_of(folder: Path) -> Sweep:
    return Sweep(next((folder / "runs").glob("*-search")))


def work(sweep: Sweep) -> dict[str, list[int]]:
    """The steps that each run computed, in order."""
    return {
        path.parent.name: [int(line) for line in path.read_text().split()]
        for path in sweep.path.glob("*/work")
    }


def running(folder: Path) -> list[int]:
    """The processes that were started in a folder and are not over."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder and "fake_run" in (
                process / "cmdline"
            ).read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def lines_of(sweep: Sweep) -> list[dict]:
    return [json.loads(line) for line in (sweep.path / "sweep.jsonl").read_text().splitlines()]


def test_a_grid_runs_every_setting_with_every_seed(here):
    sweep = here(GRID, "sweep.parallel=3")
    assert sweep.status == "done" and len(sweep.trials) == 6
    assert sorted(work(sweep).values()) == [list(range(1, 9))] * 12
    first = sweep.trials[0]
    assert first.values == {"algorithm.kl.coef": 0.01, "optim.lr": 1e-4}
    golds = [reached(0.01, seed, 1.0)[0] for seed in (0, 1)]
    assert first.objectives == golds and first.mean == pytest.approx(sum(golds) / 2)
    assert sweep.best.values["algorithm.kl.coef"] == 0.1


def test_a_bound_decides_what_is_best(here):
    """The KL of coef 0.1 is 4.0 and of coef 1 it is 0.4; the objectives are 1 and 0."""
    sweep = here(GRID, "sweep.at_most.held_out_kl=1.0", "sweep.seeds=1", "sweep.parallel=3")
    assert sweep.best.values["algorithm.kl.coef"] == 1.0
    assert sweep.best.measure("held_out_kl") == pytest.approx(0.4)
    assert [t.is_allowed for t in sweep.ranked()] == [True, True, False, False, False, False]


def test_a_finding_of_the_doctor_prunes_a_trial_and_its_other_seeds_are_not_run(here):
    table = """
objective = "gold"
seeds = 2
stop_on = ["entropy_collapse"]
[sweep.keys]
optim.lr = [0.1, 0.6]
"""
    sweep = here(table, step=0.1)
    good, bad = sweep.trials.values()
    assert good.state == "done" and bad.state == "pruned"
    assert bad.runs[0].by == "entropy_collapse" and bad.runs[1].state == "waiting"
    assert bad.reason == "ppo, step 3: Too low."
    assert len(work(sweep)["0101-0000-trial-001-seed-0"]) < 8  # it was stopped


def test_a_finding_that_stops_any_run_is_a_reason_to_prune_and_no_failure(here):
    good, bad = here('objective = "gold"\n[sweep.keys]\noptim.lr = [0.1, 0.95]').trials.values()
    assert (good.state, bad.state) == ("done", "pruned")
    assert bad.runs[0].by == "reference_moved"


def test_the_median_prunes_what_is_worse_and_says_so(here):
    pytest.importorskip("optuna")
    table = """
objective = "gold"
prune = { startup = 2, warmup = 2 }
[sweep.keys]
algorithm.kl.coef = [0.1, 0.2, 0.001]
"""
    sweep = here(table, step=0.1)
    *_, bad = sweep.trials.values()
    assert bad.state == "pruned" and bad.runs[0].by == "median"
    assert bad.reason == "step 2: worse than the median of the trials before it"
    assert list(bad.runs[0].curve) == [1, 2]
    assert len(work(sweep)["0101-0000-trial-002-seed-0"]) < 8


def test_an_objective_that_no_run_records_ends_the_sweep(here):
    with pytest.raises(SweepFailed, match='the run recorded no "policy/clip_fraction"'):
        here('objective = "policy/clip_fraction"\n[sweep.keys]\noptim.lr = [0.1, 0.2]')


def test_a_failed_run_is_tried_again_when_the_sweep_is_resumed(here, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "trial-001-seed-0")
    table = 'objective = "gold"\n[sweep.keys]\noptim.lr = [0.1, 0.2]'
    sweep = here(table)
    assert [t.state for t in sweep.trials.values()] == ["done", "failed"]
    assert sweep.trials[1].reason == "ppo: out of luck"
    monkeypatch.delenv("FAKE_FAILS")
    again = here(table, resume=True)
    assert [t.state for t in again.trials.values()] == ["done", "done"]
    assert work(again)["0101-0000-trial-000-seed-0"] == list(range(1, 9))


def test_a_resumed_sweep_must_be_the_one_that_began(here):
    sweep = here(GRID, "sweep.seeds=1")
    with pytest.raises(CannotSweep, match="began with other settings"):
        here(GRID, "sweep.seeds=1", "optim.epochs=3", resume=True)
    before = work(sweep)
    assert work(here(GRID, "sweep.seeds=1", "sweep.parallel=3", resume=True)) == before
    folder = str(sweep.path)
    with pytest.raises(ConfigError, match=f"quartet sweep {folder} --resume"):
        beginning_of(folder)
    with pytest.raises(ConfigError, match="run.steps: cannot change in a sweep that goes on"):
        beginning_of(folder, ["run.steps=9"], resume=True)


def test_a_sweep_at_random_takes_more_trials_when_it_is_resumed(here):
    words = ("sweep.method=random", "sweep.trials=2")
    first = work(here(SEARCH, *words))
    more = work(here(SEARCH, words[0], "sweep.trials=4", resume=True))
    assert len(first) == 2 and len(more) == 4 and first.items() <= more.items()


# --- the command


def test_a_wrong_request_is_one_sentence_with_code_2(tmp_path):
    table = 'objective = "gold"\n[sweep.keys]\noptim.lrr = [0.1, 0.2]'
    _, complaints = carry_out(tmp_path, str(sweep_file(tmp_path, table)), code=2)
    assert complaints.strip().endswith("optim.lrr: no such key. Did you mean optim.lr?")
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_a_line_per_change_and_a_table(tmp_path):
    table = 'objective = "gold"\n[sweep.keys]\nalgorithm.kl.coef = [0.1, 1.0, 0.95]\n'
    printed, _ = carry_out(tmp_path, str(sweep_file(tmp_path, table)), step=0.001)
    lines = printed.splitlines()
    assert lines[1] == "trial 0 seed 0     started  algorithm.kl.coef 0.1"
    assert lines[2].startswith("trial 0 seed 0     done     1  ")
    assert "best   algorithm.kl.coef 0.1 · gold 1" in printed


def test_the_results_as_json_and_nothing_else_on_standard_output(tmp_path):
    words = ("sweep.seeds=1", "sweep.parallel=3", "--json")
    printed, _ = carry_out(tmp_path, str(sweep_file(tmp_path)), *words, step=0.001)
    found = json.loads(printed)
    assert found["best"] == 2 and len(found["trials"]) == 6
    assert found["importance"]["algorithm.kl.coef"]["share"] == pytest.approx(1.0)
    assert found["importance"]["optim.lr"]["share"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.slow
def test_a_signal_stops_the_runs_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path, str(sweep_file(tmp_path)), "sweep.parallel=2", step=0.2)
    wait_for(lambda: len(running(tmp_path)) == 2, process)
    process.send_signal(number)
    printed, _ = process.communicate()
    assert process.returncode == 75 and running(tmp_path) == []
    assert "go on with: quartet sweep " in printed


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def size_of(folder: Path) -> int:
    """The bytes of the sweep's record."""
    return sum(path.stat().st_size for path in folder.glob("runs/*-search/sweep.jsonl"))


def grown(folder: Path, size: int) -> bool:
    return size_of(folder) > size


def killed_and_resumed(folder: Path, kills: int, *words: str) -> int:
    """Kill −9 the sweep at random instants and resume it; return how often. Nothing of it may be left running."""
    rng, done = random.Random(0), 0
    for number in range(kills):
        process = start(folder, "search.toml", *words, *(["--resume"] if number else []))
        wait_for(partial(grown, folder, size_of(folder) + 300), process)
        time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
        for _ in range(500):
            if not running(folder):
                break
            time.sleep(0.02)
        assert running(folder) == []
    carry_out(folder, "search.toml", *words, "--resume")
    return done


def comparable(sweep: Sweep) -> list[dict]:
    keys = ("event", "trial", "seed", "values", "state", "objective", "measures", "by", "reason")
    ended = [line for line in lines_of(sweep) if line["event"] in {"suggested", "ended"}]
    return [{key: line.get(key) for key in keys} for line in ended]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tpe", "grid"])
def test_a_sweep_of_12_trials_killed_twice_is_the_one_that_was_not(tmp_path, method):
    """The same trials in the same order with the same results, each step computed once, and no process left behind."""
    pytest.importorskip("optuna")
    words = []
    if method == "grid":
        words = ["sweep.keys.optim.lr=[1e-4, 1e-3, 1e-2, 0.1]", "sweep.seeds=1"]
    table = GRID if method == "grid" else SEARCH + "\n[sweep.prune]\nstartup = 4\nwarmup = 3\n"
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        sweep_file(tmp_path / name, table)
    carry_out(tmp_path / "alone", "search.toml", *words)
    assert killed_and_resumed(tmp_path / "killed", 2, *words) == 2
    alone, killed = (sweep_of(tmp_path / name) for name in ("alone", "killed"))
    assert comparable(killed) == comparable(alone) and len(killed.trials) == 12
    for steps in work(killed).values():
        assert steps == list(range(1, len(steps) + 1))


def test_runs_end_with_the_sweep_that_was_killed(tmp_path):
    """Left alone, they would go on for two minutes."""
    process = start(tmp_path, str(sweep_file(tmp_path)), "sweep.parallel=2", step=15.0)
    wait_for(lambda: len(list(tmp_path.glob("runs/*-search/*/events.jsonl"))) == 2, process)
    process.kill()
    process.communicate()
    for _ in range(500):
        if not running(tmp_path):
            break
        time.sleep(0.02)
    left = running(tmp_path)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []


def test_a_second_sweep_cannot_take_the_folder_while_a_run_is_going(tmp_path, monkeypatch):
    """The first one is killed; its run, which is frozen and cannot end, keeps the folder."""
    from quartet.sweeps import folder as sweep_folder

    process = start(tmp_path, str(sweep_file(tmp_path)), step=0.5)
    wait_for(lambda: running(tmp_path), process)
    [child] = running(tmp_path)
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.communicate()
    monkeypatch.setattr(sweep_folder, "PATIENCE", 0.2)
    waited = []
    try:
        with pytest.raises(sweep_folder.CannotSweep, match="a run of it is still going"):
            sweep_folder.SweepFolder(sweep_of(tmp_path).path, lambda: waited.append(True))
        assert waited == [True]
    finally:
        os.kill(child, signal.SIGCONT)
    while running(tmp_path):
        time.sleep(0.01)
    sweep_folder.SweepFolder(sweep_of(tmp_path).path).close()


def test_a_torn_last_line_is_passed_over_and_the_next_one_is_whole(tmp_path):
    from quartet.sweeps.folder import SweepFolder

    facts = {"objective": "gold", "direction": "maximize", "method": "grid", "keys": ["a"]}
    facts |= {"trials": 1, "seeds": [0]}
    folder = SweepFolder.create(tmp_path, "x", {}, facts)
    folder.event("suggested", trial=0, values={"a": 1})
    folder.close()
    record = folder.path / "sweep.jsonl"
    record.write_bytes(record.read_bytes() + b'{"event": "started", "tri')
    again = SweepFolder(folder.path)
    again.event("started", trial=0, seed=0)
    again.close()
    sweep = Sweep(folder.path)
    assert sweep.trials[0].state == "running"
    assert sweep.problems == ["sweep.jsonl: 1 line left out."]


def test_windows_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delattr(life.os, "killpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotSweep, match="needs Linux or macOS. On Windows, use WSL"):
        beginning_of(str(sweep_file(tmp_path))).open()
    assert not (tmp_path / "runs").exists()
