"""Sweeps whose runs are Ray actors: with a stand-in for Ray, and with Ray itself where it is installed."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from quartet import files
from quartet.config.toml import ConfigError
from quartet.sweeps import life
from quartet.sweeps.folder import CannotSweep
from quartet.sweeps.life import beginning_of
from quartet.sweeps.on_ray import LOST, RayRun, RunActor
from tests.support import fake_ray
from tests.sweeps.test_conduct import (
    GRID,
    carry_out,
    comparable,
    running,
    start,
    sweep_file,
    sweep_of,
    wait_for,
    work,
)

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="the package ray is not installed")


@pytest.fixture
def ray(monkeypatch):
    fake = fake_ray.install(monkeypatch)
    monkeypatch.setattr(life.importlib.util, "find_spec", lambda _: True)
    return fake


@pytest.fixture
def here(ray, here):
    """Carry out a sweep where Ray is the stand-in; return its results."""
    return lambda *words, table=GRID, **more: here(table, *words, **more)


def in_order(sweep):
    """What the sweep recorded of each trial, whichever of two runs at once ended first."""
    return sorted(comparable(sweep), key=str)


def test_a_sweep_on_ray_is_the_sweep_in_processes(here, ray):
    apart = here("sweep.parallel=2")
    on_actors = here("sweep.parallel=2", "sweep.ray={cpus = 3, gpus = 0.5}")
    assert in_order(on_actors) == in_order(apart) and on_actors.status == "done"
    assert sorted(work(on_actors).values()) == [list(range(1, 9))] * 12
    assert ray.started == [{"num_cpus": 3, "num_gpus": 0.5, "max_concurrency": 2}] * 12
    assert len(ray.killed) == 12 and not ray.is_up, "each actor gives back its room"
    assert ray.given["_node_ip_address"] == "127.0.0.1"


def test_a_finding_of_the_doctor_stops_a_run_of_an_actor(here):
    table = (
        'objective = "gold"\nstop_on = ["entropy_collapse"]\n[sweep.keys]\noptim.lr = [0.1, 0.6]\n'
    )
    sweep = here("sweep.ray={}", table=table, step=0.1)
    states = [run.state for trial in sweep.trials.values() for run in trial.runs.values()]
    assert states == ["done", "pruned"]
    assert len(max(work(sweep).values(), key=len)) == 8 > len(min(work(sweep).values(), key=len))


def test_where_runs_are_may_change_when_a_sweep_goes_on(here):
    here("sweep.seeds=1")
    assert here("sweep.seeds=1", "sweep.ray={}", resume=True).status == "done"


def test_a_run_whose_actor_is_gone_has_failed_and_says_so(tmp_path, ray):
    class Gone(RunActor):
        def run(self, *_):
            raise RuntimeError("The actor died.\nIts node is gone.")

    actor = ray.remote()(Gone).remote()
    run = RayRun(actor, actor.run.remote(), tmp_path / "log")
    assert run.wait(5.0) == LOST == run.poll() and ray.killed == [actor]
    assert (tmp_path / "log").read_text() == "its Ray actor failed: Its node is gone.\n"


PRINT = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], *sys.argv[1:])"


def test_a_host_runs_a_command_in_a_folder_and_appends_what_it_prints(tmp_path):
    output = tmp_path / "log"
    output.write_text("before\n")
    assert RunActor().run(["-c", PRINT, "a b"], str(tmp_path), str(output), 3) == 0
    assert output.read_text() == f"before\n{tmp_path} 3 a b\n"
    assert RunActor().run(["-c", "raise SystemExit(7)"], str(tmp_path), str(output), 1) == 7


def test_a_host_waits_for_a_run_that_was_left_behind(tmp_path):
    """A child that outlives its host has the file of output, and the lock with it."""
    output = tmp_path / "log"
    with output.open("ab") as held:
        assert files.try_lock(held)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], stdout=held)
    began = time.monotonic()
    assert RunActor().run(["-c", "pass"], str(tmp_path), str(output), 1) == 0
    assert child.poll() == 0 and time.monotonic() > began


def test_a_host_that_is_told_to_stop_ends_its_run_or_does_not_begin_it(tmp_path):
    host, codes = RunActor(), []
    slow = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    thread = threading.Thread(
        target=lambda: codes.append(host.run(["-c", slow], str(tmp_path), str(tmp_path / "log"), 1))
    )
    thread.start()
    while not (tmp_path / "log").is_file() or "up" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    host.stop()
    thread.join()
    assert codes == [75]
    late = RunActor()
    late.stop()
    assert late.run(["-c", "open('began', 'w')"], str(tmp_path), str(tmp_path / "log"), 1) == LOST
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sweep.ray={cpus = 0}", "sweep.ray.cpus"),
        ("sweep.ray={cpu = 1}", "sweep.ray.cpu: no such key. Did you mean cpus?"),
        ("sweep.ray=true", "sweep.ray"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, words, sentence):
    with pytest.raises(ConfigError) as caught:
        beginning_of(str(sweep_file(tmp_path)), [words])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_cluster_that_is_not_there_and_a_package_that_is_missing_are_said(
    tmp_path, ray, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    asked = beginning_of(str(sweep_file(tmp_path)), ["sweep.ray={address = 'nowhere:1'}"])
    with pytest.raises(CannotSweep, match=r'address = "nowhere:1": Ray cannot be reached'):
        asked.open()
    monkeypatch.setattr(life.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CannotSweep, match=r"sweep.ray needs the package ray: pip install"):
        asked.open()


@needs_ray
@pytest.mark.slow
def test_with_ray_itself_a_sweep_is_the_sweep_in_processes(tmp_path):
    for name, words in (("apart", []), ("ray", ["sweep.ray={}"])):
        (tmp_path / name).mkdir()
        sweep_file(tmp_path / name)
        carry_out(tmp_path / name, "search.toml", "sweep.parallel=2", "sweep.seeds=1", *words)
    ours, apart = (sweep_of(tmp_path / name) for name in ("ray", "apart"))
    assert in_order(ours) == in_order(apart) and len(ours.trials) == 6


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "kill"])
def test_with_ray_itself_runs_end_with_the_sweep_and_it_goes_on(tmp_path, number):
    sweep_file(tmp_path)
    words = ("search.toml", "sweep.ray={}", "sweep.seeds=1")
    process = start(tmp_path, *words, step=0.3)
    wait_for(lambda: running(tmp_path), process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    for _ in range(1500):
        if not (left := running(tmp_path)):
            break
        time.sleep(0.02)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert left == []
    carry_out(tmp_path, *words, "--resume")
    assert sweep_of(tmp_path).status == "done"
    assert all(steps == list(range(1, 9)) for steps in work(sweep_of(tmp_path)).values())
