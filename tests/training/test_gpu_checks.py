"""The checks of `tests/test_gpu.py`, on a device that is only pretended: that they can be gone through, and what they find there."""

import pytest
import torch

from quartet.generation import slots
from tests.support import gpu_checks as checks
from tests.support.pretended_device import pretended
from tests.support.recorded_graph import graphs

SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in [*checks.KINDS, checks.IN_4_BITS][1:]
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [next(iter(checks.KINDS)), *SLOW])
def test_decoding_and_sampling(kind, monkeypatch):
    with pretended():
        model = checks.policy(kind, pretends=True)
        found = checks.decoded(model, steps=45)
        with monkeypatch.context() as patch, graphs(patch.setattr) as made:
            recorded = checks.decoded(model, steps=45)
        assert sum(graph.replays for graph in made) > 40 - len(made) * slots.WARM_UPS
        assert len(found) == 2 and checks.off(recorded, found) == 0
        mean, largest = checks.sampler_gap(model, num_prompts=2, tokens=6)
    assert 0 <= mean < 0.03 and largest < 0.5


@pytest.mark.parametrize("kind", [next(iter(checks.KINDS)), *SLOW[:-1]])
def test_gradients(kind):
    if kind == "experts" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 has no gradient of topk for the pretended device's tensors")
    with pretended():
        assert checks.gradient_cosine(kind, pretends=True) > 0.99


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_optimizers(optimizer):
    with pretended():
        assert checks.steps_apart(optimizer, pretends=True) < 0.05


def test_drawing():
    with pretended():
        share, apart = checks.share_drawn_alike(rows=8)
    assert share == 1 and apart < 0.005
