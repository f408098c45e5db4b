"""The mistakes that libraries make, each as one function that replaces one of the right library's, with the claim that has to
notice it."""

from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rl_conformance import Library, Pairs
from tests.conformance.reference import (
    Reference,
    clipped,
    grouped,
    mean_of_rows,
    mean_over,
    ratio,
    zero_outside,
)

RIGHT = Reference()
_MISTAKES: dict[str, tuple[str, Callable]] = {}


def noticed_by(*claims: str, operation: str | None = None):
    """Register a mistake: it replaces the operation of its function's name up to "__", and these claims have to notice it."""

    def register(function):
        for claim in claims:
            assert claim not in _MISTAKES, f"{claim} has two mistakes"
            _MISTAKES[claim] = (operation or function.__name__.partition("__")[0], function)
        return function

    return register


# --- log-probs and KL ---


@noticed_by("log-probs/value")
def token_logprobs__another_temperature(self, logits, ids):
    return RIGHT.token_logprobs(logits / 0.9, ids)


@noticed_by("log-probs/unlikely")
def token_logprobs__without_a_maximum(self, logits, ids):
    return (
        (logits.exp() / logits.exp().sum(-1, keepdim=True)).log().gather(-1, ids[..., None])[..., 0]
    )


@noticed_by("offset/log-probs")
def token_logprobs__maximum_not_added_back(self, logits, ids):
    return RIGHT.token_logprobs(logits, ids) + logits.max()


@noticed_by("kl/k1")
def k1__other_direction(self, logprobs, ref_logprobs):
    return ref_logprobs - logprobs


@noticed_by("kl/k2")
def k2__not_halved(self, logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).square()


@noticed_by("kl/k3")
def k3__other_direction(self, logprobs, ref_logprobs):
    return RIGHT.k3(ref_logprobs, logprobs)


@noticed_by("kl/k1-far", operation="k1")
def k1__cut(self, logprobs, ref_logprobs):
    return RIGHT.k1(logprobs, ref_logprobs).clamp(-10, 10)


@noticed_by("kl/k2-far", operation="k2")
def k2__cut(self, logprobs, ref_logprobs):
    return RIGHT.k2(logprobs, ref_logprobs).clamp(-10, 10)


@noticed_by("kl/k3-far", operation="k3")
def k3__cut(self, logprobs, ref_logprobs):
    return RIGHT.k3(logprobs, ref_logprobs).clamp(-10, 10)


@noticed_by("expectations/kl-loss-on-policy")
def kl_loss__k1(self, logprobs, old_logprobs, ref_logprobs):
    return RIGHT.k1(logprobs, ref_logprobs)


@noticed_by("expectations/kl-loss-off-policy")
def kl_loss__k2_without_ratio(self, logprobs, old_logprobs, ref_logprobs):
    return RIGHT.k2(logprobs, ref_logprobs)


@noticed_by("expectations/closed-form", operation="k1")
def k1__k3_in_the_reward(self, logprobs, ref_logprobs):
    return RIGHT.k3(logprobs, ref_logprobs)


# --- advantages ---


@noticed_by("advantages/gae")
def gae__bootstraps_after_the_end(self, rewards, values, mask, gamma, lam):
    advantages, returns = RIGHT.gae(rewards, values, mask, gamma, lam)
    return advantages + gamma * values * 0.1, returns


@noticed_by("advantages/gae-of-turns", operation="gae")
def gae__tool_tokens_are_states(self, rewards, values, mask, gamma, lam):
    until_the_end = mask.flip(1).cummax(1).values.flip(1)
    return RIGHT.gae(
        zero_outside(rewards, mask), zero_outside(values, mask), until_the_end, gamma, lam
    )


@noticed_by("rewards/kl-and-score")
def token_rewards__score_in_the_last_column(self, scores, logprobs, ref_logprobs, mask, beta):
    rewards = RIGHT.token_rewards(scores * 0, logprobs, ref_logprobs, mask, beta)
    rewards[:, -1] += scores
    return rewards


@noticed_by("advantages/returns")
def returns__without_discount(self, rewards, mask, gamma):
    return RIGHT.returns(rewards, mask, 1.0)


@noticed_by("advantages/whitening")
def whiten__by_the_sample(self, x, mask):
    own = x[mask]
    return torch.zeros_like(x).masked_scatter(mask, (own - own.mean()) / own.std())


@noticed_by("advantages/reinforce++")
def reinforce_pp__not_centred(self, rewards, mask, gamma):
    own = RIGHT.returns(rewards, mask, gamma)
    return own / own[mask].std(correction=0)


@noticed_by("advantages/grpo")
def grpo__by_the_population(self, scores, groups):
    count = grouped(groups).sum(1)
    return RIGHT.grpo(scores, groups) * (count / (count - 1).clamp(min=1)).sqrt()


@noticed_by("advantages/dr-grpo")
def dr_grpo__mean_of_the_batch(self, scores, groups):
    return scores - scores.mean()


@noticed_by("advantages/rloo")
def rloo__with_itself(self, scores, groups):
    return RIGHT.dr_grpo(scores, groups)


@noticed_by("expectations/rloo")
def rloo__best_of_group_only(self, scores, groups):
    return (scores == scores.max()).float()


@noticed_by("expectations/dr-grpo", operation="dr_grpo")
def dr_grpo__without_the_factor(self, scores, groups):
    return RIGHT.rloo(scores, groups)


@noticed_by("groups/equal-scores-grpo", operation="grpo")
def grpo__float32_noise_over_noise(self, scores, groups):
    own = scores - scores.sum() / torch.tensor(float(len(scores)))
    return (own + 1e-7) / (own.std() + 1e-9)


@noticed_by("groups/equal-scores-dr-grpo", "offset/dr-grpo", operation="dr_grpo")
def dr_grpo__mean_of_earlier_rows(self, scores, groups):
    earlier = torch.cat([scores.new_zeros(1), scores.cumsum(0)[:-1]])
    return scores - earlier / torch.arange(len(scores)).clamp(min=1)


@noticed_by("groups/equal-scores-rloo", "offset/rloo", operation="rloo")
def rloo__divided_by_n(self, scores, groups):
    same = grouped(groups).float()
    return scores - (same @ scores - scores) / same.sum(1)


@noticed_by("groups/of-one-grpo", operation="grpo")
def grpo__not_a_number_for_one(self, scores, groups):
    own = scores - scores.mean()
    return own / (own.square().sum() / (len(own) - 1)).sqrt()


@noticed_by("groups/of-one-rloo", operation="rloo")
def rloo__score_of_one(self, scores, groups):
    return scores if len(scores) == 1 else RIGHT.rloo(scores, groups)


@noticed_by("groups/small-scores", operation="grpo")
def grpo__large_epsilon(self, scores, groups):
    centred = RIGHT.dr_grpo(scores, groups)
    return centred / (centred / RIGHT.grpo(scores, groups) + 1e-4)


@noticed_by("offset/grpo", operation="grpo")
def grpo__not_centred(self, scores, groups):
    return scores / scores.std()


# --- losses ---


@noticed_by("losses/ppo")
def policy_loss__optimistic(self, logprobs, old_logprobs, advantages, mask, low, high):
    rho = ratio(logprobs, old_logprobs, mask)
    loss = -torch.maximum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)
    return mean_over(loss, mask)


@noticed_by("losses/clip-higher", operation="policy_loss")
def policy_loss__one_epsilon(self, logprobs, old_logprobs, advantages, mask, low, high):
    return RIGHT.policy_loss(logprobs, old_logprobs, advantages, mask, low, low)


@noticed_by("ratios/far-above-clipped", operation="policy_loss")
def policy_loss__infinite_ratio(self, logprobs, old_logprobs, advantages, mask, low, high):
    rho = (logprobs - old_logprobs).exp()
    return mean_over(clipped(rho, advantages, low, high), mask)


@noticed_by("ratios/far-above", operation="policy_loss")
def policy_loss__held(self, logprobs, old_logprobs, advantages, mask, low, high):
    return mean_over(
        clipped(ratio(logprobs, old_logprobs, mask, 20.0), advantages, low, high), mask
    )


@noticed_by("ratios/far-below", operation="policy_loss")
def policy_loss__not_clipped(self, logprobs, old_logprobs, advantages, mask, low, high):
    return mean_over(-ratio(logprobs, old_logprobs, mask) * advantages, mask)


@noticed_by("losses/dual-clip")
def dual_clip_loss__of_the_ratio_only(self, logprobs, old_logprobs, advantages, mask, cap):
    return RIGHT.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2, 0.2)


@noticed_by("losses/cispo")
def cispo_loss__with_the_gradient_of_the_weight(
    self, logprobs, old_logprobs, advantages, mask, cap
):
    weight = ratio(logprobs, old_logprobs, mask).clamp(max=cap)
    return mean_over(-weight * advantages * zero_outside(logprobs, mask), mask)


@noticed_by("losses/gspo")
def gspo_loss__product(self, logprobs, old_logprobs, advantages, mask, low, high):
    rho = zero_outside(logprobs - old_logprobs, mask).sum(1, keepdim=True).exp().expand(mask.shape)
    return mean_of_rows(clipped(rho, advantages, low, high), mask)


@noticed_by("losses/value")
def value_loss__not_halved(self, values, old_values, returns, mask, clip):
    return 2 * RIGHT.value_loss(values, old_values, returns, mask, clip)


@noticed_by("means/tokens")
def token_mean__with_padding(self, loss, mask):
    return (loss * mask).mean()


@noticed_by("means/responses")
def sequence_mean__of_sums(self, loss, mask):
    return zero_outside(loss, mask).sum() / len(loss)


@noticed_by("means/without-tokens", operation="sequence_mean")
def sequence_mean__counts_empty_rows(self, loss, mask):
    return (zero_outside(loss, mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


@noticed_by("means/fixed-length")
def fixed_length_mean__of_the_batch(self, loss, mask, length):
    return zero_outside(loss, mask).sum() / length


@noticed_by("cut/micro-batches")
def over_micro_batches__mean_of_means(self, losses, masks):
    return torch.stack([mean_over(*each) for each in zip(losses, masks, strict=True)]).mean()


@noticed_by("cut/ranks")
def over_ranks__summed(self, losses, masks):
    return 2 * RIGHT.over_ranks(losses, masks)


# --- comparisons ---


@noticed_by("pairs/dpo")
def dpo__without_reference(self, pairs, beta):
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected)).mean()


@noticed_by("pairs/cdpo")
def cdpo__other_way_round(self, pairs, beta, smoothing):
    return RIGHT.cdpo(pairs, beta, 1 - smoothing)


@noticed_by("pairs/ipo")
def ipo__target_without_half(self, pairs, beta):
    return RIGHT.ipo(pairs, beta / 2)


@noticed_by("pairs/kto")
def kto__without_kl(self, pairs, kl, beta):
    return RIGHT.kto(pairs, 0.0, beta)


@noticed_by("pairs/orpo")
def orpo__of_sums(self, pairs, weight):
    ones = torch.ones_like(pairs.chosen_tokens)
    return RIGHT.orpo(
        Pairs(**vars(pairs) | {"chosen_tokens": ones, "rejected_tokens": ones}), weight
    )


@noticed_by("pairs/simpo")
def simpo__margin_times_beta(self, pairs, beta, gamma):
    return RIGHT.simpo(pairs, beta, beta * gamma)


@noticed_by("pairs/bradley-terry")
def bradley_terry__overflows(self, chosen, rejected):
    return torch.log(1 + torch.exp(rejected - chosen)).mean()


@noticed_by("offset/bradley-terry", operation="bradley_terry")
def bradley_terry__centred(self, chosen, rejected):
    return RIGHT.bradley_terry(chosen, rejected) + 0.01 * (chosen + rejected).square().mean()


# --- padding and order: the same mistake in every function of [B T] ---


def change(result, function):
    """Apply a function to a tensor, or to each of a tuple."""
    return tuple(function(x) for x in result) if isinstance(result, tuple) else function(result)


def position_of_mask(arguments):
    return next(
        i
        for i, each in enumerate(arguments)
        if isinstance(each, Tensor) and each.dtype == torch.bool
    )


def reads_the_width(right, arguments):
    width = arguments[0].shape[1]
    return change(right(*arguments), lambda x: x * width / 4)


def pads_on_the_right(right, arguments):
    arguments, at = list(arguments), position_of_mask(arguments)
    mask = arguments[at]
    arguments[at] = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
    return right(*arguments)


def weighs_the_first_row(right, arguments):
    first = arguments[0] * torch.tensor([[2.0], [1.0]])
    return right(first, *arguments[1:])


def forgets_the_mask(right, arguments):
    arguments, at = list(arguments), position_of_mask(arguments)
    arguments[at] = torch.ones_like(arguments[at])
    return right(*arguments)


def multiplies_by_the_mask(right, arguments):
    mask = arguments[position_of_mask(arguments)]
    return change(right(*arguments), lambda x: x + (arguments[0] * mask).sum() * 0)


LAYOUT_MISTAKES = {
    "longer": reads_the_width,
    "left": pads_on_the_right,
    "order": weighs_the_first_row,
    "garbage": forgets_the_mask,
    "nan": multiplies_by_the_mask,
}


def mistake(claim: str) -> Library:
    """The right library with one operation wrong, which the claim has to notice."""
    family, _, rest = claim.partition("/")
    if family in LAYOUT_MISTAKES:
        operation, wrong = rest.replace("-", "_"), LAYOUT_MISTAKES[family]

        def function(self, *arguments):
            return wrong(getattr(RIGHT, operation), arguments)

    else:
        operation, function = _MISTAKES[claim]
    return type("Mistaken", (Reference,), {operation: function})()


WITH_MISTAKE = frozenset(_MISTAKES)


class CutK3(Reference):
    """A mistake that can be loaded by name, for the command and for reproductions."""

    name, version = "cut-k3", "2.0"
    k3 = k3__cut


class StatedCutK3(CutK3):
    """The same, by a library that states it."""

    states = MappingProxyType({"estimate cut at ±10": "its manual"})


class NoGradient(Reference):
    """A policy loss with another gradient, for reproductions with a gradient."""

    policy_loss = policy_loss__infinite_ratio
