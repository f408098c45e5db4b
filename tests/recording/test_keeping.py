import pytest

from quartet.config.run import RunConfig
from quartet.recording.run_folder import Keeping
from tests.support.tiny_run import make_run


def kept(every, steps, **metrics):
    keep = Keeping(every)
    return [s for s in range(1, steps + 1) if keep(s, {name: f(s) for name, f in metrics.items()})]


@pytest.mark.parametrize(("steps", "every"), [(40, 1), (1000, 1), (1001, 2), (20_000, 20)])
def test_short_runs_keep_all_and_long_ones_a_thousand(steps, every):
    assert RunConfig(steps=steps).keep_every == every
    assert RunConfig(steps=steps, rollouts_every=7).keep_every == 7


def test_extremes_are_kept_between():
    odd = {33: 9.0, 35: 5.0, 36: -1.0}
    assert kept(10, 50, kl=lambda s: odd.get(s, 1.0)) == [1, 11, 21, 31, 33, 36, 41]


def test_what_only_grows_is_no_extreme():
    assert kept(10, 60, kl=float) == [1, 11, 21, 31, 41, 51]


@pytest.mark.slow
def test_a_run_keeps_what_it_was_asked_to(tmp_path):
    run = make_run(
        tmp_path, "sums", "run.steps=3", "run.rollouts_every=2", "rollout.samples_per_prompt=4"
    )
    assert run.steps() == [1, 3]
