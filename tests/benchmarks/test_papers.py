"""The scripts of benchmarks/papers at toy size, and what their numbers rest on."""

import argparse
import json

import pytest
import torch

from tests.benchmarks.conftest import FOLDER


@pytest.fixture(autouse=True)
def _papers_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))


def every_response(length):
    import kl_off_policy

    tokens = torch.cartesian_prod(*[torch.arange(kl_off_policy.V)] * length)
    states = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), tokens[:, :-1]], dim=1)
    return kl_off_policy.Sample(states, tokens)


def test_the_kl_of_whole_responses_is_that_of_an_enumeration():
    import kl_off_policy

    world, every = kl_off_policy.make_world(0), every_response(3)
    ref, start = every.logprobs(world.reference).sum(1), every.logprobs(world.start).sum(1)
    found = kl_off_policy.sequence_kl(world.start, world.reference, 3)
    torch.testing.assert_close((start.exp() * (start - ref)).sum(), found)
    after = kl_off_policy.values_to_go(world.start, world.reference, 3)[0, 0]
    torch.testing.assert_close(after, -found)


@pytest.mark.parametrize("name", ["loss k1, sequence", "loss k3, sequence", "loss exact, sequence"])
def test_the_gradients_of_single_responses_have_the_true_expectation(name):
    import kl_off_policy

    world, every = kl_off_policy.make_world(1), every_response(3)
    now = world.policy(40).requires_grad_()
    [true] = torch.autograd.grad(kl_off_policy.sequence_kl(now, world.reference, 3), now)
    batch = kl_off_policy.make_batch(world, every, 20)
    algorithm = kl_off_policy.placements()[name]
    each = kl_off_policy.row_gradients(algorithm, batch, every, world, now.detach())
    weights = every.logprobs(world.start).sum(1).exp()
    torch.testing.assert_close((weights[:, None, None] * each).sum(0), true)


def test_samples_come_from_the_policy():
    import kl_off_policy

    world = kl_off_policy.make_world(2)
    sample = kl_off_policy.Sample.draw(world.start, 20_000, 2, seed=0)
    share = torch.bincount(sample.tokens[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(share.double(), world.start.softmax(-1)[0], atol=0.01, rtol=0)
    assert (sample.states[:, 1] == sample.tokens[:, 0]).all()


def test_kl_off_policy_at_toy_size(tmp_path, monkeypatch):
    import kl_off_policy
    import paper

    monkeypatch.setattr(kl_off_policy, "STALENESS", (0, 8))
    monkeypatch.setattr(kl_off_policy, "EPOCHS", (1, 4))
    monkeypatch.setattr(kl_off_policy, "SHOWN_AGES", ((0, 1), (8, 4)))
    options = argparse.Namespace(seeds=1, results=tmp_path / "kl.json", redraw=False)
    seeds = paper.over_seeds(
        lambda seed: kl_off_policy.one_seed(seed, 64, (3,), 3), options, responses=64
    )
    written = json.loads(options.results.read_text())
    assert written["settings"] == {"responses": 64} and written["results"] == seeds
    options.redraw = True
    assert paper.over_seeds(lambda seed: pytest.fail("measured again"), options) == seeds
    text = kl_off_policy.tables(seeds)
    assert all(f"| {name} |" in text for name in kl_off_policy.placements())
    pytest.importorskip("plotly")
    titles = [a.text for a in kl_off_policy.figure(seeds).layout.annotations]
    assert "staleness 4, by length T" in titles


def test_a_mean_of_seeds_has_the_interval_of_students_t():
    """Mean 0.2, deviation 0.1 of three: 0.2 ± 4.303 · 0.1 / √3 = 0.2 ± 0.248."""
    import paper

    assert paper.interval([0.1, 0.2, 0.3]) == "0.20 (−0.05 to 0.45)"
    assert paper.interval([-0.1]) == "−0.10"


def test_a_run_is_found_by_its_whole_name(tmp_path):
    """Neither a run whose name ends in this one's nor one that has not ended is it."""
    import paper

    class Run:
        folder = tmp_path / "1130-0533-rm-64"

        def finish(self):
            self.folder.mkdir()
            (self.folder / "report.html").touch()

    for name in ("1130-0531-x-rm-64", "1130-0532-rm-64"):
        (tmp_path / name).mkdir()
    (tmp_path / "1130-0531-x-rm-64" / "report.html").touch()
    assert paper.finished(tmp_path, "rm-64", Run) == Run.folder
    assert paper.finished(tmp_path, "rm-64", lambda: pytest.fail("again")) == Run.folder
