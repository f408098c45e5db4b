"""Rollouts that are made in the background, where the update beside them is interrupted or fails."""

import json
import threading
import time

import pytest

from quartet.data.sampler import Sampler
from quartet.errors import NonFinite
from quartet.experience import Prompt, Rollout, rollout_from_row, rollout_to_row
from quartet.io.threads import map_concurrently
from quartet.loops.collect import Collector
from quartet.loops.rl_async import Ahead, rl_async
from quartet.rewards.protocol import Weighted
from quartet.runtime.interruption import Interrupted
from tests.loops.test_loops import END, NativeGenerator
from tests.support.world import prompts, tokenizer
from tests.training.test_guards import ALGORITHMS, learner

ALLOWED = 30.0
"""Seconds, where waiting for the rewards would take two minutes."""


class SlowReward:
    """Gives its scores after so many seconds from the second time on, which is in the background."""

    name = "slow"

    def __init__(self, seconds):
        self.seconds, self.calls, self.begun, self.ends = seconds, 0, threading.Event(), []

    def score(self, rollouts):
        self.calls += 1
        if self.calls > 1:
            self.begun.set()
            try:
                map_concurrently(lambda _: time.sleep(self.seconds), [0, 1], 2)
                self.ends.append("finished")
            except BaseException:
                self.ends.append("abandoned")
                raise
        return [1.0] * len(rollouts)


def step_with(reward, error):
    """A step whose update raises this while the next rollouts are being scored."""
    made = learner("none")
    made.sampler_agrees = True

    def update(*arguments, **named):
        assert reward.begun.wait(60)
        raise error

    made.update = update
    generator = NativeGenerator(made.models.actor, tokenizer(), frozenset({END}), 0)
    made.steps = 3
    collector = Collector(Sampler(prompts(4), 4, 0), generator, [Weighted(reward)], 2)
    steps = rl_async(collector, made, ALGORITHMS["grpo"], Ahead(1))
    next(steps)


def test_a_run_that_is_interrupted_does_not_wait_for_them():
    reward, began = SlowReward(120.0), time.monotonic()
    with pytest.raises(Interrupted):
        step_with(reward, Interrupted("SIGTERM"))
    assert time.monotonic() - began < ALLOWED and reward.ends == ["abandoned"]


def test_after_a_failure_they_are_finished_before_a_rollback_samples_again():
    reward = SlowReward(0.5)
    with pytest.raises(NonFinite):
        step_with(reward, NonFinite("the loss"))
    assert reward.ends == ["finished"]


def test_a_rollout_of_an_older_checkpoint_has_its_policy_mask_by_the_old_name():
    rollout = Rollout(
        id="p/0",
        prompt=Prompt("p", (1, 2), "x"),
        group=0,
        response_ids=(3, 4),
        response="yz",
        logprobs=(-1.0, -2.0),
        finish_reason="stop",
        policy_version=0,
        policy_mask=(True, False),
    )
    row = json.loads(json.dumps(rollout_to_row(rollout)))
    assert rollout_from_row(row) == rollout
    row["written"] = row.pop("policy_mask")
    assert rollout_from_row(row) == rollout
