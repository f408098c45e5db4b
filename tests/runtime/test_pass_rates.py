"""Runs that draw prompts by their pass rates."""

import signal

import pytest

from quartet.data.prompt_sampling import EveryPrompt
from quartet.runtime.resume import with_later_keys
from tests.launch.test_launch import assert_alike, done, metrics
from tests.runtime.test_resume import stopped
from tests.support.tiny_run import SMALL

WORDS = [
    "run",
    "sums",
    *SMALL,
    "policy.create.max_length=32",
    "recipe=['sft','grpo']",
    "data.sampling=pass_rate",
    "data.rows=16",
    "data.held_out_rows=64",
    "rollout.samples_per_prompt=2",
    "run.steps=12",
    "run.checkpoint_every=100",
]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_that_was_stopped_draws_the_prompts_of_one_that_was_not(
    tmp_path, staleness, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `done` has it: other threads, other bits
    words = [*WORDS, f"rollout.staleness={staleness}"]
    first = stopped(tmp_path, signal.SIGTERM, [*words, "run.name=x"])
    assert first.returncode == 75, first.stderr
    for more in (["run.name=x", "--resume"], ["run.name=whole"]):
        code, said = done(tmp_path, *words, *more)
        assert code == 0, said
    ours, whole = metrics(tmp_path, "x"), metrics(tmp_path, "whole")
    assert ours == whole
    # The tiny model solves nothing: once all 16 are seen, they are hard, and drawn seldom.
    last = ours["grpo", 12]
    assert last["prompts/hard"] >= 12 and last["prompts/unseen"] == 0


def test_a_checkpoint_of_an_older_version_drew_every_prompt():
    assert with_later_keys({})["data.sampling.type"] == EveryPrompt().type


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(tmp_path):
    for name, more in (("one", ()), ("two", ("launch.processes=2",))):
        code, said = done(tmp_path, *WORDS, "optim.lr=1e-9", f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "two"), metrics(tmp_path, "one"), 2e-5)
