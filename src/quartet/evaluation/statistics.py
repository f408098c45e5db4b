"""Intervals, paired tests and corrections of an evaluation. Imports no torch.

All intervals are of 95%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z = 1.959963984540054
"""The normal distribution's quantile at 97.5%."""
EXACT = 1000
"""Up to so many wins and losses the sign test is exact."""
RIDGE = 0.01
"""The penalty of the length's coefficient, RIDGE / 2 · φ²: without it a judge that only likes
length would have an infinite one."""
RESAMPLES = 5000
"""The resamples of the bootstrap. The shares of 2.5% at its ends have a standard error of
0.2%."""
BLOCK = 1 << 20
"""The most numbers that are drawn at once."""
NORMAL = NormalDist()


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% confidence interval, whose ends are None where one row alone says
    nothing of the spread."""

    value: float
    low: float | None
    high: float | None


def wilson(share: float, n: int) -> Estimate:
    """Return a share of n trials with Wilson's interval (Wilson 1927).

        centre = (p + z² / 2n) / (1 + z² / n)
        half   = z / (1 + z² / n) · √(p (1 − p) / n + z² / 4n²)

    A share in which ties count a half is less spread than p (1 − p) says, so its interval is
    rather too wide.

    >>> eight = wilson(0.8, 10)
    >>> round(eight.low, 3), round(eight.high, 3)
    (0.49, 0.943)
    """
    scale = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with the interval of the normal approximation, mean ± z · s / √n. One value
    has no interval."""
    value = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(value, None, None)
    variance = math.fsum((v - value) ** 2 for v in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return Estimate(value, value - half, value + half)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of n values with the BCa interval of the bootstrap (Efron 1987): for the
    differences of two policies on the same prompts, the paired bootstrap over prompts.

    n values are drawn with replacement, `RESAMPLES` times. The interval's ends are the quantiles of
    the means at the levels of `bca_levels`, with z₀ = Φ⁻¹(share of the means below the values'
    mean, equal ones counted a half) and a = Σ (v − v̄)³ / (6 (Σ (v − v̄)²)^1.5), the jackknife's
    acceleration. The same values and seed give the same interval. One value has no interval, and
    values that are all equal one without width.
    """
    value, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return Estimate(value, None, None)
    deviations = np.array(values, dtype=np.float64) - value
    noise = 1e-12 * max(abs(each) for each in values)
    if float(np.abs(deviations).max()) <= noise:
        return Estimate(value, value, value)
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // n)
    means = np.concatenate(
        [
            deviations[rng.integers(n, size=(min(rows, RESAMPLES - start), n))].mean(axis=1)
            for start in range(0, RESAMPLES, rows)
        ]
    )
    below = float(np.mean(means < -noise) + np.mean(np.abs(means) <= noise) / 2)
    bias = NORMAL.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    squares = float(np.sum(deviations**2))
    low, high = np.quantile(
        means, bca_levels(bias, float(np.sum(deviations**3)) / 6 / squares**1.5)
    )
    return Estimate(value, value + float(low), value + float(high))


def bca_levels(bias: float, acceleration: float) -> tuple[float, float]:
    """Return the levels of the quantiles that are the ends of a BCa interval (Efron 1987, section
    2), where z is −1.96 or 1.96:

        Φ(z₀ + (z₀ + z) / (1 − a (z₀ + z)))

    Without bias and acceleration they are those of the percentile interval.

    >>> [round(level, 4) for level in bca_levels(0.0, 0.0)]
    [0.025, 0.975]
    >>> [round(level, 4) for level in bca_levels(0.1, 0.05)]
    [0.0512, 0.9913]
    """
    low, high = (NORMAL.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-Z, Z))
    return low, high


def share_or_mean(values: Sequence[float]) -> Estimate:
    """Return the estimate of values that are all 0 or 1 as a share, of others as a mean."""
    if all(value in (0, 1) for value in values):
        return wilson(math.fsum(values) / len(values), len(values))
    return mean(values)


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Return exp(Σ losses / Σ tokens) for the losses of texts, in nats. The interval is that of the
    ratio r = Σ losses / Σ tokens over texts, whose variance is Σ (loss − r · tokens)² · n / (n − 1)
    / (Σ tokens)² (Cochran 1977, section 6.4). One text has no interval."""
    total, n = sum(tokens), len(losses)
    ratio = math.fsum(losses) / total
    if n < 2:
        return Estimate(math.exp(ratio), None, None)
    spread = math.fsum(
        (loss - ratio * count) ** 2 for loss, count in zip(losses, tokens, strict=True)
    )
    half = Z * math.sqrt(spread * n / (n - 1)) / total
    return Estimate(math.exp(ratio), math.exp(ratio - half), math.exp(ratio + half))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of so many wins and losses over the same items, ties left out:
    that of a fair coin (Dixon & Mood 1946). For right and wrong answers this is McNemar's test.
    Exact up to EXACT wins and losses, beyond that McNemar's χ² with continuity correction.

    Nine wins and one loss: 2 · (1 + 10) / 2¹⁰.

    >>> round(sign_test(9, 1), 6)
    0.021484
    """
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    if n > EXACT:
        distance = max(0.0, abs(wins - losses) - 1) / math.sqrt(n)
        return math.erfc(distance / math.sqrt(2))
    tail: int = sum(math.comb(n, i) for i in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values of several tests, adjusted so that the chance of one false finding or
    more among them stays at the level that they are compared with (Holm 1979): the i-th smallest
    of m, times m − i + 1, and not less than the ones before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def length_controlled(shares: Sequence[float], length_differences: Sequence[float]) -> Estimate:
    """Return the win rate that is left when both answers are equally long.

    A logistic regression of the shares (1 win, ½ tie, 0 loss) on the difference of lengths,

        P(win) = σ(θ + φ · tanh(Δ / s)),   s the root mean square of Δ,

    whose value at Δ = 0 is σ(θ). That is the length term of AlpacaEval 2 (Dubois et al. 2024,
    "Length-Controlled AlpacaEval", equation 2), without its term of an instruction's difficulty,
    which needs the answers of many other models. One tie at Δ = 0 is added, so that θ stays finite
    where one side wins always, and there is a weak ridge on φ (`RIDGE`).

    The interval is σ(θ ± z · SE). SE² is the larger one of the variances by the inverse Hessian and
    by the sandwich: where all Δ are alike, or the length decides nearly always, the rows say little
    of θ, the scores are close to 0, and the sandwich with them.
    """
    y = np.array([*shares, 0.5])
    differences = np.array([*length_differences, 0.0], dtype=np.float64)
    scale = math.sqrt(float(np.mean(differences**2))) or 1.0
    x = np.stack([np.ones_like(y), np.tanh(differences / scale)], axis=1)
    ridge = np.diag([0.0, RIDGE])
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(x @ weights)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (y - p) - ridge @ weights)
        weights = weights + step / max(1.0, float(np.abs(step).max()))
        if float(np.abs(step).max()) < 1e-9:
            break
    p = 1 / (1 + np.exp(-(x @ weights)))
    inverse = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-9 * np.eye(2))
    scores = x * (y - p)[:, None]
    sandwich = inverse @ (scores.T @ scores) @ inverse
    error = math.sqrt(max(float(inverse[0, 0]), float(sandwich[0, 0])))
    theta = float(weights[0])
    return Estimate(_sigmoid(theta), _sigmoid(theta - Z * error), _sigmoid(theta + Z * error))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
