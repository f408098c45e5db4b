"""A library that is right, written with tensors and without the plain loops."""

from types import MappingProxyType

import torch
from torch.nn.functional import logsigmoid

from rl_conformance import Library


def zero_outside(x, mask):
    return torch.where(mask, x, torch.zeros_like(x))


def grouped(groups):
    """[B B] true where two rows are of one group."""
    return groups[:, None] == groups[None]


def ratio(logprobs, old, mask, limit=80.0):
    return zero_outside(logprobs - old, mask).clamp(-limit, limit).exp()


def clipped(rho, advantages, low, high):
    return -torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)


def mean_over(loss, mask):
    return zero_outside(loss, mask).sum() / mask.sum()


def mean_of_rows(loss, mask):
    of_rows = zero_outside(loss, mask).sum(1) / mask.sum(1).clamp(min=1)
    return of_rows.sum() / mask.any(1).sum()


class Reference(Library):
    name = "reference"
    version = "1"
    states = MappingProxyType({})

    def token_logprobs(self, logits, ids):
        return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    def k1(self, logprobs, ref_logprobs):
        return logprobs - ref_logprobs

    def k2(self, logprobs, ref_logprobs):
        return (logprobs - ref_logprobs).square() / 2

    def k3(self, logprobs, ref_logprobs):
        d = ref_logprobs - logprobs
        return d.expm1() - d

    def kl_loss(self, logprobs, old_logprobs, ref_logprobs):
        return (logprobs - old_logprobs).exp() * self.k3(logprobs, ref_logprobs)

    def gae(self, rewards, values, mask, gamma, lam):
        advantages = torch.zeros_like(rewards)
        for row, own in enumerate(mask):
            r, v = rewards[row, own], values[row, own]
            delta = r + gamma * torch.cat([v[1:], v.new_zeros(1)]) - v
            n = torch.arange(len(r))
            powers = (gamma * lam) ** (n[None] - n[:, None]).float()
            advantages[row, own] = (powers.triu() * delta).sum(1)
        return advantages, zero_outside(advantages + values, mask)

    def token_rewards(self, scores, logprobs, ref_logprobs, mask, beta):
        last = mask.flip(1).cumsum(1).eq(1).flip(1) & mask
        return zero_outside(-beta * (logprobs - ref_logprobs) + last * scores[:, None], mask)

    def returns(self, rewards, mask, gamma):
        return self.gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]

    def whiten(self, x, mask):
        own = x[mask]
        return torch.zeros_like(x).masked_scatter(mask, (own - own.mean()) / own.std(correction=0))

    def grpo(self, scores, groups):
        same, own = grouped(groups), self.dr_grpo(scores, groups).double()
        count = same.sum(1)
        deviation = ((same * own.square()).sum(1) / (count - 1).clamp(min=1)).sqrt()
        alike = (scores[None] == scores[:, None]).logical_or(~same).all(1)
        return torch.where(alike, 0.0, own / deviation).float()

    def dr_grpo(self, scores, groups):
        same = grouped(groups).double()
        mean = (same @ scores.double()) / same.sum(1)
        return (scores - mean).float()

    def rloo(self, scores, groups):
        count = grouped(groups).sum(1)
        return self.dr_grpo(scores, groups) * count / (count - 1).clamp(min=1)

    def reinforce_pp(self, rewards, mask, gamma):
        return self.whiten(self.returns(rewards, mask, gamma), mask)

    def policy_loss(self, logprobs, old_logprobs, advantages, mask, low, high):
        return mean_over(clipped(ratio(logprobs, old_logprobs, mask), advantages, low, high), mask)

    def dual_clip_loss(self, logprobs, old_logprobs, advantages, mask, cap):
        loss = clipped(ratio(logprobs, old_logprobs, mask), advantages, 0.2, 0.2)
        capped = torch.minimum(loss, -cap * advantages)
        return mean_over(torch.where(advantages < 0, capped, loss), mask)

    def cispo_loss(self, logprobs, old_logprobs, advantages, mask, cap):
        weight = ratio(logprobs, old_logprobs, mask).clamp(max=cap).detach()
        return mean_over(-weight * advantages * zero_outside(logprobs, mask), mask)

    def gspo_loss(self, logprobs, old_logprobs, advantages, mask, low, high):
        log_ratios = zero_outside(logprobs - old_logprobs, mask)
        rho = (log_ratios.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp().expand(mask.shape)
        return mean_of_rows(clipped(rho, advantages, low, high), mask)

    def value_loss(self, values, old_values, returns, mask, clip):
        values, old = zero_outside(values, mask), zero_outside(old_values, mask)
        near = torch.clamp(values, old - clip, old + clip)
        return mean_over(torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2, mask)

    def token_mean(self, loss, mask):
        return mean_over(loss, mask)

    def sequence_mean(self, loss, mask):
        return mean_of_rows(loss, mask)

    def fixed_length_mean(self, loss, mask, length):
        return zero_outside(loss, mask).sum() / (len(loss) * length)

    def over_micro_batches(self, losses, masks):
        return mean_over(torch.cat(losses), torch.cat(masks))

    def over_ranks(self, losses, masks):
        return mean_over(torch.cat(losses), torch.cat(masks))

    def dpo(self, pairs, beta):
        return self.cdpo(pairs, beta, 0.0)

    def cdpo(self, pairs, beta, smoothing):
        h = beta * ((pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected))
        return (-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h)).mean()

    def ipo(self, pairs, beta):
        difference = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
        return (difference - 1 / (2 * beta)).square().mean()

    def kto(self, pairs, kl, beta):
        good = 1 - torch.sigmoid(beta * (pairs.chosen - pairs.ref_chosen - kl))
        bad = 1 - torch.sigmoid(beta * (kl - pairs.rejected + pairs.ref_rejected))
        return torch.cat([good, bad]).mean()

    def orpo(self, pairs, weight):
        p, q = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        odds = (p - q) - torch.log(torch.expm1(p) / torch.expm1(q))
        return (-p - weight * logsigmoid(odds)).mean()

    def simpo(self, pairs, beta, gamma):
        p, q = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        return -logsigmoid(beta * (p - q) - gamma).mean()

    def bradley_terry(self, chosen, rejected):
        return -logsigmoid(chosen - rejected).mean()
