import copy
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.update import TrustRegion
from quartet.distributed.sharding import full_state_dict
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import freeze
from quartet.training.learner import Learner
from quartet.training.trust_region import TrustRegionLearner, _Objective, conjugate_gradient
from tests.support.world import model
from tests.training.test_learner import SETTINGS, actor_critic, rollouts

TRPO = ALGORITHMS["trpo"]


def learner(tokens=2048, **settings):
    reference = freeze(copy.deepcopy(model(seed=2)))
    optim = dataclasses.replace(SETTINGS, **settings)
    return TrustRegionLearner(
        actor_critic(),
        reference,
        optim,
        Sampling(max_new_tokens=8),
        steps=4,
        micro_batch_tokens=tokens,
    )


def experience_of(made, algorithm=TRPO):
    return algorithm.experience(made.score(rollouts(), algorithm))


def test_conjugate_gradients_solve_what_they_are_asked():
    assert conjugate_gradient(
        lambda v: torch.tensor([1.0, 4.0]) * v, torch.tensor([1.0, 4.0]), 2
    ).tolist() == pytest.approx([1, 1])
    root = torch.randn(20, 20, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(20), torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close(
        conjugate_gradient(lambda v: matrix @ v, b, 60), torch.linalg.solve(matrix, b)
    )


def test_the_fisher_product_is_the_expected_square_of_the_score():
    """vᵀFv = mean over tokens of E_a [(v · ∇log π(a))²], with π's own tokens a, worked out by nudging the weights along v."""
    made = learner()
    objective = _Objective(made, experience_of(made), TRPO)
    parameters = made.models.actor_parameters()
    vector = torch.randn(sum(p.numel() for p in parameters))
    with sdpa_kernel(SDPBackend.MATH):
        measured = float(vector @ objective.fisher_product(parameters, vector))
    start = torch.cat([p.detach().flatten() for p in parameters])

    def logprobs(scale):
        torch.nn.utils.vector_to_parameters(start + scale * vector, parameters)
        with torch.no_grad():
            found = torch.cat([objective._vocabulary_logprobs(rows) for rows in objective.rows])
        torch.nn.utils.vector_to_parameters(start, parameters)
        return found.double()

    slope = (logprobs(1e-3) - logprobs(-1e-3)) / 2e-3
    expected = float((logprobs(0.0).exp() * slope.square()).sum() / objective.num_tokens)
    assert measured == pytest.approx(expected, rel=0.02)


def test_trpo_improves_and_stays_within_its_region():
    made = learner()
    before = copy.deepcopy(made.models.actor)
    update = made.update(experience_of(made), TRPO)
    assert 0 < update.step_stats["trust_region/kl"] <= 0.01
    assert update.step_stats["trust_region/improvement"] > 0
    assert 0 < update.step_stats["trust_region/fraction"] <= 1
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before.parameters(), made.models.actor.parameters(), strict=True)
    )
    again = made.score(rollouts(), TRPO)
    torch.testing.assert_close(again.old_logprobs, update.logprobs, atol=1e-5, rtol=0)


def test_the_natural_gradient_takes_the_whole_step_and_lands_near_its_region():
    made = learner()
    npg = dataclasses.replace(
        ALGORITHMS["npg"], update=TrustRegion(max_kl=1e-4, damping=0.0, line_search_steps=0)
    )
    update = made.update(experience_of(made), npg)
    assert update.step_stats["trust_region/fraction"] == 1
    # √(2δ / xᵀFx) x is the step whose quadratic KL is δ; for a small δ the quadratic is the KL
    assert update.step_stats["trust_region/kl"] == pytest.approx(1e-4, rel=0.2)


def test_for_the_same_kl_the_natural_step_gains_more_than_the_gradients():
    """What the Fisher matrix is for: of all steps of this KL it is the one of most improvement, to first order."""
    made = learner()
    experience = experience_of(made)
    objective = _Objective(made, experience, TRPO)
    parameters = made.models.actor_parameters()
    with sdpa_kernel(SDPBackend.MATH):
        gradient = objective.gradient(parameters)
    start, before = torch.cat([p.detach().flatten() for p in parameters]), objective.loss()
    plain = 1e-3
    while True:  # the plain gradient's step of the same KL, from below
        torch.nn.utils.vector_to_parameters(start - plain * gradient, parameters)
        if objective.kl() > 1e-3:
            break
        plain *= 1.1
    gain_of_plain = before - objective.loss()
    torch.nn.utils.vector_to_parameters(start, parameters)
    npg = dataclasses.replace(
        ALGORITHMS["npg"], update=TrustRegion(max_kl=1e-3, damping=1e-3, line_search_steps=0)
    )
    update = made.update(experience, npg)
    assert update.step_stats["trust_region/improvement"] > 1.2 * gain_of_plain


def test_a_loss_of_the_region_does_not_run_the_critic(monkeypatch):
    """A line search takes it many times."""
    made = learner()
    objective = _Objective(made, experience_of(made), TRPO)
    monkeypatch.setattr(made.models.critic, "values", None)  # would fail if it were asked
    assert objective.gradient(made.models.actor_parameters()).norm() > 0
    assert objective.loss() == objective.loss()


def test_where_no_step_is_better_nothing_moves():
    made = learner()
    experience = experience_of(made)
    still = dataclasses.replace(experience, advantages=torch.zeros_like(experience.advantages))
    before = [p.clone() for p in made.models.actor_parameters()]
    update = made.update(still, TRPO)
    assert update.step_stats["trust_region/fraction"] == 0
    assert all(
        torch.equal(a, b) for a, b in zip(before, made.models.actor_parameters(), strict=True)
    )


def test_micro_batches_change_nothing():
    weights = []
    for tokens in (10_000, 20):
        made = learner(tokens=tokens)
        made.update(experience_of(made), TRPO)
        weights.append(torch.cat([p.detach().flatten() for p in made.models.actor_parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)


def averaged(made):
    return full_state_dict(made.models.actor, made.ema.average)["lm_head.weight"]


def test_an_average_of_the_actor_is_that_of_its_past():
    made = Learner(
        actor_critic(),
        freeze(model(seed=2)),
        dataclasses.replace(SETTINGS, ema=0.5, epochs=1, minibatches=1),
        Sampling(max_new_tokens=8),
        4,
    )
    first = made.models.actor.lm_head.weight.detach().clone()
    made.update(experience_of(made), ALGORITHMS["ppo"])
    second = made.models.actor.lm_head.weight.detach().clone()
    torch.testing.assert_close(averaged(made), (first + second) / 2)
    made.update(experience_of(made), ALGORITHMS["ppo"])
    third = made.models.actor.lm_head.weight.detach()
    torch.testing.assert_close(averaged(made), first / 4 + second / 4 + third / 2)


def test_the_average_follows_natural_steps_too():
    made = learner(ema=0.5)
    first = made.models.actor.lm_head.weight.detach().clone()
    made.update(experience_of(made), TRPO)
    moved = made.models.actor.lm_head.weight.detach()
    torch.testing.assert_close(averaged(made), (first + moved) / 2)
