"""A small run with a checkpoint at each step, for whoever breaks a copy of it."""

import pytest

from tests.support.tiny_run import make_run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    words = (
        "run.steps=2",
        "run.checkpoint_every=1",
        "rollout.samples_per_prompt=2",
        'recipe=["sft", "grpo"]',
    )
    return make_run(tmp_path_factory.mktemp("small"), "sums", *words).path
