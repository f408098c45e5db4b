"""Every claim holds for a right library, and is noticed to fail for a wrong one."""

import math

import pytest
import torch

from rl_conformance import CLAIMS, Library, NotOffered, judge, judge_all
from rl_conformance.library import OPERATIONS
from tests.conformance.mistakes import (
    LAYOUT_MISTAKES,
    RIGHT,
    WITH_MISTAKE,
    StatedCutK3,
    mistake,
)

BY_NAME = {claim.name: claim for claim in CLAIMS}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_right_library_passes(name):
    verdict = judge(BY_NAME[name], RIGHT, "")
    assert verdict.outcome == "holds", verdict


@pytest.mark.parametrize("name", BY_NAME)
def test_a_planted_mistake_is_noticed(name):
    verdict = judge(BY_NAME[name], mistake(name), "")
    assert verdict.outcome == "fails", verdict
    assert verdict.reproduction


def test_each_claim_has_a_name_and_a_mistake_of_its_own():
    assert len(BY_NAME) == len(CLAIMS)
    of_layouts = {name for name in BY_NAME if name.partition("/")[0] in LAYOUT_MISTAKES}
    assert set(BY_NAME) - of_layouts == WITH_MISTAKE


def test_every_operation_is_claimed_about():
    assert {need for claim in CLAIMS for need in claim.needs} == set(OPERATIONS)


def test_what_is_not_offered_is_no_failure():
    class Nothing(Library):
        pass

    class OneSided(type(RIGHT)):
        def policy_loss(self, logprobs, old_logprobs, advantages, mask, low, high):
            if low != high:
                raise NotOffered
            return RIGHT.policy_loss(logprobs, old_logprobs, advantages, mask, low, high)

    assert {each.outcome for each in judge_all(CLAIMS, Nothing(), "")} == {"not offered"}
    assert judge(BY_NAME["losses/clip-higher"], OneSided(), "").outcome == "not offered"
    assert judge(BY_NAME["losses/ppo"], OneSided(), "").outcome == "holds"


def test_a_convention_excuses_only_where_the_library_states_it():
    claim = BY_NAME["kl/k3-far"]
    stated, unstated = judge(claim, StatedCutK3(), ""), judge(claim, mistake("kl/k3-far"), "")
    assert (stated.outcome, stated.detail) == ("convention", "estimate cut at ±10 (its manual)")
    assert (unstated.outcome, unstated.detail) == (
        "fails",
        "agrees with: estimate cut at ±10; not stated",
    )
    assert stated.error == unstated.error == 1.0  # the gradient is 0 in place of 1 − e⁵


def test_an_exception_is_reported_and_is_no_verdict_on_numbers():
    class Broken(type(RIGHT)):
        def whiten(self, x, mask):
            raise ZeroDivisionError("one token")

    verdict = judge(BY_NAME["advantages/whitening"], Broken(), "")
    assert (verdict.outcome, verdict.detail) == ("raises", "ZeroDivisionError: one token")


def test_a_result_of_another_shape_fails():
    class Other(type(RIGHT)):
        def dr_grpo(self, scores, groups):
            return torch.zeros(3)

    assert judge(BY_NAME["advantages/dr-grpo"], Other(), "").error == math.inf
