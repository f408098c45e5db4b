import dataclasses

import pytest
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.aggregation import TokenMean
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.entropy import EntropyBonus
from quartet.algorithms.kl import NoKL
from quartet.algorithms.presets import ALGORITHMS
from tests.world import ragged_batch

PRESETS = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def batch():
    return ragged_batch([4, 1, 7, 2], [1.0, -0.5, 0.3, 2.0], groups=[0, 0, 1, 1])


def forward_of(logprobs, values):
    return Forward(logprobs=logprobs, entropy=logprobs.abs(), values=values)


def total_loss(algorithm, experience, logprobs, values, denominator):
    return sum(algorithm.loss(experience, forward_of(logprobs, values), denominator).values())


def test_token_rewards_are_penalty_plus_score():
    # r_t = −0.05 (log π_old − log π_ref), and the score on the last token
    made = ALGORITHMS["ppo"].experience(batch())
    expected = -0.05 * (batch().old_logprobs - batch().ref_logprobs)
    for row, (last, score) in enumerate(zip([4, 1, 7, 2], batch().scores, strict=True)):
        expected[row, last] += score
    torch.testing.assert_close(made.token_rewards, torch.where(batch().response_mask, expected, 0.0))


def test_presets_ask_only_for_the_models_they_use():
    assert ALGORITHMS["ppo"].needs_critic and ALGORITHMS["ppo"].needs_reference and not ALGORITHMS["ppo"].needs_group
    assert ALGORITHMS["grpo"].needs_group and not ALGORITHMS["grpo"].needs_critic
    assert not dataclasses.replace(ALGORITHMS["ppo"], kl=NoKL()).needs_reference


def test_a_critic_that_nobody_trains_is_refused():
    with pytest.raises(ValueError, match="nobody trains it"):
        Algorithm(advantage=Gae(), kl=NoKL(), aggregation=TokenMean())


@PRESETS
def test_on_the_first_visit_nothing_is_clipped_and_the_loss_is_minus_the_mean_advantage(name):
    algorithm = ALGORITHMS[name]
    made = algorithm.experience(batch())
    terms = algorithm.loss(
        made, forward_of(made.old_logprobs, made.values), algorithm.aggregation.denominator(made.response_mask)
    )
    expected = algorithm.aggregation(
        -made.advantages, made.response_mask, algorithm.aggregation.denominator(made.response_mask)
    )
    torch.testing.assert_close(terms["policy"], expected)
    assert not algorithm.policy_loss.clipped(made.old_logprobs, made.old_logprobs, made.advantages).any()


@PRESETS
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2], [0, 1, 3]]])
def test_micro_batches_of_any_split_sum_to_the_gradient_of_the_batch(name, cut):
    algorithm = dataclasses.replace(ALGORITHMS[name], entropy=EntropyBonus(coef=0.01))
    made = algorithm.experience(batch())
    denominator = algorithm.aggregation.denominator(made.response_mask)
    logprobs = (made.old_logprobs + 0.1).requires_grad_()
    values = (made.values + 0.1).requires_grad_()
    whole = torch.autograd.grad(
        total_loss(algorithm, made, logprobs, values, denominator), [logprobs, values], allow_unused=True
    )
    parts = [torch.zeros_like(logprobs), torch.zeros_like(values)]
    for rows in cut:
        part = made.rows(rows)
        width = part.tokens.shape[1]
        loss = total_loss(algorithm, part, logprobs[rows, :width], values[rows, :width], denominator)
        for total, gradient in zip(parts, torch.autograd.grad(loss, [logprobs, values], allow_unused=True), strict=True):
            total.add_(0 if gradient is None else gradient)
    for expected, measured in zip(whole, parts, strict=True):
        torch.testing.assert_close(measured, torch.zeros_like(measured) if expected is None else expected, atol=1e-12, rtol=0)


@PRESETS
def test_gradients_agree_with_central_differences_and_stay_inside_the_mask(name):
    algorithm = dataclasses.replace(ALGORITHMS[name], entropy=EntropyBonus(coef=0.01))
    made = algorithm.experience(batch())
    denominator = algorithm.aggregation.denominator(made.response_mask)
    logprobs = (made.old_logprobs + 0.05 * torch.randn_like(made.old_logprobs)).requires_grad_()
    loss = total_loss(algorithm, made, logprobs, made.values, denominator)
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert (gradient[~made.response_mask] == 0).all()
    step = 1e-6
    for row, column in made.response_mask.nonzero().tolist():
        nudge = torch.zeros_like(logprobs)
        nudge[row, column] = step
        up, down = (total_loss(algorithm, made, (logprobs + s * nudge).detach(), made.values, denominator) for s in (1, -1))
        assert gradient[row, column].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-6)


@PRESETS
def test_what_stands_behind_the_mask_changes_nothing(name):
    algorithm, clean = ALGORITHMS[name], batch()

    def poison(x):
        return torch.where(clean.response_mask, x, torch.nan)

    dirty = dataclasses.replace(
        clean, old_logprobs=poison(clean.old_logprobs), ref_logprobs=poison(clean.ref_logprobs), values=poison(clean.values)
    )
    expected, made = algorithm.experience(clean), algorithm.experience(dirty)
    torch.testing.assert_close(made.advantages, expected.advantages)
    torch.testing.assert_close(made.token_rewards, expected.token_rewards)
    denominator = algorithm.aggregation.denominator(made.response_mask)
    loss = total_loss(algorithm, made, poison(clean.old_logprobs), poison(clean.values), denominator)
    torch.testing.assert_close(loss, total_loss(algorithm, expected, clean.old_logprobs, clean.values, denominator))


@PRESETS
def test_repeating_the_batch_changes_nothing(name):
    algorithm, once = ALGORITHMS[name], batch()

    def twice(x):
        return torch.cat([x, x]) if isinstance(x, torch.Tensor) else x + x

    double = dataclasses.replace(once, **{f.name: twice(getattr(once, f.name)) for f in dataclasses.fields(once)})
    double = dataclasses.replace(double, groups=torch.cat([once.groups, once.groups + 10]))
    losses = []
    for made in (algorithm.experience(once), algorithm.experience(double)):
        denominator = algorithm.aggregation.denominator(made.response_mask)
        losses.append(total_loss(algorithm, made, made.old_logprobs + 0.1, made.values + 0.1, denominator))
    torch.testing.assert_close(losses[0], losses[1])
