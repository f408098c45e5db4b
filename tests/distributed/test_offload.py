"""What rests in main memory is back when it is worked with, and nothing else changes."""

import json

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import Assembler, build
from quartet.config.toml import read_settings
from quartet.distributed.offload import NO_OFFLOAD, Offloading
from quartet.generation.native import NativeGenerator
from quartet.recipes import recipe_path
from tests.support import resting
from tests.support.tiny_run import SMALL, make_run
from tests.training.test_learner import learner as make_learner
from tests.training.test_learner import rollouts, weights

KINDS = {
    "ppo": ("reviews",),
    "frozen layers": (
        "reviews",
        "policy.frozen_layers=1",
        "policy.create.num_layers=2",
        "optim.ema=0.9",
    ),
    "the exact KL": ("reviews", 'algorithm.kl={type="in_loss", estimator="exact"}'),
    "no critic": ("sums",),
}
LONG = {
    "natural steps": ("reviews", 'recipe=["sft", "reward_model", "trpo"]', "algorithm.preset=trpo"),
    "adapters": ("reviews", 'policy.adapter={type="lora", rank=2}'),
    "rollouts meanwhile": ("reviews", "rollout.staleness=1"),
}


def numbers(run):
    lines = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["event"] == "metrics"]


@pytest.mark.parametrize(
    "kind",
    [
        "no critic",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "no critic"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG),
    ],
)
@pytest.mark.slow
def test_a_run_whose_models_rest_is_the_run(kind, tmp_path, monkeypatch):
    recipe, *words = (KINDS | LONG)[kind]
    stages = (
        'recipe=["sft", "reward_model", "ppo"]' if recipe == "reviews" else 'recipe=["sft", "grpo"]'
    )
    words = [stages, "run.steps=4", "run.checkpoint_every=2", *words]
    plain = numbers(make_run(tmp_path / "plain", recipe, *words))
    bed, rested = resting.made(monkeypatch.setattr), []
    generate = NativeGenerator.generate

    def generated(*args, **kwargs):
        rested.append(bed.bytes)
        return generate(*args, **kwargs)

    monkeypatch.setattr(NativeGenerator, "generate", generated)
    monkeypatch.setattr(Assembler, "placement", property(lambda self: Offloading(self.device)))
    assert numbers(make_run(tmp_path / "rests", recipe, *words)) == plain and plain
    assert max(rested) > 0, "while answers are sampled, something rests"


def test_moments_that_were_saved_rest_too(monkeypatch):
    algorithm, rows = ALGORITHMS["ppo"], rollouts()

    def learnt(placement, halfway=None):
        """Weights after two updates; between them, `halfway` makes another learner of the state."""
        made = make_learner(placement=placement)
        for step in range(2):
            made.update(algorithm.experience(made.score(rows, algorithm)), algorithm)
            if step == 0 and halfway is not None:
                made = halfway(made)
        return torch.cat([w.flatten() for w in weights(made)])

    def resumed(made):
        other = make_learner(placement=made.placement)
        other.load_state(made.state())
        moments = [o.moments(p)["exp_avg"] for o in other.optimizers.values() for p in o.parameters]
        assert moments and all((m >= resting.ABSURD).all() for m in moments)
        return other

    plain = learnt(NO_OFFLOAD)
    resting.made(monkeypatch.setattr)
    assert torch.equal(learnt(Offloading(torch.device("cpu")), resumed), plain)


def test_on_a_cpu_it_is_said_that_nothing_moves():
    asked = read_settings(
        recipe_path("sums"),
        [*SMALL, "policy.create.max_length=32", "run.offload=true", "run.device=cpu"],
    )
    assert any(
        note.startswith("run.offload = true moves nothing here")
        for note in build(asked.config).notes
    )


def test_on_a_cpu_nothing_moves():
    made = Offloading(torch.device("cpu"))
    weights = torch.nn.Linear(2, 2)
    before = weights.weight.data_ptr()
    made.register(weights)
    with made.on_device(weights, None, "whatever"), NO_OFFLOAD.on_device(weights):
        assert weights.weight.data_ptr() == before
