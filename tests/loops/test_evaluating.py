"""Evaluation while a stage trains: when, which weights are kept, and when it ends."""

import pytest
import torch

from quartet.loops.held_out import Evaluating, HeldOut
from quartet.loops.progress import Progress

STEPS = 7
LOSSES = {2: 0.5, 4: 0.3, 6: 0.4, 7: 0.35}


def training(config, evaluations, state=None, done=0):
    """A weight that is the number of its step, and what evaluating it found, by step."""
    weight = torch.full((2,), float(done))

    def evaluate():
        found = evaluations[int(weight[0])]
        return {"loss": found} if isinstance(found, float) else found

    held_out = HeldOut(config, STEPS, [weight], evaluate)
    if state is not None:
        held_out.load_state(state)

    def steps():
        for number in range(done + 1, STEPS + 1):
            weight.fill_(number)
            yield Progress(number, {"loss": 1.0})

    return weight, held_out, held_out.during(steps())


def test_nothing_is_evaluated_unless_it_is_asked_for():
    weight, held_out, steps = training(Evaluating(), {})
    assert [p.metrics for p in steps] == [{"loss": 1.0}] * STEPS
    held_out.restore_best()
    assert weight.tolist() == [7, 7] and held_out.summary() == {}


def test_every_so_many_steps_are_evaluated_and_the_last():
    _, _, steps = training(Evaluating(every=2), LOSSES)
    found = {p.number: p.metrics["held_out/loss"] for p in steps if "held_out/loss" in p.metrics}
    assert found == LOSSES


def test_the_best_weights_come_back():
    weight, held_out, steps = training(Evaluating(every=2, keep_best=True), LOSSES)
    assert not any(p.is_last for p in steps)
    held_out.restore_best()
    assert weight.tolist() == [4, 4] and held_out.summary() == {"best_step": 4}


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 7), (3, 7)])
def test_a_stage_ends_after_evaluations_without_improvement(patience, last):
    _, held_out, steps = training(Evaluating(every=2, patience=patience), LOSSES)
    seen = list(steps)
    assert seen[-1].number == last and seen[-1].is_last == (last < STEPS)
    assert held_out.summary() == ({"stopped_at": 6} if last < STEPS else {})


def test_accuracy_counts_before_loss():
    evaluations = {
        2: {"loss": 0.1, "accuracy": 0.5},
        4: {"loss": 0.9, "accuracy": 0.75},
        6: {"loss": 0.8, "accuracy": 0.75},
        7: {"loss": 0.8, "accuracy": 0.75},
    }
    _, held_out, steps = training(Evaluating(every=2, keep_best=True), evaluations)
    metrics = [p.metrics for p in steps]
    assert metrics[3] == {"loss": 1.0, "held_out/loss": 0.9, "held_out/accuracy": 0.75}
    assert held_out.best_step == 6, "the first of two that are equal"


@pytest.mark.parametrize("done", [2, 3, 4, 5, 6])
def test_a_stage_goes_on_with_the_best_so_far(done):
    config = Evaluating(every=2, keep_best=True, patience=2)
    _, held_out, steps = training(config, LOSSES)
    while next(steps).number < done:
        pass
    weight, again, rest = training(config, LOSSES, held_out.state(), done)
    assert [p.number for p in rest] == list(range(done + 1, STEPS + 1))
    again.restore_best()
    assert weight.tolist() == [4, 4] and again.summary() == {"best_step": 4}


def test_a_stage_that_has_ended_takes_no_further_step():
    config = Evaluating(every=2, patience=1)
    _, held_out, steps = training(config, LOSSES)
    assert [p.number for p in steps][-1] == 6
    assert list(training(config, LOSSES, held_out.state(), 6)[2]) == []
    more = Evaluating(every=2, patience=2)
    assert [p.number for p in training(more, LOSSES, held_out.state(), 6)[2]] == [7]


@pytest.mark.parametrize(
    "wrong",
    [{"best": [torch.zeros(2)] * 2}, {"best": [torch.zeros(3)]}, {"num_worse": -1}],
)
def test_a_state_of_other_parameters_is_refused(wrong):
    _, held_out, steps = training(Evaluating(every=2, keep_best=True), LOSSES)
    list(steps)
    with pytest.raises((ValueError, RuntimeError)):
        training(Evaluating(every=2), LOSSES, held_out.state() | wrong)
