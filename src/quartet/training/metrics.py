"""Every metric, defined once: pure functions of what a step produced.

Names are paths; `runs/definitions.py` says what each metric is and how to read it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.kl import k1, k2, k3
from quartet.algorithms.masked import group_mean, masked, masked_mean
from quartet.algorithms.ratios import held_exp, token_ratio
from quartet.experience import Batch, Experience, Rollout
from quartet.tensors import Bool, Float, Tensor
from quartet.training.update import Update


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> float:
    """Return 1 − Var(returns − values) / Var(returns) over the tokens of the mask.

    It is 1 for a perfect critic, 0 for one that knows only the mean, and negative for one that is
    worse than that. Where the returns do not vary, but for rounding, it is 0.
    """
    v, r = values[mask].double(), returns[mask].double()
    variance = float(r.var(correction=0))
    rounding = 1e-12 * float(r.square().mean())
    return 1 - float((r - v).var(correction=0)) / variance if variance > rounding else 0.0


def repetition(ids: Sequence[int]) -> float:
    """Return the share of pairs of neighbouring tokens that occur earlier in the text: 0 for a text
    without repetition, nearly 1 for a loop."""
    pairs = Counter(pairwise(ids))
    total = sum(pairs.values())
    return 1 - len(pairs) / total if total else 0.0


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the metrics of responses that need no model. There is no "reward" where nothing is
    rewarded, as in distillation."""
    count = len(rollouts)
    is_rewarded = any(r.components or r.score for r in rollouts)
    metrics = {"reward": _mean([r.score for r in rollouts])} if is_rewarded else {}
    metrics |= {
        "response/tokens": sum(len(r.response_ids) for r in rollouts) / count,
        "response/ended": sum(r.finish_reason == "stop" for r in rollouts) / count,
        "response/repetition": sum(repetition(r.response_ids) for r in rollouts) / count,
    }
    if rollouts[0].policy_mask is not None:
        metrics["response/turns"] = sum(turns(r.policy_mask or ()) for r in rollouts) / count
    for name in rollouts[0].components:
        metrics[f"reward/{name}"] = _mean([r.components[name] for r in rollouts])
    return metrics | _logged_metrics(rollouts)


def _logged_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the metrics that reward functions logged: of each the mean over the responses that
    were scored in a call that logged it."""
    numbers: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.logged_metrics.items():
            numbers.setdefault(name, []).append(value)
    return {f"logged/{name}": math.fsum(each) / len(each) for name, each in numbers.items()}


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are not None; 0 where all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / max(len(numbers), 1)


def groups_without_signal(batch: Batch) -> float | None:
    """Return the share of prompts whose responses all got the same score; None where each prompt
    has one response."""
    by_group: dict[int, set[float]] = {}
    for group, score in zip(batch.groups.tolist(), batch.scores.tolist(), strict=True):
        by_group.setdefault(group, set()).add(score)
    if len(by_group) == len(batch.groups):
        return None
    return sum(len(scores) == 1 for scores in by_group.values()) / len(by_group)


def state_metrics(algorithm: Algorithm) -> dict[str, float]:
    """Return the adaptive coefficients that this step used."""
    metrics: dict[str, float] = {}
    for adaptive in (algorithm.kl, algorithm.policy_loss, *algorithm.scores):
        metrics |= adaptive.coefficients()
    return metrics


def rl_metrics(
    rollouts: Sequence[Rollout],
    unscored: float,
    batch: Batch,
    experience: Experience,
    update: Update,
    algorithm: Algorithm,
) -> dict[str, float]:
    """Return the metrics of one RL step. `unscored` is the share of responses that no reward could
    score and that were left out."""
    metrics = response_metrics(rollouts) | state_metrics(algorithm)
    metrics["responses"] = float(len(rollouts))
    if algorithm.num_continuations:
        metrics["continuations/tokens"] = float(sum(r.continuation_tokens for r in rollouts))
    metrics["reward/unscored"] = unscored
    metrics |= _reward_metrics(rollouts, batch)
    if algorithm.scores:
        metrics["reward/clipped"] = float(algorithm.clipped_scores(batch).double().mean())
    if batch.ref_logprobs is not None:
        metrics |= _kl_metrics(batch.old_logprobs, batch.ref_logprobs, batch.response_mask)
    metrics |= _value_metrics(experience)
    metrics["advantage/std"] = _std(experience.advantages, experience.response_mask)
    metrics["advantage/reward_correlation"] = earned_correlation(
        batch, experience, update, algorithm.needs_group
    )
    if experience.raw_advantages is not None:
        raw = experience.raw_advantages[experience.response_mask].double()
        metrics["advantage/raw_mean"] = float(raw.mean())
        metrics["advantage/raw_std"] = float(raw.std(correction=0))
    metrics |= _policy_metrics(batch, experience, update)
    metrics |= {f"loss/{name}": value for name, value in update.losses.items()}
    return metrics | update.step_stats


def _reward_metrics(rollouts: Sequence[Rollout], batch: Batch) -> dict[str, float]:
    lengths = [float(len(r.response_ids)) for r in rollouts]
    metrics = {
        "reward/length_correlation": correlation([r.score or 0.0 for r in rollouts], lengths),
        "response/most_common": most_common(rollouts),
        "response/distinct": distinct([r.response for r in rollouts]),
        "reward/std": float(batch.scores.double().std(correction=0)),
    }
    if (share := groups_without_signal(batch)) is not None:
        metrics["groups_without_signal"] = share
    return metrics


def _kl_metrics(
    old: Float[Tensor, "B T"], reference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> dict[str, float]:
    """Return KL(π_old ‖ π_ref) per response, and per token by each estimator."""
    metrics = {"kl": float(masked(k1(old, reference), mask).sum(dim=1).mean())}
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        metrics[f"kl/token_{name}"] = float(masked_mean(estimator(old, reference), mask))
    return metrics


def _value_metrics(experience: Experience) -> dict[str, float]:
    """Return the metrics of the critic and of the importance weights, where there are any."""
    metrics, mask = dict[str, float](), experience.response_mask
    values, returns = experience.values, experience.returns
    if values is not None and returns is not None:
        metrics["value/mean"] = float(masked_mean(values, mask))
        metrics["value/explained_variance"] = explained_variance(values, returns, mask)
        metrics["return/mean"] = float(masked_mean(returns, mask))
    if experience.weights is not None:
        metrics["correction/mean_weight"] = float(masked_mean(experience.weights, mask))
    return metrics


def _policy_metrics(batch: Batch, experience: Experience, update: Update) -> dict[str, float]:
    """Return how far the sampler, the old policy and the updated policy are from each other."""
    mask, metrics = batch.response_mask, dict[str, float]()
    metrics["sampler_mismatch"] = float(
        masked((batch.rollout_logprobs - batch.old_logprobs).abs(), mask).max()
    )
    metrics["sampler_ratio"] = sampler_ratio(batch)
    metrics["reference/moved"] = float(update.reference_moved)
    ratio = masked(token_ratio(update.logprobs, batch.old_logprobs), mask)
    metrics["ratio/max"] = float(ratio.max())
    metrics["ratio/min"] = float(ratio[mask].min())
    metrics["ratio/first_error"] = update.first_ratio_error
    metrics["policy/kl_to_old"] = float(masked_mean(k3(batch.old_logprobs, update.logprobs), mask))
    if update.step_kl is not None:
        metrics["policy/step_kl"] = update.step_kl
    metrics["policy/clip_fraction"] = update.clip_fraction
    positive = experience.advantages > 0
    metrics["policy/clip_high"] = float(masked_mean((update.clipped & positive).float(), mask))
    metrics["policy/clip_low"] = float(masked_mean((update.clipped & ~positive).float(), mask))
    if batch.entropy is not None:
        surprise = -batch.old_logprobs - batch.entropy
        metrics["policy/surprise_gap"] = float(masked_mean(surprise, mask))
    metrics["policy/entropy"] = float(masked_mean(update.entropy, mask))
    return metrics


def _std(numbers: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    return float(numbers[mask].double().std(correction=0))


def earned_correlation(
    batch: Batch, experience: Experience, update: Update, within_groups: bool
) -> float:
    """Return Pearson's r of Σ_t token rewards of a response and its mean advantage. Within groups,
    each sum is taken relative to the mean of its group."""
    earned = masked(experience.token_rewards, batch.response_mask).sum(dim=1)
    if within_groups:
        earned = earned - group_mean(earned, batch.groups)
    return correlation(earned.tolist(), update.row_advantages.tolist())


def sampler_ratio(batch: Batch) -> float:
    """Return the mean of exp |log π_sampler − log π| over response tokens: 1 where the sampler's
    probabilities are the learner's."""
    ratio = held_exp((batch.rollout_logprobs - batch.old_logprobs).abs())
    return float(masked_mean(ratio, batch.response_mask))


def with_staleness(
    metrics: Mapping[str, float],
    rollouts: Sequence[Rollout],
    batch: Batch,
    experience: Experience,
    version: int,
) -> dict[str, float]:
    """Return the metrics with those of staleness: the age, in updates, of the weights that sampled,
    and the share of tokens that the correction drops.

    `version` is the version of the policy when the update began. Older weights have other
    probabilities without a fault, so `sampler_ratio` is then reported as `staleness/ratio`.
    """
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


def turns(policy_mask: Sequence[bool]) -> int:
    """Return the number of turns: runs of tokens that the policy wrote."""
    return sum(own and not before for before, own in pairwise((False, *policy_mask)))


def most_common(rollouts: Sequence[Rollout]) -> float:
    """Return the share of prompts that got the most common response: 1 for a policy that answers
    everything alike."""
    prompts = Counter(response for response, _ in {(r.response, r.prompt.id) for r in rollouts})
    return max(prompts.values()) / len({r.prompt.id for r in rollouts})


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Pearson's r; 0 where one of the two does not vary."""
    pair = torch.tensor([x, y], dtype=torch.float64)
    pair = pair - pair.mean(dim=1, keepdim=True)
    scale = float(pair.norm(dim=1).prod())
    return float(pair[0] @ pair[1]) / scale if scale > 0 else 0.0


def distinct(texts: Sequence[str]) -> float:
    """Return the number of different texts divided by the number of texts."""
    return len(set(texts)) / len(texts)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% confidence interval (normal
    approximation)."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(x.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(x.mean()), half
