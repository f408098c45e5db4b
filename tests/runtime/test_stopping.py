"""A run that is told to stop in a call that would last ten minutes ends, and goes on to the same bits."""

import pytest

from tests.runtime.test_killing import killing
from tests.support.stopping import PHASES

CHANGED = "the update, weights changed"


def outcomes(scenario: str, *phases: str) -> dict:
    return killing(scenario, *phases, module="tests.support.stopping")


def check(found: dict) -> None:
    for phase, outcome in found.items():
        assert outcome["code"] == 75 and "stopped by SIGTERM" in outcome["said"], (phase, outcome)
        assert (outcome["resumed"], outcome["different"]) == (0, []), (phase, outcome)


@pytest.mark.slow
def test_a_step_is_given_up_before_its_weights_change_and_after():
    found = outcomes("grpo", "sampling", CHANGED)
    check(found)
    assert "Nothing is lost" in found["sampling"]["said"]
    assert "1 finished step after it will be taken again" in found[CHANGED]["said"]


@pytest.mark.long
def test_in_every_phase():
    check(outcomes("ppo", *PHASES))


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["two", "sharded", "async", "lora"])
def test_with_several_ranks_with_rollouts_in_the_background_and_with_an_adapter(scenario):
    check(outcomes(scenario, "sampling", "the update", CHANGED))


@pytest.mark.long
def test_a_stop_takes_less_than_ten_seconds():
    """On a machine that does nothing else."""
    assert max(outcome["seconds"] for outcome in outcomes("ppo", *PHASES).values()) < 10
