"""Real kills: what is resumed afterwards is the run, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = (
    "before its first event",
    "while an older checkpoint goes",
    "between the last checkpoint and its event",
    "between done and the report",
)


def killing(*words: str, module: str = "tests.support.killing") -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_checkpoint_survives_a_kill_a_torn_write_and_a_full_disk_at_each_change_to_the_file_system():
    found = killing("mutations")
    assert found["wrong"] == []
    assert all(count >= 10 for count in found["changes"].values()) and len(found["changes"]) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_is_made_complete_when_it_goes_on():
    """Before its first event, while an older checkpoint goes, between a checkpoint and its event, between done and the report."""
    found = killing("moments", *MOMENTS)
    assert found["wrong"] == [] and found["kills"] == len(MOMENTS)


@pytest.mark.long
def test_a_run_killed_at_each_moment_at_which_something_is_incomplete_is_made_complete():
    """Nothing is left over, nothing is missing, and everything is equal to the run that was left alone."""
    found = killing("moments")
    assert found["wrong"] == []
    assert found["moments"] == 27 and found["kills"] == 31


@pytest.mark.slow
def test_a_run_killed_at_random_instants_is_the_run_that_was_not():
    found = killing("instants", "grpo", "3", "0")
    assert found["wrong"] == [] and found["kills"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ilql", "rounds", "adapted_rounds", "custom"])
def test_a_killed_run_of_ilql_of_two_rounds_of_labels_or_of_a_users_stage_is_one_that_was_not(
    scenario,
):
    found = killing("instants", scenario, "3", "0")
    assert found["wrong"] == [] and found["kills"] >= 2, "a run may end before its kill"


def without_room(*words: str, at_least: int) -> None:
    """Each case ends with one sentence and goes on, once there is room, to what the run left alone came to."""
    found = killing(*words)["cases"]
    if found is None:
        pytest.skip("no file system can be mounted here")
    for case in found:
        lines = case["said"].splitlines()
        assert case["then"] == 0 and case["different"] == [] and case["left_over"] == [], case
        if case["code"] == 0:
            assert lines == []
        elif case["code"] == 2:
            assert len(lines) == 1 and lines[0].startswith(
                'run.folder = "runs": cannot be written ('
            ), case
        else:
            assert case["code"] == 1 and len(lines) == 2 and lines[0].startswith("failed: "), case
            assert lines[1].startswith(
                "Make room on the disk, then go on with: quartet run runs/"
            ), case
    assert sum(case["code"] != 0 for case in found) >= at_least


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room():
    without_room("full", "0.1", "0.5", at_least=2)


@pytest.mark.long
def test_a_full_disk_at_many_moments():
    without_room("full", *(f"{percent / 100}" for percent in range(1, 100, 3)), at_least=25)


@pytest.mark.long
def test_a_limit_on_the_size_of_files():
    without_room("limited", "500", "3000", "8000", "20000", "50000", at_least=5)


@pytest.mark.long
def test_a_long_run_that_is_killed_again_and_again_loses_nothing_and_leaks_nothing():
    """Ten minutes here; an hour's figures are in docs/reliability.md."""
    found = killing("soak", "10", "0")
    assert found["each_once"] and found["exit"] == 75 and found["kills"] >= 3
    assert found["left_over"] == [] and found["processes"] == []
    assert found["growth"] < 0.01 and found["descriptors"][0] == found["descriptors"][1]


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["ppo", "shared", "lora", "grpo", "dpo"])
def test_twenty_runs_killed_at_random_instants(scenario):
    """Adaptive KL, several epochs and minibatches, shared and separate critics, adapters, no critic, comparisons made online."""
    found = killing("instants", scenario, "20", "1")
    assert found["wrong"] == [] and found["kills"] >= 20


@pytest.mark.long
@pytest.mark.parametrize(
    "scenario",
    [
        "two",
        "sharded",
        "rows",
        "online_sharded",
        "games_two",
        "async",
        "async_lora",
        "async_two",
        "async_sharded",
        "lora_sharded",
    ],
)
def test_twenty_runs_of_which_a_rank_is_killed_at_random_instants(scenario):
    found = killing("instants", scenario, "20", "1")
    assert found["wrong"] == [] and found["kills"] >= 20


@pytest.mark.long
def test_twenty_runs_of_which_a_rank_is_frozen():
    """It is named, and what is resumed afterwards is the run."""
    found = killing("frozen", "20", "1")
    assert found["wrong"] == [] and found["named"] == found["kills"] >= 15


@pytest.mark.long
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_twenty_runs_of_which_a_server_is_killed_at_random_instants(kind):
    """No rollout is lost or learnt from twice: weights and rollouts are those of a run whose servers lived."""
    found = killing("servers", kind, "20", "1")
    assert found["wrong"] == [] and found["kills"] >= 20


@pytest.mark.long
def test_a_run_whose_servers_are_killed_is_the_run_whose_servers_lived():
    found = killing("servers", "sglang", "1", "0")
    assert found["wrong"] == [] and found["kills"] >= 1
