"""Every metric, defined once: pure functions of what a step produced.

Names are paths; `definitions.py` says what each is and how to read it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.kl import k1, k2, k3
from quartet.algorithms.masked import group_mean, masked, masked_mean
from quartet.experience import Batch, Experience, Rollout
from quartet.tensors import Bool, Float, Tensor
from quartet.training.update import Update


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> float:
    """1 − Var(returns − values) / Var(returns): 1 for a perfect critic, 0 for one that knows the
    mean only, below 0 for one that is worse than none. 0 where the returns do not vary."""
    v, r = values[mask].double(), returns[mask].double()
    variance = float(r.var(correction=0))
    return 1 - float((r - v).var(correction=0)) / variance if variance > 0 else 0.0


def repetition(ids: Sequence[int]) -> float:
    """The share of pairs of neighbouring tokens that were there before: 0 for a text that says
    nothing twice, towards 1 for one that turns in circles."""
    pairs = Counter(pairwise(ids))
    total = sum(pairs.values())
    return 1 - len(pairs) / total if total else 0.0


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What can be said of answers without a model."""
    count = len(rollouts)
    metrics = {
        "reward": _mean([r.score for r in rollouts]),
        "response/tokens": sum(len(r.response_ids) for r in rollouts) / count,
        "response/ended": sum(r.finish_reason == "stop" for r in rollouts) / count,
        "response/repetition": sum(repetition(r.response_ids) for r in rollouts) / count,
    }
    if rollouts[0].written is not None:
        metrics["response/turns"] = sum(turns(r.written or ()) for r in rollouts) / count
    for name in rollouts[0].components:
        metrics[f"reward/{name}"] = _mean([r.components[name] for r in rollouts])
    return metrics


def _mean(values: Sequence[float | None]) -> float:
    """Of the numbers that there are; 0 where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / max(len(there), 1)


def groups_without_signal(batch: Batch) -> float:
    """The share of prompts whose answers all got the same score. 1 for groups of one."""
    by_group: dict[int, set[float]] = {}
    for group, score in zip(batch.groups.tolist(), batch.scores.tolist(), strict=True):
        by_group.setdefault(group, set()).add(score)
    return sum(len(scores) == 1 for scores in by_group.values()) / len(by_group)


def state_metrics(algorithm: Algorithm) -> dict[str, float]:
    """The coefficients that adapt, as this step used them."""
    metrics: dict[str, float] = {}
    for piece in (algorithm.kl, algorithm.policy_loss, *algorithm.scores):
        metrics |= piece.coefficients()
    return metrics


def rl_metrics(
    rollouts: Sequence[Rollout],
    unscored: float,
    batch: Batch,
    experience: Experience,
    update: Update,
    algorithm: Algorithm,
) -> dict[str, float]:
    """The numbers of one RL step. `unscored`: the share of responses that no reward could score,
    which were left out."""
    mask = batch.response_mask
    metrics = response_metrics(rollouts) | state_metrics(algorithm)
    metrics["responses"] = float(len(rollouts))
    metrics["reward/unscored"] = unscored
    lengths = [float(len(r.response_ids)) for r in rollouts]
    metrics["reward/length_correlation"] = correlation([r.score or 0.0 for r in rollouts], lengths)
    metrics["response/most_common"] = most_common(rollouts)
    metrics["response/distinct"] = distinct([r.response for r in rollouts])
    metrics["reward/std"] = float(batch.scores.double().std(correction=0))
    metrics["groups_without_signal"] = groups_without_signal(batch)
    if batch.ref_logprobs is not None:
        kl = masked(k1(batch.old_logprobs, batch.ref_logprobs), mask)
        metrics["kl"] = float(kl.sum(dim=1).mean())
        for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
            metrics[f"kl/token_{name}"] = float(
                masked_mean(estimator(batch.old_logprobs, batch.ref_logprobs), mask)
            )
    if experience.values is not None and experience.returns is not None:
        metrics["value/mean"] = float(masked_mean(experience.values, mask))
        metrics["value/explained_variance"] = explained_variance(
            experience.values, experience.returns, mask
        )
        metrics["return/mean"] = float(masked_mean(experience.returns, mask))
    if experience.weights is not None:
        metrics["correction/mean_weight"] = float(masked_mean(experience.weights, mask))
    metrics["advantage/std"] = float(experience.advantages[mask].double().std(correction=0))
    metrics["advantage/reward_correlation"] = earned_correlation(
        batch, experience, update, algorithm.needs_group
    )
    if experience.raw_advantages is not None:
        raw = experience.raw_advantages[mask].double()
        metrics["advantage/raw_mean"], metrics["advantage/raw_std"] = (
            float(raw.mean()),
            float(raw.std(correction=0)),
        )
    metrics["sampler_mismatch"] = float(
        masked((batch.rollout_logprobs - batch.old_logprobs).abs(), mask).max()
    )
    metrics["sampler_ratio"] = sampler_ratio(batch)
    metrics["reference/moved"] = float(update.reference_moved)
    ratio = masked((update.logprobs - batch.old_logprobs).clamp(-20, 20).exp(), mask)
    metrics["ratio/max"] = float(ratio.max())
    metrics["ratio/min"] = float(ratio[mask].min())
    metrics["ratio/first_error"] = update.first_ratio_error
    metrics["policy/kl_to_old"] = float(masked_mean(k3(batch.old_logprobs, update.logprobs), mask))
    if update.step_kl is not None:
        metrics["policy/step_kl"] = update.step_kl
    metrics["policy/clip_fraction"] = update.clip_fraction
    pushed_up = experience.advantages > 0
    metrics["policy/clip_high"] = float(masked_mean((update.clipped & pushed_up).float(), mask))
    metrics["policy/clip_low"] = float(masked_mean((update.clipped & ~pushed_up).float(), mask))
    if batch.entropy is not None:
        metrics["policy/surprise_gap"] = float(
            masked_mean(-batch.old_logprobs - batch.entropy, mask)
        )
    metrics["policy/entropy"] = float(masked_mean(update.entropy, mask))
    metrics |= {f"loss/{name}": value for name, value in update.losses.items()}
    return metrics | update.step_stats


def earned_correlation(
    batch: Batch, experience: Experience, update: Update, within_groups: bool
) -> float:
    """r of what a response earned, Σ_t of its token rewards, and the mean advantage that the update
    took for it."""
    earned = masked(experience.token_rewards, batch.response_mask).sum(dim=1)
    if within_groups:
        earned = earned - group_mean(earned, batch.groups)
    return correlation(earned.tolist(), update.row_advantages.tolist())


def sampler_ratio(batch: Batch) -> float:
    """How far the sampler's probabilities are from the learner's: mean of exp |log π_sampler − log
    π|."""
    apart = (batch.rollout_logprobs - batch.old_logprobs).abs().clamp(max=20).exp()
    return float(masked_mean(apart, batch.response_mask))


def with_staleness(
    metrics: Mapping[str, float],
    rollouts: Sequence[Rollout],
    batch: Batch,
    experience: Experience,
    version: int,
) -> dict[str, float]:
    """How old the weights were that sampled, in updates, and what the correction left out for it.
    Between the learner and older weights the sampler's ratio is no fault, and called otherwise.
    `version`: of the policy that the update began with."""
    ages = [version - v for r in rollouts for v in (r.versions or (r.policy_version,))]
    metrics = {
        **metrics,
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": float(max(ages)),
    }
    if max(ages) > 0:
        metrics["staleness/ratio"] = metrics.pop("sampler_ratio")
    if experience.weights is not None:
        metrics["staleness/thrown_away"] = float(
            masked_mean((experience.weights == 0).float(), batch.response_mask)
        )
    return metrics


def turns(written: Sequence[bool]) -> int:
    """How many times the policy spoke."""
    return sum(own and not before for before, own in pairwise((False, *written)))


def most_common(rollouts: Sequence[Rollout]) -> float:
    """The share of prompts to which the response that most of them share was given: 1 for a policy
    that says one thing to everything."""
    said = Counter(response for response, _ in {(r.response, r.prompt.id) for r in rollouts})
    return max(said.values()) / len({r.prompt.id for r in rollouts})


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; 0 where one of the two does not vary."""
    pair = torch.tensor([x, y], dtype=torch.float64)
    pair = pair - pair.mean(dim=1, keepdim=True)
    scale = float(pair.norm(dim=1).prod())
    return float(pair[0] @ pair[1]) / scale if scale > 0 else 0.0


def distinct(texts: Sequence[str]) -> float:
    """The share of texts that no other repeats."""
    return len(set(texts)) / len(texts)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % confidence interval (normal approximation)."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(x.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(x.mean()), half
