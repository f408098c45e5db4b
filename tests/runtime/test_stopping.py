"""A run that is told to stop in a call that would last ten minutes, or at any time of a step of one minute, ends, and goes on
to the same bits."""

import pytest

from quartet.runtime.interruption import REASONS
from tests.runtime.test_killing import killing
from tests.support.stopping import PHASES, STRETCHES

CHANGED = "the update, weights changed"
ILQL = [phase for phase in PHASES if "ILQL" in phase]
EVERY = [phase for phase in PHASES if phase not in {"merging", *ILQL}]
"""The phases of a run of PPO without an adapter."""


def outcomes(scenario: str, *phases: str) -> dict:
    return killing("phases", scenario, *phases, module="tests.support.stopping")


def check(found: dict) -> None:
    for phase, outcome in found.items():
        stopped = f"stopped by {REASONS[outcome.get('signal', 'SIGTERM')]}"
        assert outcome["code"] == 75 and stopped in outcome["said"], (phase, outcome)
        assert (outcome["resumed"], outcome["different"]) == (0, []), (phase, outcome)


@pytest.mark.slow
def test_a_step_is_given_up_before_its_weights_change_and_after():
    found = outcomes("grpo", "sampling", CHANGED)
    check(found)
    assert "Nothing is lost" in found["sampling"]["said"]
    assert "1 finished step after it will be taken again" in found[CHANGED]["said"]


@pytest.mark.slow
def test_a_step_of_ilql_is_given_up_before_its_weights_change_and_after():
    check(outcomes("ilql", *ILQL))


def at_instants(scenario: str, trials: int, seconds: int) -> dict:
    words = (scenario, str(trials), "1", str(seconds))
    return killing("instants", *words, module="tests.support.stopping")


@pytest.mark.slow
def test_at_a_random_instant_of_each_stretch_of_a_run():
    """Steps of six seconds: some are finished within the grace, some are given up."""
    check(at_instants("lora", len(STRETCHES), 6))


@pytest.mark.long
def test_in_every_phase():
    check(outcomes("ppo", *EVERY))


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["ppo", "lora"])
def test_at_random_instants_of_steps_that_last_a_minute(scenario):
    check(at_instants(scenario, 2 * len(STRETCHES), 60))


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["two", "sharded", "async", "lora"])
def test_with_several_ranks_with_rollouts_in_the_background_and_with_an_adapter(scenario):
    merging = ["merging"] if scenario == "lora" else []
    check(outcomes(scenario, "sampling", "the update", CHANGED, *merging))


@pytest.mark.long
def test_a_stop_takes_less_than_ten_seconds():
    """On a machine that does nothing else."""
    assert max(outcome["seconds"] for outcome in outcomes("ppo", *EVERY).values()) < 10
