"""The doctor finds what is planted, in the run of a model of some thousand weights."""

import copy

import pytest

from quartet.algorithms.presets import ALGORITHMS
from quartet.data.sampler import Sampler
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.loops.collect import Collector
from quartet.loops.rl import rl
from quartet.models.actor_critic import Separate, freeze
from quartet.models.heads import ScalarModel
from quartet.rewards.functions import TextReward
from quartet.rewards.protocol import Weighted
from quartet.runs.doctor import Watch
from quartet.runtime.faults import FAULTS
from quartet.stages.rl import RLComponents
from quartet.training.learner import Learner
from quartet.training.optim import Optim
from tests.loops.test_loops import END, goodness
from tests.support.tiny_run import make_run
from tests.support.world import model, prompts, tokenizer

FOUND_BY = {
    None: set(),
    "temperature": {"sampler_disagrees"},
    "greedy": {"not_sampled_as_trained"},
    "eos": {"responses_do_not_end"},
    "shift": {"sampler_disagrees", "ratio_is_not_one"},
    "stale": {"sampler_disagrees"},
    "reference": {"reference_differs"},
    "leak": {"ratio_is_not_one"},
    "dropout": {"ratio_is_not_one"},
}
"""Those that six steps show. `sign` and `broadcast` spoil learning and nothing that a step can see: benchmarks/doctor.py."""
STEPS = 6


def spoken(fault, seed):
    """What the doctor says of a few steps of PPO."""
    actor = model(seed=seed)
    models = Separate(actor, ScalarModel.from_trunk(actor, 0, seed=0))
    sampling = Sampling(max_new_tokens=56)
    learner = Learner(
        models,
        freeze(copy.deepcopy(actor)),
        Optim(lr=3e-3, critic_lr=3e-3, epochs=2),
        sampling,
        STEPS,
        seed,
    )
    components = RLComponents(
        learner,
        NativeGenerator(actor, tokenizer(), frozenset({END}), seed),
        [Weighted(TextReward("goodness", goodness))],
    )
    if fault is not None:
        FAULTS[fault](components)
    steps = rl(
        Collector(Sampler(prompts(24), 24, seed), components.generator, components.rewards),
        learner,
        ALGORITHMS["ppo"],
    )
    watch = Watch()
    return {rule.__name__ for step in steps for rule, _ in watch.see(step.metrics)}


@pytest.mark.parametrize("fault", FOUND_BY)
@pytest.mark.slow
def test_what_is_planted_is_found(fault):
    said = spoken(fault, seed=0)
    assert FOUND_BY[fault] <= said
    if fault is None:
        assert said == set()


@pytest.mark.parametrize(
    "fault", ["stale", *(pytest.param(f, marks=pytest.mark.long) for f in (None, "temperature"))]
)
@pytest.mark.slow
def test_a_sampler_with_other_weights_is_found_among_older_ones(fault, tmp_path):
    """Rollouts in advance are never the learner's own; answers for the win rate are."""
    run = make_run(
        tmp_path, "reviews", "rollout.staleness=1", "run.steps=4", "optim.lr=3e-3", fault=fault
    )
    found = {w["rule"] for w in run.warnings if w["stage"] == "ppo"}
    assert ("sampler_disagrees" in found) == (fault is not None)


def test_every_fault_says_what_it_is():
    assert set(FOUND_BY) - {None} == set(FAULTS) - {"broadcast", "sign"}
    assert all(fault.__doc__ for fault in FAULTS.values())


@pytest.mark.slow
def test_a_run_that_is_asked_to_be_broken_is(tmp_path):
    run = make_run(
        tmp_path, "sums", "run.steps=1", "rollout.samples_per_prompt=4", fault="reference"
    )
    assert [w["rule"] for w in run.warnings if w["stage"] == "grpo"] == [
        "reference_differs",
        "reference_moved",
    ]
