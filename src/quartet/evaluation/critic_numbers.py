"""What the samples of a critic's audit say: calibration, error by position, variance, ranking of
next tokens, and bias and variance of advantages.

V̂ is the mean of M returns from a state, se its standard error, V the critic's value, V* the
expected return. Wherever a square of V − V* is estimated, se² is subtracted from (V − V̂)², which is
too large by it on average. Intervals are of 95%; states of one prompt are not independent, so that
intervals are computed from sums over prompts (Cochran 1977, section 6.4).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from quartet.evaluation.critic_samples import LAMBDAS, Action, Samples, State
from quartet.evaluation.statistics import Z, wilson

BINS = 8
"""Bins of the calibration, each with the same number of states, at most."""
Numbers = np.ndarray


def audit_numbers(samples: Samples) -> dict[str, Any]:
    """Return the results of an audit as a table for JSON. There must be at least two states."""
    states = samples.states
    table = _States(states)
    return {
        "states": len(states),
        "prompts": len(set(table.prompt.tolist())),
        "responses": samples.responses,
        "unscored": samples.unscored,
        "tokens": samples.tokens,
        "level": mean(table.error, table.prompt),
        "rmse": root_mean(table.error**2 - table.noise, table.prompt),
        "calibration": calibration(table),
        "positions": by_position(table),
        "parts": parts_of_error(table),
        "follows": follows(table),
        "variance": variances(table),
        "where_right": where_right(table),
        "ranking": ranking(states),
        "advantages": advantages(states),
    }


class _States:
    """Columns over the N states."""

    def __init__(self, states: Sequence[State]) -> None:
        self.prompt = np.array([s.prompt for s in states])
        self.position = np.array([s.position for s in states])
        self.value = np.array([s.value for s in states])
        self.mean = np.array([s.returns.mean() for s in states])
        self.spread = np.array([s.returns.var(ddof=1) for s in states])
        """The variance of single returns."""
        self.noise = self.spread / np.array([len(s.returns) for s in states])
        """se²."""
        self.error = self.value - self.mean


# --- estimates


def estimate(value: float, error: float | None, count: int) -> dict[str, float | None]:
    """Return a value with the interval of its standard error, which comes from `count` prompts."""
    if error is None or not math.isfinite(error):
        return {"value": float(value), "low": None, "high": None}
    half = t_quantile(count - 1) * error
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}


def t_quantile(freedom: int) -> float:
    """Return the quantile at 97.5% of Student's t, by its expansion in 1 / ν (Abramowitz & Stegun
    1964, 26.7.5): 3.16 for ν = 3, where it is 3.18, and Z for many. For ν = 1 and 2 it is too
    small, 9.7 for 12.7 and 4.17 for 4.30."""
    powers = [Z ** (2 * k + 1) for k in range(4)]
    terms = [(1, 1), (3, 16, 5), (-15, 17, 19, 3)]
    divisors = [4 * freedom, 96 * freedom**2, 384 * freedom**3]
    sums = [math.fsum(c * z for c, z in zip(term, powers, strict=False)) for term in terms]
    return Z + math.fsum(s / d for s, d in zip(sums, divisors, strict=True))


def ratio(over: Numbers, under: Numbers, prompts: Numbers) -> tuple[float, float | None, int]:
    """Return r = Σ over / Σ under, its standard error and the number C of prompts,

        se = √(Σ_c (over_c − r · under_c)² · C / (C − 1)) / |Σ under|,

    with sums over each prompt. The error is None where there is one prompt."""
    total = float(under.sum())
    if total == 0:
        return math.nan, None, 0
    value = float(over.sum()) / total
    _, index = np.unique(prompts, return_inverse=True)
    sums = np.bincount(index, over - value * under)
    count = len(sums)
    if count < 2:
        return value, None, count
    return value, math.sqrt(float((sums**2).sum()) * count / (count - 1)) / abs(total), count


def mean(values: Numbers, prompts: Numbers) -> dict[str, float | None]:
    """Return the mean with its interval."""
    return estimate(*ratio(values, np.ones_like(values), prompts))


def root_mean(squares: Numbers, prompts: Numbers) -> dict[str, float | None]:
    """Return the root of the mean of estimated squares, which may be negative one by one; 0 where
    their mean is."""
    numbers = mean(squares, prompts)
    return {name: None if x is None else math.sqrt(max(x, 0.0)) for name, x in numbers.items()}


# --- the critic's values


def calibration(table: _States) -> dict[str, Any]:
    """Return bins of V with the mean return in each, and the line V̂ = offset + slope · V by least
    squares. A calibrated critic has slope 1 and offset 0: the mean return of states with value v is
    v. The offset is where the line is at V = 0."""
    order = np.argsort(table.value, kind="stable")
    pieces = np.array_split(order, max(1, min(BINS, len(order) // 4)))
    bins = [
        {
            "low": float(table.value[piece].min()),
            "high": float(table.value[piece].max()),
            "states": len(piece),
            "value": float(table.value[piece].mean()),
            "mean_return": mean(table.mean[piece], table.prompt[piece]),
        }
        for piece in pieces
    ]
    if float(np.ptp(table.value)) < 1e-9:
        return {"bins": bins, "slope": None, "offset": None}
    x = np.stack([np.ones_like(table.value), table.value], axis=1)
    inverse = np.linalg.inv(x.T @ x)
    line = inverse @ (x.T @ table.mean)
    _, index = np.unique(table.prompt, return_inverse=True)
    residuals = table.mean - x @ line
    scores = np.stack([np.bincount(index, residuals * column) for column in x.T], axis=1)
    count = len(scores)
    variance = inverse @ (scores.T @ scores) @ inverse * count / max(count - 1, 1)
    errors = np.sqrt(np.diag(variance)) if count > 1 else [None, None]
    return {
        "bins": bins,
        "slope": estimate(line[1], errors[1], count),
        "offset": estimate(line[0], errors[0], count),
    }


def ranges(positions: Numbers) -> list[tuple[int, int]]:
    """Return ranges of positions, first and last: 0, 1 to 3, 4 to 7, 8 to 15 and so on, as far as
    there are states."""
    starts = [0, 1, *(2**k for k in range(2, 32))]
    found = []
    for first, after in itertools.pairwise(starts):
        inside = positions[(positions >= first) & (positions < after)]
        if len(inside):
            found.append((first, int(inside.max())))
    return found


def by_position(table: _States) -> list[dict[str, Any]]:
    """Return for each range of positions the bias V − V*, its root mean square, and the standard
    deviation of single returns."""
    rows = []
    for first, last in ranges(table.position):
        inside = (table.position >= first) & (table.position <= last)
        prompts, noise = table.prompt[inside], table.noise[inside]
        error = table.error[inside]
        rows.append(
            {
                "first": first,
                "last": last,
                "states": int(inside.sum()),
                "value": float(table.value[inside].mean()),
                "mean_return": float(table.mean[inside].mean()),
                "bias": mean(error, prompts),
                "rmse": root_mean(error**2 - noise, prompts),
                "deviation": math.sqrt(float(table.spread[inside].mean())),
            }
        )
    return rows


def parts_of_error(table: _States) -> dict[str, float]:
    """Return the mean square of V − V* and its parts: the square of its mean (`level`), the
    variance between ranges of positions (`position`), and what is left (`rest`). Noise is
    subtracted from each; a part that is below 0 then is 0."""
    total = max(float((table.error**2 - table.noise).mean()), 0.0)
    level, noise = _mean_and_noise(table.error, table.prompt)
    level_square = max(level**2 - noise, 0.0)
    between = 0.0
    for first, last in ranges(table.position):
        inside = (table.position >= first) & (table.position <= last)
        bias, noise = _mean_and_noise(table.error[inside], table.prompt[inside])
        between += float(inside.mean()) * ((bias - level) ** 2 - noise)
    position = min(max(between, 0.0), max(total - level_square, 0.0))
    rest = max(total - level_square - position, 0.0)
    return {"total": total, "level": level_square, "position": position, "rest": rest}


def _mean_and_noise(values: Numbers, prompts: Numbers) -> tuple[float, float]:
    """Return a mean and the square of its standard error."""
    value, error, _ = ratio(values, np.ones_like(values), prompts)
    return value, (error or 0.0) ** 2


def follows(table: _States) -> dict[str, float | None] | None:
    """Return how far V moves along a response where the expected return moves by 1: the slope of V
    on V*, both less their mean over the states of the same response. 1 for a perfect critic, 0 for
    one that does not see what was written. None where the expected return does not move
    measurably."""
    over, under = np.zeros_like(table.value), np.zeros_like(table.value)
    for prompt in np.unique(table.prompt):
        own = table.prompt == prompt
        count = int(own.sum())
        moves = table.mean[own] - table.mean[own].mean()
        over[own] = (table.value[own] - table.value[own].mean()) * moves
        under[own] = moves**2 - table.noise[own] * (1 - 1 / count)
    moved, error, _ = ratio(under, np.ones_like(under), table.prompt)
    if error is None or moved < Z * error:
        return None
    return estimate(*ratio(over, under, table.prompt))


def variances(table: _States) -> dict[str, Any]:
    """Return the share of the variance of single returns that the critic explains, beside the
    largest possible one; and the share of the variance of expected returns.

    The metric value/explained_variance has the critic's targets in place of returns. With λ < 1
    they contain V itself, so it is larger.
    """
    between = float(table.mean.var(ddof=1) - table.noise.mean())
    within = float(table.spread.mean())
    error = float(table.error.var(ddof=1) - table.noise.mean())
    total = between + within
    return {
        "of_expected_returns": max(between, 0.0),
        "of_single_returns": within,
        "explained": 1 - (error + within) / total if total > 0 else None,
        "possible": max(between, 0.0) / total if total > 0 else None,
        "explained_of_expected": 1 - error / between if between > 1e-12 else None,
    }


def where_right(table: _States) -> dict[str, Any]:
    """Return the states where V is within the interval of V̂, and the standard deviation of single
    returns there: where E[return] = V, a return still differs from V by so much."""
    right = np.abs(table.error) <= Z * np.sqrt(table.noise)
    deviation = math.sqrt(float(table.spread[right].mean())) if right.any() else None
    return {"states": int(right.sum()), "deviation": deviation}


# --- next tokens


def ranking(states: Sequence[State]) -> dict[str, Any]:
    """Return how often the critic ranks two next tokens of one state as their mean returns do,
    where these differ significantly. `open` are the pairs of tokens after which the response goes
    on."""
    pairs = [
        (number, a, b)
        for number, state in enumerate(states)
        for a, b in itertools.combinations(state.actions, 2)
    ]
    clear = [(number, a, b) for number, a, b in pairs if _differ(a, b)]
    both_open = [(number, a, b) for number, a, b in clear if not (a.ends or b.ends)]
    return {"pairs": len(pairs), "clear": _accuracy(clear), "open": _accuracy(both_open)}


def _differ(a: Action, b: Action) -> bool:
    """Return whether the mean returns of two tokens differ by more than Z standard errors."""
    variance = sum(x.returns.var(ddof=1) / len(x.returns) for x in (a, b) if len(x.returns) > 1)
    return bool(abs(a.returns.mean() - b.returns.mean()) > Z * math.sqrt(variance) + 1e-9)


def _accuracy(pairs: Sequence[tuple[int, Action, Action]]) -> dict[str, Any] | None:
    """Return the share of pairs in the right order; a tie of the critic is half of one. Pairs of
    one state are not independent, so Wilson's interval counts states."""
    if not pairs:
        return None
    shares = [
        0.5 + 0.5 * float(np.sign((a.critic - b.critic) * (a.returns.mean() - b.returns.mean())))
        for _, a, b in pairs
    ]
    states = len({number for number, _, _ in pairs})
    return {**vars(wilson(math.fsum(shares) / len(shares), states)), "n": len(pairs)}


def advantages(states: Sequence[State]) -> dict[str, Any]:
    """Return the error of GAE at each λ, over the next tokens that the responses went on with.

    The advantage A* = Q̂(s, a) − V̂(s) is that of Monte Carlo, from separate samples. Of each
    token's M estimates, the mean less A* is the bias, and their variance the variance; `error` is
    the root of bias² + variance. All of them contain −V(s), which is the same for every token of
    the state and has no effect on the expected gradient; `bias_of_returns` is the bias without it:
    that of A + V(s) against Q̂(s, a), which is 0 at λ = 1. `correlation` is that of a single
    estimate with the true advantage; the scale of the estimates has no part in it.
    """
    units = [(s, a) for s in states for a in s.actions if a.is_sampled]
    if not units:
        return {"units": 0, "true_deviation": None, "by_lam": []}
    true = _TrueAdvantages(units)
    results = [_at_lam(column, true, units) for column in range(len(LAMBDAS))]
    best = min((squares for _, squares in results), key=lambda squares: float(squares.mean()))
    for row, squares in results:
        low = mean(squares - best, true.prompts)["low"]
        row["is_best"] = low is None or low <= 0.0
    return {
        "units": len(units),
        "true_deviation": math.sqrt(max(true.variance, 0.0)),
        "by_lam": [row for row, _ in results],
    }


class _TrueAdvantages:
    """The Monte Carlo advantages of U next tokens."""

    def __init__(self, units: Sequence[tuple[State, Action]]) -> None:
        self.prompts = np.array([s.prompt for s, _ in units])
        self.values = np.array([s.value for s, _ in units])
        self.baseline = np.array([s.returns.mean() for s, _ in units])
        self.baseline_noise = np.array([_variance(s.returns) / len(s.returns) for s, _ in units])
        self.numbers = np.array([a.returns.mean() for _, a in units]) - self.baseline
        noise = np.array([_variance(a.returns) / len(a.returns) for _, a in units])
        self.variance = float(np.var(self.numbers) - (noise + self.baseline_noise).mean())


def _at_lam(
    column: int, true: _TrueAdvantages, units: Sequence[tuple[State, Action]]
) -> tuple[dict[str, Any], Numbers]:
    """Return the row of one λ, and the mean square of each next token's estimates about A*."""
    estimates = [a.advantages[:, column] for _, a in units]
    # The bias is estimated from A − G, in which the noise of a return is in both.
    short = [a.advantages[:, column] - a.returns for _, a in units]
    noise = np.array([_variance(x) / len(x) for x in short])
    spread = np.array([_variance(x) for x in estimates])
    of_returns = np.array([x.mean() for x in short]) + true.values
    bias = of_returns - true.values + true.baseline
    squares = bias**2 - noise - true.baseline_noise
    row = {
        "lam": LAMBDAS[column],
        "mean_bias": mean(bias, true.prompts),
        "bias": root_mean(squares, true.prompts),
        "bias_of_returns": root_mean(of_returns**2 - noise, true.prompts),
        "deviation": math.sqrt(float(spread.mean())),
        "error": root_mean(squares + spread, true.prompts),
        "correlation": _correlation(estimates, spread, true, units),
    }
    return row, squares + spread


def _correlation(
    estimates: Sequence[Numbers],
    spread: Numbers,
    true: _TrueAdvantages,
    units: Sequence[tuple[State, Action]],
) -> float | None:
    """Return the correlation of single estimates with the true advantages, over next tokens. The
    noise that a mean estimate shares with the Monte Carlo mean of the same responses is
    subtracted."""
    means = np.array([x.mean() for x in estimates])
    shared = [
        float(np.cov(x, a.returns)[0, 1]) / len(x) if len(x) > 1 else 0.0
        for x, (_, a) in zip(estimates, units, strict=True)
    ]
    covariance = float(np.cov(means, true.numbers, ddof=0)[0, 1]) - float(np.mean(shared))
    counts = np.array([len(x) for x in estimates])
    total = float(np.var(means)) + float((spread * (1 - 1 / counts)).mean())
    if total <= 1e-12 or true.variance <= 1e-12:
        return None
    return max(-1.0, min(1.0, covariance / math.sqrt(total * true.variance)))


def _variance(x: Numbers) -> float:
    return float(x.var(ddof=1)) if len(x) > 1 else 0.0
