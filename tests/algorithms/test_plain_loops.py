"""Every advantage and every loss against plain Python loops over lists of numbers, written from the papers without tensors,
on random ragged batches in float64. Tokens of others (a tool's output) may lie between a response's own."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.algorithms.advantages import (
    Gae,
    LengthAdaptiveGae,
    MonteCarlo,
    NStep,
    TemporalDifference,
    Whiten,
)
from quartet.algorithms.aggregation import FixedLength, SequenceMean, TokenMean
from quartet.algorithms.baselines import (
    GreedyBaseline,
    GroupMean,
    LeaveOneOut,
    LengthWeightedBaseline,
    ReturnToGo,
)
from quartet.algorithms.correction import Masked, SequenceMasked, SequenceTruncated, Truncated
from quartet.algorithms.kl import KLInLoss, KLInReward
from quartet.algorithms.policy_loss import (
    Cispo,
    Clip,
    DualClip,
    Gmpo,
    ImportanceWeighted,
    KLPenalty,
    Reinforce,
    Sapo,
    SequenceClip,
    Surrogate,
)
from quartet.algorithms.value_loss import ClippedValueLoss
from quartet.experience import Batch

NUMBER = st.floats(-3, 3, width=32)


@dataclass
class Row:
    """One response: for each of its own tokens a reward, a value and the log-probs of four policies; `gaps` says where tokens
    of others lie before a token."""

    rewards: list[float]
    values: list[float]
    new: list[float]
    old: list[float]
    ref: list[float]
    sampler: list[float]
    gaps: list[bool]
    group: int
    ended: bool
    final: float
    greedy: float

    def __len__(self):
        return len(self.rewards)


@st.composite
def batches(draw):
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        n = draw(st.integers(0, 7))
        numbers = {
            name: draw(st.lists(NUMBER, min_size=n, max_size=n))
            for name in ("rewards", "values", "new", "old", "ref", "sampler")
        }
        gaps = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        rows.append(Row(**numbers, gaps=gaps, group=draw(st.integers(0, 2)), ended=draw(st.booleans()), final=draw(NUMBER), greedy=draw(NUMBER)))  # fmt: skip
    return rows


def spread(rows, name):
    """[B, T]: a prompt token, then the row's numbers with 99s where others speak and behind the end."""
    width = 2 + max((len(r) + sum(r.gaps) for r in rows), default=0)
    table = torch.full((len(rows), width), 99.0, dtype=torch.float64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        column = 1
        for value, gap in zip(getattr(row, name), row.gaps, strict=True):
            column += int(gap)
            table[i, column], mask[i, column] = value, True
            column += 1
    return table, mask


def as_batch(rows):
    (old, mask), (values, _), (ref, _), (sampler, _) = (
        spread(rows, n) for n in ("old", "values", "ref", "sampler")
    )
    totals = torch.tensor([sum(r.rewards) for r in rows], dtype=torch.float64)
    return Batch(
        ids=tuple(str(i) for i in range(len(rows))),
        tokens=torch.zeros(mask.shape, dtype=torch.long),
        lengths=torch.full((len(rows),), mask.shape[1]),
        response_mask=mask,
        scores=totals,
        ended=torch.tensor([r.ended for r in rows]),
        groups=torch.tensor([r.group for r in rows]),
        rollout_logprobs=sampler,
        old_logprobs=old,
        ref_logprobs=ref,
        values=values,
        final_values=torch.tensor([r.final for r in rows], dtype=torch.float64),
        greedy_scores=torch.tensor([r.greedy for r in rows], dtype=torch.float64),
    )


def assert_rows(measured, rows, expected):
    _, mask = spread(rows, "rewards")
    assert (measured[~mask] == 0).all()
    flat = [x for row in expected for x in row]
    torch.testing.assert_close(
        measured[mask], torch.tensor(flat, dtype=torch.float64), atol=1e-8, rtol=1e-7
    )


# --- advantages, from the papers ------------------------------------------------------------------------------------------


def discounted(rewards, gamma):
    return [
        sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
        for t in range(len(rewards))
    ]


def gae(row, gamma, lam, after=0.0):
    """Schulman et al. 2016, eq. 16, as the sum it is."""
    following = [*row.values[1:], after]
    delta = (
        [r + gamma * v1 - v for r, v, v1 in zip(row.rewards, row.values, following, strict=True)]
        if row.rewards
        else []
    )
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
        for t in range(len(delta))
    ]


def gae_in_steps(row, gamma, lam, after=0.0):
    """Tokens of others, but those before the first own token, are states of value 0 without a reward (OpenRLHF)."""
    rewards, values, own = [], [], []
    for t, gap in enumerate(row.gaps):
        steps = [(0.0, 0.0, False)] if gap and t > 0 else []
        for reward, value, is_own in [*steps, (row.rewards[t], row.values[t], True)]:
            rewards.append(reward)
            values.append(value)
            own.append(is_own)
    advantages, advantage, following = [], 0.0, after
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        following = value
        advantages.insert(0, advantage)
    return [a for a, is_own in zip(advantages, own, strict=True) if is_own]


def n_step(row, n, gamma, after=0.0):
    """Sutton & Barto: at most n rewards, then the value of the state that was reached."""
    found = []
    for t in range(len(row)):
        stop = min(t + n, len(row))
        total = sum(gamma ** (k - t) * row.rewards[k] for k in range(t, stop))
        reached = row.values[stop] if stop < len(row) else after
        found.append(total + gamma ** (stop - t) * reached - row.values[t])
    return found


def group_of(rows, row):
    return [r for r in rows if r.group == row.group]


def mean(values):
    return sum(values) / len(values)


def per_response(rows, advantage):
    return [[advantage(row)] * len(row) for row in rows]


def group_normalised(rows, row, correction):
    totals = [sum(r.rewards) for r in group_of(rows, row)]
    if max(totals) == min(totals):
        return 0.0
    centre = mean(totals)
    deviation = math.sqrt(sum((x - centre) ** 2 for x in totals) / (len(totals) - correction))
    return (sum(row.rewards) - centre) / (deviation + 1e-6)


def leave_one_out_divided(rows, row):
    others = [sum(r.rewards) for r in group_of(rows, row) if r is not row]
    if {*others} == {sum(row.rewards)}:
        return 0.0
    distance = leave_one_out(rows, row)
    if len(others) < 2 or max(others) - min(others) < 1e-6:
        return distance
    centre = mean(others)
    deviation = math.sqrt(sum((x - centre) ** 2 for x in others) / (len(others) - 1))
    return distance / (deviation + 1e-6)


def leave_one_out(rows, row):
    others = [sum(r.rewards) for r in group_of(rows, row) if r is not row]
    return sum(row.rewards) - mean(others) if others else 0.0


def length_weighted(rows, row):
    group = group_of(rows, row)
    if len({sum(r.rewards) for r in group}) == 1:
        return 0.0
    return sum(row.rewards) - sum(len(r) * sum(r.rewards) for r in group) / sum(
        len(r) for r in group
    )


ADVANTAGES = {
    "gae": (Gae(gamma=0.9, lam=0.7), lambda rows: [gae(r, 0.9, 0.7) for r in rows]),
    "gae, bootstrapped": (
        Gae(gamma=0.9, lam=0.7, bootstrap_truncated=True),
        lambda rows: [gae(r, 0.9, 0.7, 0.0 if r.ended else r.final) for r in rows],
    ),
    "gae, tool tokens are steps": (
        Gae(gamma=0.9, lam=0.7, bootstrap_truncated=True, tool_tokens="steps"),
        lambda rows: [gae_in_steps(r, 0.9, 0.7, 0.0 if r.ended else r.final) for r in rows],
    ),
    "length adaptive": (
        LengthAdaptiveGae(alpha=0.4),
        lambda rows: [
            gae(r, 1.0, max(0.0, 1 - 1 / (0.4 * len(r))) if len(r) else 0.0) for r in rows
        ],
    ),
    "monte carlo": (
        MonteCarlo(gamma=0.9),
        lambda rows: [
            [g - v for g, v in zip(discounted(r.rewards, 0.9), r.values, strict=True)] for r in rows
        ],
    ),
    "td": (TemporalDifference(gamma=0.9), lambda rows: [n_step(r, 1, 0.9) for r in rows]),
    "n-step": (NStep(n=3, gamma=0.9), lambda rows: [n_step(r, 3, 0.9) for r in rows]),
    "n-step, myopic": (NStep(n=3, gamma=0.0), lambda rows: [n_step(r, 3, 0.0) for r in rows]),
    "n-step, bootstrapped": (
        NStep(n=3, gamma=0.9, bootstrap_truncated=True),
        lambda rows: [n_step(r, 3, 0.9, 0.0 if r.ended else r.final) for r in rows],
    ),
    "return to go": (
        ReturnToGo(gamma=0.9),
        lambda rows: [discounted(r.rewards, 0.9) for r in rows],
    ),
    "greedy": (
        GreedyBaseline(),
        lambda rows: [[g - r.greedy for g in discounted(r.rewards, 1.0)] for r in rows],
    ),
    "group, sample": (
        GroupMean(),
        lambda rows: per_response(rows, lambda r: group_normalised(rows, r, 1)),
    ),
    "group, population": (
        GroupMean(std="population"),
        lambda rows: per_response(rows, lambda r: group_normalised(rows, r, 0)),
    ),
    "leave one out, divided": (
        LeaveOneOut(std="others"),
        lambda rows: per_response(rows, lambda r: leave_one_out_divided(rows, r)),
    ),
    "group, undivided": (
        GroupMean(std="none"),
        lambda rows: per_response(
            rows, lambda r: sum(r.rewards) - mean([sum(o.rewards) for o in group_of(rows, r)])
        ),
    ),
    "leave one out": (
        LeaveOneOut(),
        lambda rows: per_response(rows, lambda r: leave_one_out(rows, r)),
    ),
    "length weighted": (
        LengthWeightedBaseline(),
        lambda rows: per_response(rows, lambda r: length_weighted(rows, r)),
    ),
}


@pytest.mark.parametrize("name", ADVANTAGES)
@settings(max_examples=60, deadline=None)
@given(rows=batches())
@pytest.mark.slow
def test_advantages(name, rows):
    part, by_loops = ADVANTAGES[name]
    rewards, _ = spread(rows, "rewards")
    measured, returns = part(rewards, as_batch(rows))
    expected = by_loops(rows)
    if name.startswith("group, s") or name.startswith(
        "group, p"
    ):  # nearly equal totals: a quotient of rounding errors
        measured, expected = measured / 1e3, [[x / 1e3 for x in row] for row in expected]
    assert_rows(measured, rows, expected)
    if returns is not None and "adaptive" not in name:
        assert_rows(
            returns,
            rows,
            [
                [a + v for a, v in zip(e, r.values, strict=True)]
                for e, r in zip(expected, rows, strict=True)
            ],
        )


@pytest.mark.parametrize(("deviation", "correction"), [("population", 0), ("sample", 1)])
@settings(max_examples=60, deadline=None)
@given(rows=batches())
def test_whitening(deviation, correction, rows):
    values, mask = spread(rows, "values")
    flat = [v for r in rows for v in r.values]
    if len(flat) < 2:
        return
    centre = mean(flat)
    variance = sum((v - centre) ** 2 for v in flat) / (len(flat) - correction)
    expected = [[(v - centre) / math.sqrt(variance + 1e-8) for v in r.values] for r in rows]
    assert_rows(Whiten(deviation=deviation)(values, mask), rows, expected)


# --- losses, from the papers ----------------------------------------------------------------------------------------------


def clip(x, low, high):
    return max(low, min(x, high))


def ratios(row):
    return [math.exp(a - b) for a, b in zip(row.new, row.old, strict=True)]


def clipped(rho, a, low, high):
    return -min(rho * a, clip(rho, 1 - low, 1 + high) * a)


def sequence_ratio(row):
    return (
        math.exp(mean([a - b for a, b in zip(row.new, row.old, strict=True)])) if len(row) else 1.0
    )


def product_ratio(row):
    return math.exp(sum(a - b for a, b in zip(row.new, row.old, strict=True)))


def gmpo(row):
    """Algorithm 1 of the paper. It has one advantage, and so one sign, per response; here each token has its own."""
    kept = []
    for advantage, a, b in zip(row.rewards, row.new, row.old, strict=True):
        sign = 1 if advantage > 0 else -1
        kept.append(sign * min(sign * (a - b), clip(sign * (a - b), -0.4, 0.4)))
    return [-advantage * math.exp(mean(kept)) for advantage in row.rewards]


def sapo(rho, a):
    tau = 1.0 if a > 0 else 1.05
    return -4 / tau / (1 + math.exp(-tau * (rho - 1))) * a


def each(formula):
    """A formula of ratio, advantage (the row's `rewards`) and log-prob, for every token."""
    return lambda row: [
        formula(rho, a, new) for rho, a, new in zip(ratios(row), row.rewards, row.new, strict=True)
    ]


POLICY_LOSSES = {
    "reinforce": (Reinforce(), each(lambda rho, a, new: -a * new)),
    "importance weighted": (ImportanceWeighted(), each(lambda rho, a, new: -rho * a)),
    "kl penalty": (
        KLPenalty(beta=0.3),
        each(lambda rho, a, new: -rho * a + 0.3 * (rho - 1 - math.log(rho))),
    ),
    "clip": (Clip(low=0.2, high=0.3), each(lambda rho, a, new: clipped(rho, a, 0.2, 0.3))),
    "dual clip": (
        DualClip(cap=3.0),
        each(
            lambda rho, a, new: (
                min(clipped(rho, a, 0.2, 0.2), -3.0 * a) if a < 0 else clipped(rho, a, 0.2, 0.2)
            )
        ),
    ),
    "cispo": (
        Cispo(ratio_min=0.5, ratio_max=2.0),
        each(lambda rho, a, new: -clip(rho, 0.5, 2.0) * a * new),
    ),
    "sapo": (Sapo(), each(lambda rho, a, new: sapo(rho, a))),
    "gspo": (
        SequenceClip(low=0.1, high=0.2),
        lambda row: [clipped(sequence_ratio(row), a, 0.1, 0.2) for a in row.rewards],
    ),
    "clip of the product": (
        SequenceClip(low=0.1, high=0.2, ratio="product"),
        lambda row: [clipped(product_ratio(row), a, 0.1, 0.2) for a in row.rewards],
    ),
    "gmpo": (Gmpo(), gmpo),
}


@pytest.mark.parametrize("name", POLICY_LOSSES)
@settings(max_examples=60, deadline=None)
@given(rows=batches())
def test_policy_losses(name, rows):
    part, by_loops = POLICY_LOSSES[name]
    (new, mask), (old, _), (advantages, _) = (spread(rows, n) for n in ("new", "old", "rewards"))
    measured = torch.where(mask, part(Surrogate(new, old, advantages, mask)), 0.0)
    assert_rows(measured, rows, [by_loops(row) for row in rows])


def cispo_gradient(row):
    """eq. 4 differentiated by hand: the weight is a constant."""
    return [-clip(rho, 0.5, 2.0) * a for rho, a in zip(ratios(row), row.rewards, strict=True)]


def gspo_gradient(row):
    """∂/∂log π_t of −min(sA, clip(s)A) / |o| · |o| in the token form: −s A where the clip has not taken hold."""
    s = sequence_ratio(row)
    held = [(a > 0 and s > 1.2) or (a < 0 and s < 0.9) for a in row.rewards]
    return [0.0 if h else -s * a for h, a in zip(held, row.rewards, strict=True)]


@pytest.mark.parametrize(
    ("part", "by_hand"),
    [
        (Cispo(ratio_min=0.5, ratio_max=2.0), cispo_gradient),
        (SequenceClip(low=0.1, high=0.2), gspo_gradient),
    ],
)
@settings(max_examples=60, deadline=None)
@given(rows=batches())
def test_gradients_of_losses_that_stop_them(part, by_hand, rows):
    (new, mask), (old, _), (advantages, _) = (spread(rows, n) for n in ("new", "old", "rewards"))
    new.requires_grad_()
    gradient = torch.autograd.grad(
        torch.where(mask, part(Surrogate(new, old, advantages, mask)), 0.0).sum(), new
    )[0]
    assert_rows(gradient, rows, [by_hand(row) for row in rows])


def test_summed_over_its_tokens_the_clip_of_the_product_has_the_gradient_of_the_responses_ratio():
    """∇ −min(s A, clip(s) A) with s = π(response) / π_old(response), by autograd of that formula."""
    new = torch.tensor([[-0.9, -1.2, -0.4]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, -1.0, -0.5]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    part = SequenceClip(low=0.2, high=0.2, ratio="product")
    for a in (2.0, -2.0):
        advantages = torch.full_like(old, a)
        (ours,) = torch.autograd.grad(part(Surrogate(new, old, advantages, mask)).sum(), new)
        s = (new - old).sum().exp()
        (expected,) = torch.autograd.grad(-torch.minimum(s * a, s.clamp(0.8, 1.2) * a), new)
        assert torch.allclose(ours, expected)


@pytest.mark.parametrize("ratio", ["geometric_mean", "product"])
def test_a_response_whose_ratio_is_held_counts_as_clipped(ratio):
    old = torch.zeros(1, 2, dtype=torch.float64)
    new = torch.full_like(old, 30.0).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    tokens = Surrogate(new, old, -torch.ones_like(old), mask)
    part = SequenceClip(ratio=ratio)
    assert torch.autograd.grad(part(tokens).sum(), new)[0].tolist() == [[0.0, 0.0]]
    assert part.clipped(tokens).tolist() == [[True, True]]


def test_one_token_makes_gspos_ratio_ppos():
    new, old, a, mask = (
        torch.tensor([[0.3]]),
        torch.zeros(1, 1),
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
    )
    tokens = Surrogate(new, old, a, mask)
    assert torch.equal(SequenceClip(low=0.2, high=0.2)(tokens), Clip()(tokens))
    assert torch.equal(Gmpo(window=0.1)(tokens), -torch.tensor([[0.1]]).exp())


@settings(max_examples=60, deadline=None)
@given(rows=batches(), size=st.sampled_from([0.2, math.inf]))
def test_value_loss(rows, size):
    (new, mask), (old, _), (target, _) = (spread(rows, n) for n in ("new", "old", "rewards"))

    def loss(v, before, r):
        return 0.5 * 0.1 * max((v - r) ** 2, (clip(v, before - size, before + size) - r) ** 2)

    measured = torch.where(mask, ClippedValueLoss(clip=size, coef=0.1)(new, old, target), 0.0)
    expected = [[loss(*x) for x in zip(r.new, r.old, r.rewards, strict=True)] for r in rows]
    assert_rows(measured, rows, expected)


def estimate(name, d):
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d), "squared": d * d}[
        name
    ]


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "squared"])
@settings(max_examples=40, deadline=None)
@given(rows=batches())
def test_kl(name, rows):
    (new, mask), (old, _), (ref, _) = (spread(rows, n) for n in ("new", "old", "ref"))
    in_reward = torch.where(mask, KLInReward(estimator=name, coef=0.5).reward(old, ref, None), 0.0)
    assert_rows(
        in_reward,
        rows,
        [[-0.5 * estimate(name, a - b) for a, b in zip(r.old, r.ref, strict=True)] for r in rows],
    )
    in_loss = torch.where(
        mask, KLInLoss(estimator=name, coef=0.5).loss(new, old, ref, None, mask), 0.0
    )
    assert_rows(
        in_loss,
        rows,
        [[0.5 * estimate(name, a - b) for a, b in zip(r.new, r.ref, strict=True)] for r in rows],
    )


@pytest.mark.parametrize("name", ["k1", "k3"])
@settings(max_examples=40, deadline=None)
@given(rows=batches())
def test_weighted_kl(name, rows):
    (new, mask), (old, _), (ref, _) = (spread(rows, n) for n in ("new", "old", "ref"))

    def by_token(row):
        return [
            0.5 * rho * estimate(name, a - b)
            for rho, a, b in zip(ratios(row), row.new, row.ref, strict=True)
        ]

    def by_sequence(row):
        logs = [a - b for a, b in zip(row.new, row.old, strict=True)]
        weights = [math.exp(clip(sum(logs[: t + 1]), -20, 20)) for t in range(len(row))]
        return [
            0.5 * w * estimate(name, a - b)
            for w, a, b in zip(weights, row.new, row.ref, strict=True)
        ]

    for weight, by_loops in (("token", by_token), ("sequence", by_sequence)):
        measured = KLInLoss(estimator=name, coef=0.5, weight=weight).loss(
            new, old, ref, None, mask, None
        )
        assert_rows(torch.where(mask, measured, 0.0), rows, [by_loops(row) for row in rows])


CORRECTIONS = {
    "truncated": (Truncated(cap=2.0), lambda weights: [min(w, 2.0) for w in weights]),
    "sequence truncated": (
        SequenceTruncated(cap=2.0),
        lambda weights: (
            [min(math.prod(weights) ** (1 / len(weights)), 2.0)] * len(weights) if weights else []
        ),
    ),
    "masked": (
        Masked(low=0.5, high=5.0),
        lambda weights: [w if 0.5 <= w <= 5.0 else 0.0 for w in weights],
    ),
    "sequence masked": (
        SequenceMasked(low=0.1, high=3.0),
        lambda weights: (
            [math.prod(weights) if 0.1 <= math.prod(weights) <= 3.0 else 0.0] * len(weights)
        ),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
@settings(max_examples=60, deadline=None)
@given(rows=batches())
def test_corrections(name, rows):
    part, by_loops = CORRECTIONS[name]
    (old, mask), (sampler, _) = spread(rows, "old"), spread(rows, "sampler")
    expected = [
        by_loops([math.exp(a - b) for a, b in zip(r.old, r.sampler, strict=True)]) for r in rows
    ]
    assert_rows(part(old, sampler, mask), rows, expected)


AGGREGATIONS = {
    "tokens": (TokenMean(), lambda rows: sum(map(sum, rows)) / max(sum(map(len, rows)), 1)),
    "sequences": (
        SequenceMean(),
        lambda rows: sum(mean(r) for r in rows if r) / max(sum(1 for r in rows if r), 1),
    ),
    "fixed length": (
        FixedLength(length=9),
        lambda rows: sum(map(sum, rows)) / max(9 * sum(1 for r in rows if r), 1),
    ),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@settings(max_examples=60, deadline=None)
@given(rows=batches())
def test_aggregations(name, rows):
    part, by_loops = AGGREGATIONS[name]
    loss, mask = spread(rows, "new")
    assert part(loss, mask, part.denominator(mask)).item() == pytest.approx(
        by_loops([r.new for r in rows]), abs=1e-9
    )
