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
