import dataclasses
import itertools

import pytest
import torch

from quartet.algorithms.advantages import Gae
from quartet.algorithms.aggregation import TokenMean
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.baselines import GroupMean
from quartet.algorithms.correction import Masked, SequenceMasked, SequenceTruncated, Truncated
from quartet.algorithms.entropy import EntropyBonus, EntropyTarget
from quartet.algorithms.groups import DynamicSampling
from quartet.algorithms.imitation import PositiveExamples
from quartet.algorithms.kl import KL, KLInLoss, KLInReward, NoKL
from quartet.algorithms.policy_loss import (
    Cispo,
    Clip,
    DualClip,
    Gmpo,
    ImportanceWeighted,
    KLPenalty,
    PolicyLoss,
    Reinforce,
    Sapo,
    SequenceClip,
)
from quartet.algorithms.presets import ALGORITHMS
from quartet.algorithms.rewards import ClipScore, MeanOfTokens, RunningScale, ScoreShape
from quartet.algorithms.value_loss import ClippedValueLoss, ValueLoss
from quartet.errors import PartError
from tests.support.world import ragged_batch

POLICY_LOSSES = [
    Reinforce(),
    ImportanceWeighted(),
    KLPenalty(),
    Clip(),
    DualClip(),
    SequenceClip(),
    Cispo(),
    Sapo(),
    Gmpo(),
]
PENALTIES = [
    KLInLoss(estimator=estimator, weight=weight)
    for estimator, weight in [
        *itertools.product(("k1", "k2", "k3", "abs", "squared", "exact"), ("none",)),
        *itertools.product(("k1", "k3"), ("token", "sequence")),
        ("exact", "sequence"),
    ]
]
COMPOSED = {
    **ALGORITHMS,
    **{
        f"loss {p.type}": dataclasses.replace(ALGORITHMS["ppo"], policy_loss=p)
        for p in POLICY_LOSSES
    },
    **{
        f"kl {p.estimator} {p.weight}": dataclasses.replace(ALGORITHMS["grpo"], kl=p)
        for p in PENALTIES
    },
    "entropy target": dataclasses.replace(
        ALGORITHMS["ppo"], entropy=EntropyTarget(target=0.5, coef=0.1)
    ),
    "positives": dataclasses.replace(ALGORITHMS["grpo"], positives=PositiveExamples(coef=0.1)),
    **{
        f"correction {p.type}": dataclasses.replace(ALGORITHMS["ppo"], correction=p)
        for p in (Truncated(), SequenceTruncated(), Masked(), SequenceMasked())
    },
}
PRESETS = pytest.mark.parametrize("name", sorted(ALGORITHMS))
EVERYTHING = pytest.mark.parametrize("name", sorted(COMPOSED))


def batch(lengths=(4, 0, 13, 2), sampler_is_off=True):
    """Four responses of very different lengths, one of them empty, sampled by an engine that is not quite π_old."""
    made = ragged_batch(
        list(lengths), [1.0, -0.5, 0.3, 2.0][: len(lengths)], groups=[0, 0, 1, 1][: len(lengths)]
    )
    noise = 0.3 * torch.sin(torch.arange(made.old_logprobs.numel(), dtype=torch.float64)).view_as(
        made.old_logprobs
    )
    rollout = torch.where(made.response_mask, made.old_logprobs + noise, 0.0)
    return dataclasses.replace(made, rollout_logprobs=rollout) if sampler_is_off else made


def now_of(algorithm, logprobs, values):
    exact = logprobs.square() if algorithm.kl.exact_loss else None
    return Forward(logprobs=logprobs, entropy=logprobs.abs(), values=values, exact_kl=exact)


def total(terms):
    return sum(terms.values())


def total_loss(algorithm, experience, logprobs, values, denominators):
    return total(algorithm.loss(experience, now_of(algorithm, logprobs, values), denominators))


def later(experience):
    """Log-probs after some updates: ratios from 0.5 to 2, the same in every run."""
    rng = torch.Generator().manual_seed(7)
    shift = 0.7 * (
        2 * torch.rand(experience.old_logprobs.shape, generator=rng, dtype=torch.float64) - 1
    )
    return experience.old_logprobs + torch.where(experience.response_mask, shift, 0.0)


def test_token_rewards_are_penalty_plus_score():
    # r_t = −0.05 (log π_old − log π_ref), and the score on the last token
    made = ALGORITHMS["ppo"].experience(batch())
    expected = -0.05 * (batch().old_logprobs - batch().ref_logprobs)
    for row, (last, score) in enumerate(zip([4, 0, 13, 2], batch().scores, strict=True)):
        expected[row, last] += score
    torch.testing.assert_close(
        made.token_rewards, torch.where(batch().response_mask, expected, 0.0)
    )


def test_presets_ask_only_for_the_models_they_use():
    assert (
        ALGORITHMS["ppo"].needs_critic
        and ALGORITHMS["ppo"].needs_reference
        and not ALGORITHMS["ppo"].needs_group
    )
    assert ALGORITHMS["grpo"].needs_group and not ALGORITHMS["grpo"].needs_critic
    assert not dataclasses.replace(ALGORITHMS["ppo"], kl=NoKL()).needs_reference
    assert [name for name, a in ALGORITHMS.items() if a.needs_greedy] == ["remax"]
    for name, algorithm in ALGORITHMS.items():
        assert algorithm.needs_critic == algorithm.value_loss.trains_critic, name


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"advantage": Gae()}, "no value_loss trains it"),
        ({"advantage": GroupMean(), "value_loss": ClippedValueLoss()}, "never reads"),
        (
            {"advantage": Gae(), "value_loss": ClippedValueLoss(), "groups": DynamicSampling()},
            "drops groups of equal scores",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        Algorithm(kl=NoKL(), aggregation=TokenMean(), **parts)


class Mean(PolicyLoss):
    """A loss as in libraries whose trainers take a scalar."""

    internal = True

    def __call__(self, tokens):
        return -(tokens.ratio * tokens.advantages).mean()


class Detached(PolicyLoss):
    internal = True

    def __call__(self, tokens):
        return -tokens.ratio.detach() * tokens.advantages


class DetachedValue(ValueLoss):
    internal = True

    def __call__(self, values, old_values, returns):
        return (values.detach() - returns) ** 2


class Absent(KL):
    internal = True

    def reward(self, old_logprobs, ref_logprobs, exact):
        return None


class Summed(ScoreShape):
    internal = True

    def __call__(self, scores, batch):
        return scores.sum()


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"policy_loss": Mean()}, r"Mean: returned a Tensor of shape \[\], not a Tensor of shape"),
        ({"policy_loss": Detached()}, "Detached: its loss has no gradient"),
        ({"value_loss": DetachedValue()}, "DetachedValue: its loss has no gradient, so the critic"),
        ({"kl": Absent()}, "Absent: returned a NoneType, not a Tensor of shape"),
        ({"scores": (Summed(),)}, r"Summed: returned a Tensor of shape \[\], not .* \[4\]"),
    ],
)
def test_what_a_users_part_must_not_return_is_refused(parts, sentence):
    """A number would be broadcast over all tokens, and the run would learn something else."""
    algorithm = dataclasses.replace(ALGORITHMS["ppo"], **parts)
    with pytest.raises(PartError, match=sentence):
        made = algorithm.experience(batch())
        denominators = algorithm.denominators(made)
        values = made.values.clone().requires_grad_()
        total_loss(algorithm, made, later(made).requires_grad_(), values, denominators)


CLIPPED = [
    n
    for n, a in sorted(ALGORITHMS.items())
    if not isinstance(a.policy_loss, Reinforce | Cispo | Sapo)
]


@pytest.mark.parametrize("name", CLIPPED)
def test_on_the_first_visit_nothing_is_clipped_and_the_loss_is_minus_the_mean_advantage(name):
    algorithm = ALGORITHMS[name]
    made = algorithm.experience(batch(sampler_is_off=False))
    denominators = algorithm.denominators(made)
    terms = algorithm.loss(made, now_of(algorithm, made.old_logprobs, made.values), denominators)
    expected = algorithm.aggregation(-made.advantages, made.response_mask, denominators["policy"])
    torch.testing.assert_close(terms["policy"], expected)
    assert not algorithm.clipped(made, made.old_logprobs).any()


@PRESETS
def test_on_the_first_visit_every_policy_loss_has_reinforces_gradient(name):
    """−A ∇log π: the losses differ only once the policy has moved."""
    algorithm = ALGORITHMS[name]
    made = algorithm.experience(batch(sampler_is_off=False))
    logprobs = made.old_logprobs.clone().requires_grad_()
    terms = algorithm.loss(
        made, now_of(algorithm, logprobs, made.values), algorithm.denominators(made)
    )
    plain = algorithm.aggregation(
        -made.advantages * logprobs, made.response_mask, algorithm.denominators(made)["policy"]
    )
    gradient, expected = (torch.autograd.grad(x, logprobs)[0] for x in (terms["policy"], plain))
    if isinstance(
        algorithm.policy_loss, SequenceClip | Gmpo
    ):  # shared among the tokens of a response in other proportions
        gradient, expected = gradient.sum(dim=1), expected.sum(dim=1)
    torch.testing.assert_close(gradient, expected)


@EVERYTHING
@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[3, 1], [0, 2]], [[2], [0, 1, 3]]])
def test_micro_batches_of_any_split_sum_to_the_gradient_of_the_batch(name, cut):
    algorithm = COMPOSED[name]
    made = algorithm.experience(batch())
    denominators = algorithm.denominators(made)
    logprobs = later(made).requires_grad_()
    values = (made.values + 0.1).requires_grad_()
    whole = torch.autograd.grad(
        total_loss(algorithm, made, logprobs, values, denominators),
        [logprobs, values],
        allow_unused=True,
    )
    parts = [torch.zeros_like(logprobs), torch.zeros_like(values)]
    for rows in cut:
        part = made.rows(rows)
        width = part.tokens.shape[1]
        loss = total_loss(
            algorithm, part, logprobs[rows, :width], values[rows, :width], denominators
        )
        for sum_so_far, gradient in zip(
            parts, torch.autograd.grad(loss, [logprobs, values], allow_unused=True), strict=True
        ):
            sum_so_far.add_(0 if gradient is None else gradient)
    for expected, measured in zip(whole, parts, strict=True):
        torch.testing.assert_close(
            measured,
            torch.zeros_like(measured) if expected is None else expected,
            atol=1e-12,
            rtol=0,
        )


@EVERYTHING
def test_gradients_agree_with_central_differences_and_stay_inside_the_mask(name):
    algorithm = COMPOSED[name]
    if isinstance(algorithm.policy_loss, Cispo | SequenceClip):
        pytest.skip(
            "a stopped gradient is not the slope of its loss; it is compared with the paper's formula below"
        )
    made = algorithm.experience(batch())
    denominators = algorithm.denominators(made)
    start = [later(made), made.values + 0.05]
    variables = [x.clone().requires_grad_() for x in start]
    gradients = torch.autograd.grad(
        total_loss(algorithm, made, *variables, denominators), variables, allow_unused=True
    )
    step = 1e-6
    for which, gradient in enumerate(gradients):
        if gradient is None:
            continue
        assert (gradient[~made.response_mask] == 0).all()
        for row, column in made.response_mask.nonzero().tolist():
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in start]
                moved[which][row, column] += sign * step
                sides.append(total_loss(algorithm, made, *moved, denominators).item())
            assert gradient[row, column].item() == pytest.approx(
                (sides[0] - sides[1]) / (2 * step), abs=1e-6
            )


@EVERYTHING
def test_what_stands_behind_the_mask_changes_nothing(name):
    algorithm, clean = COMPOSED[name], batch()

    def poison(x):
        return torch.where(clean.response_mask, x, torch.nan)

    per_token = (
        "old_logprobs",
        "rollout_logprobs",
        "ref_logprobs",
        "values",
        "exact_kl",
        "entropy",
        "token_scores",
    )
    dirty = dataclasses.replace(
        clean, **{field: poison(getattr(clean, field)) for field in per_token}
    )
    expected, made = algorithm.experience(clean), algorithm.experience(dirty)
    torch.testing.assert_close(made.advantages, expected.advantages)
    torch.testing.assert_close(made.token_rewards, expected.token_rewards)
    denominators = algorithm.denominators(made)
    variables = [later(expected).requires_grad_(), (clean.values + 0.05).requires_grad_()]
    poisoned = total_loss(algorithm, made, *map(poison, variables), denominators)
    plain = total_loss(algorithm, expected, *variables, denominators)
    torch.testing.assert_close(poisoned, plain)
    for measured, gradient in zip(
        torch.autograd.grad(poisoned, variables, allow_unused=True),
        torch.autograd.grad(plain, variables, allow_unused=True),
        strict=True,
    ):
        assert (measured is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(measured, gradient)


@EVERYTHING
def test_repeating_the_batch_changes_nothing(name):
    algorithm, once = COMPOSED[name], batch()
    if name in {"moss_ppo_max", "trl_ppo", "trlx"}:
        pytest.skip("a sample's deviation (n − 1) knows how large the sample is")

    def twice(x):
        if x is None:
            return None
        return torch.cat([x, x]) if isinstance(x, torch.Tensor) else x + x

    double = dataclasses.replace(
        once, **{f.name: twice(getattr(once, f.name)) for f in dataclasses.fields(once)}
    )
    double = dataclasses.replace(double, groups=torch.cat([once.groups, once.groups + 10]))
    losses = []
    for made in (algorithm.experience(once), algorithm.experience(double)):
        logprobs = later(algorithm.experience(once))
        moved = logprobs if len(made) == len(logprobs) else torch.cat([logprobs, logprobs])
        losses.append(
            total_loss(algorithm, made, moved, made.values + 0.1, algorithm.denominators(made))
        )
    torch.testing.assert_close(losses[0], losses[1])


@PRESETS
def test_a_group_of_equals_leaves_the_policy_where_it_is(name):
    algorithm = ALGORITHMS[name]
    if not algorithm.needs_group:
        pytest.skip("it compares no groups")
    same = dataclasses.replace(
        batch((4, 1, 13, 2)), scores=torch.full((4,), 0.1, dtype=torch.float64)
    )
    made = dataclasses.replace(algorithm, kl=NoKL()).experience(
        dataclasses.replace(same, groups=torch.zeros(4, dtype=torch.long))
    )
    if not algorithm.scores:  # DAPO's punishment of length makes scores differ
        assert (made.advantages == 0).all()


def test_state_travels_with_the_record():
    algorithm = dataclasses.replace(
        ALGORITHMS["lm_human_preferences"],
        policy_loss=KLPenalty(beta=1.0, target=0.01),
        scores=(RunningScale(), ClipScore()),
    )
    metrics = {
        "kl": 60.0,
        "responses": 100.0,
        "policy/step_kl": 0.1,
        "reward": 2.0,
        "reward/std": 3.0,
    }
    after = algorithm.adapt(metrics)
    assert after.kl.coef == pytest.approx(0.15 * (1 + 0.2 * 100 / 10_000))
    assert after.policy_loss.beta == 2.0
    assert (after.scores[0].count, after.scores[0].mean, after.scores[0].squares) == (
        100,
        2,
        pytest.approx(900),
    )
    assert after.scores[1] is algorithm.scores[1]
    assert algorithm.kl.coef == 0.15
    assert ALGORITHMS["grpo"].adapt({"kl": 1.0, "responses": 1.0}) == ALGORITHMS["grpo"]


@pytest.mark.parametrize(
    ("kl", "beta"), [(0.016, 2.0), (0.0149, 1.0), (0.0067, 1.0), (0.0066, 0.5), (1e-15, 0.5)]
)
def test_the_ppo_penalty_doubles_and_halves_at_one_and_a_half(kl, beta):
    assert KLPenalty(beta=1.0, target=0.01).adapt({"policy/step_kl": kl}).beta == beta


def test_a_step_that_left_the_actor_alone_leaves_the_ppo_penalty_alone():
    assert KLPenalty(beta=1.0, target=0.01).adapt({"policy/kl_to_old": 1e-15}).beta == 1.0


@pytest.mark.parametrize(
    "parts",
    [
        {"scores": (ClipScore(), RunningScale())},
        {"scores": (RunningScale(),), "rewards": MeanOfTokens()},
    ],
)
def test_a_running_scale_that_would_follow_other_numbers_is_refused(parts):
    with pytest.raises(ValueError, match="Put it first"):
        dataclasses.replace(ALGORITHMS["ppo"], **parts)


def test_only_good_answers_are_imitated_and_only_their_tokens_counted():
    # scores 1, −0.5, 0.3, 2 with 4, 0, 13 and 2 tokens: above 0.5 are rows 0 and 3, six tokens
    algorithm = dataclasses.replace(
        ALGORITHMS["dapo"], positives=PositiveExamples(coef=0.1, threshold=0.5)
    )
    made = algorithm.experience(batch())
    assert algorithm.denominators(made)["positives"] == 6
    terms = algorithm.loss(
        made, now_of(algorithm, made.old_logprobs, None), algorithm.denominators(made)
    )
    expected = -0.1 * (made.old_logprobs[0].sum() + made.old_logprobs[3].sum()) / 6
    torch.testing.assert_close(terms["positives"], expected)


def test_kl_in_the_reward_reads_the_exact_kl_where_asked():
    algorithm = dataclasses.replace(ALGORITHMS["rloo"], kl=KLInReward(estimator="exact", coef=0.5))
    assert algorithm.kl.exact_reward and not algorithm.kl.exact_loss
    made = dataclasses.replace(batch(), scores=torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(
        algorithm.token_rewards(made), torch.where(made.response_mask, -0.5 * made.exact_kl, 0.0)
    )


def test_an_entropy_target_pulls_from_both_sides():
    entropy, rows = torch.tensor([[2.0, 1.0]]), torch.ones(1)
    assert EntropyTarget(target=1.0, coef=0.1)(entropy, 1.5 * rows).tolist() == [
        [pytest.approx(0.1), 0]
    ]
    assert EntropyTarget(target=3.0, coef=0.1)(entropy, 1.5 * rows).sum().item() == pytest.approx(
        0.1 * (1 + 2)
    )
    assert EntropyBonus(coef=0.1)(entropy, None).sum().item() == pytest.approx(-0.3)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo", "vapo"])
def test_truncated_responses_can_be_left_out_of_the_actor_s_loss(name):
    """They count in advantages and teach the critic; the actor learns from the others as if they were all."""
    plain = ALGORITHMS[name]
    masking = dataclasses.replace(plain, mask_truncated=True)
    rows = dataclasses.replace(batch(), ended=torch.tensor([True, True, False, True]))
    experience, all_rows = masking.experience(rows), plain.experience(rows)
    torch.testing.assert_close(experience.advantages, all_rows.advantages)
    logprobs = later(all_rows).requires_grad_()
    values = None if rows.values is None else rows.values + 0.1
    terms = masking.loss(
        experience, now_of(masking, logprobs, values), masking.denominators(experience)
    )
    kept = [0, 1, 3]
    others = all_rows.rows(kept)
    width = others.tokens.shape[1]
    alone = plain.loss(
        others,
        now_of(plain, logprobs[kept, :width], None if values is None else values[kept, :width]),
        plain.denominators(others),
    )
    everything = plain.loss(all_rows, now_of(plain, logprobs, values), plain.denominators(all_rows))
    for term, loss in terms.items():
        torch.testing.assert_close(loss, (everything if term == "value" else alone)[term])
    total(terms).backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[2] == 0).all() and (logprobs.grad[0] != 0).any()
