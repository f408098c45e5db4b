"""The formulas as plain loops over lists of numbers, from the papers: slow, without tensors,
checked by hand in the tests. A row is the list of one response's own numbers."""

import math
from collections.abc import Sequence

Row = Sequence[float]
Rows = Sequence[Row]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def deviation(numbers: Sequence[float], less: int) -> float:
    """Return the standard deviation with the denominator n − less."""
    centre = mean(numbers)
    return math.sqrt(sum((x - centre) ** 2 for x in numbers) / (len(numbers) - less))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    """Return log σ(x), exact for any x."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def log_softmax(logits: Row) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


# --- advantages ---


def gae(rewards: Row, values: Row, gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = Σ_k (γλ)^k δ_{t+k}, with
    δ_t = r_t + γ V_{t+1} − V_t and V = 0 after the last token."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def token_rewards(score: float, logprobs: Row, reference: Row, beta: float) -> list[float]:
    """−β (log π − log π_ref) of each token, and the score on the last one (Ziegler et al. 2019,
    eq. 2)."""
    rewards = [-beta * (p - q) for p, q in zip(logprobs, reference, strict=True)]
    return [*rewards[:-1], rewards[-1] + score]


def returns(rewards: Row, gamma: float) -> list[float]:
    """G_t = Σ_k γ^k r_{t+k}."""
    n = len(rewards)
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, n)) for t in range(n)]


def whiten(numbers: Sequence[float], less: int = 0) -> list[float]:
    centre, scale = mean(numbers), deviation(numbers, less)
    return [(x - centre) / scale for x in numbers]


def group_of(groups: Sequence[int], i: int) -> list[int]:
    return [j for j, group in enumerate(groups) if group == groups[i]]


def grpo(scores: Row, groups: Sequence[int], less: int = 1, eps: float = 0.0) -> list[float]:
    """(r − mean) / (deviation + ε) within the group (Shao et al. 2024, section 4.1.2)."""
    rows = []
    for i, score in enumerate(scores):
        own = [scores[j] for j in group_of(groups, i)]
        rows.append((score - mean(own)) / (deviation(own, less) + eps))
    return rows


def dr_grpo(scores: Row, groups: Sequence[int]) -> list[float]:
    """r − mean of the group (Liu et al. 2025, eq. 3)."""
    return [s - mean([scores[j] for j in group_of(groups, i)]) for i, s in enumerate(scores)]


def rloo(scores: Row, groups: Sequence[int]) -> list[float]:
    """r − mean of the others of the group (Ahmadian et al. 2024, section 3.3)."""
    return [
        s - mean([scores[j] for j in group_of(groups, i) if j != i]) for i, s in enumerate(scores)
    ]


# --- losses per token ---


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def ppo(log_ratio: float, advantage: float, low: float, high: float) -> float:
    """−min(ρA, clip(ρ)A) (Schulman et al. 2017, eq. 7)."""
    ratio = math.exp(log_ratio)
    return -min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def ppo_gradient(log_ratio: float, advantage: float, low: float, high: float) -> float:
    """The derivative of `ppo` by log π, by its six cases: −ρA, or 0 where the ratio has left the
    range in the direction of the advantage."""
    ratio = math.exp(log_ratio)
    is_outside = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    return 0.0 if is_outside else -ratio * advantage


def dual_clip(log_ratio: float, advantage: float, cap: float) -> float:
    """`ppo` at 0.2, and for A < 0 not above −cap · A (Ye et al. 2020, eq. 5)."""
    loss = ppo(log_ratio, advantage, 0.2, 0.2)
    return min(loss, -cap * advantage) if advantage < 0 else loss


def cispo(logprob: float, log_ratio: float, advantage: float, cap: float) -> tuple[float, float]:
    """−min(ρ, cap) A log π and its derivative by log π, the weight being a constant (MiniMax-M1
    2025, eq. 4)."""
    weight = min(math.exp(log_ratio), cap)
    return -weight * advantage * logprob, -weight * advantage


def value(new: float, old: float, target: float, limit: float) -> float:
    """½ max((V − G)², (clip(V, V_old ± c) − G)²)."""
    return max((new - target) ** 2, (clip(new, old - limit, old + limit) - target) ** 2) / 2


# --- means ---


def token_mean(rows: Rows) -> float:
    return mean([x for row in rows for x in row])


def sequence_mean(rows: Rows) -> float:
    return mean([mean(row) for row in rows if row])


def fixed_length_mean(rows: Rows, length: int) -> float:
    return sum(x for row in rows for x in row) / (len(rows) * length)


# --- comparisons, of one pair ---


def dpo(chosen: float, rejected: float, beta: float, smoothing: float = 0.0) -> float:
    """−(1 − ε) log σ(h) − ε log σ(−h), h = β (log-ratio chosen − rejected) (Rafailov et al. 2023,
    eq. 7; Mitchell 2023, eq. 3)."""
    h = beta * (chosen - rejected)
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def ipo(chosen: float, rejected: float, beta: float) -> float:
    """(log-ratio chosen − rejected − 1/(2β))² (Azar et al. 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto(chosen: float, rejected: float, kl: float, beta: float) -> tuple[float, float]:
    """1 − σ(β (log-ratio − z)) of the chosen, 1 − σ(β (z − log-ratio)) of the rejected
    (Ethayarajh et al. 2024, eq. 8)."""
    return 1 - sigmoid(beta * (chosen - kl)), 1 - sigmoid(beta * (kl - rejected))


def log_odds(logprob: float) -> float:
    return logprob - math.log(-math.expm1(logprob))


def orpo(chosen: float, rejected: float, weight: float) -> float:
    """−log p − λ log σ(log odds p − log odds q), of means per token (Hong et al. 2024, eq. 6)."""
    return -chosen - weight * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def simpo(chosen: float, rejected: float, beta: float, gamma: float) -> float:
    """−log σ(β (mean log p − mean log q) − γ) (Meng et al. 2024, eq. 6)."""
    return -log_sigmoid(beta * (chosen - rejected) - gamma)
