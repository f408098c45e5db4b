"""ILQL's formulas, by hand and against value iteration on data that can be enumerated."""

import itertools

import pytest
import torch

from quartet.algorithms.ilql import ActionValues, Ilql, expectile_loss, following

EOS, LONGEST = 0, 3


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_expectile_loss_weighs_the_two_sides():
    assert expectile_loss(t(2.0, -2.0, 0.0), 0.7).tolist() == pytest.approx([2.8, 1.2, 0.0])
    assert expectile_loss(t(2.0, -2.0), 0.5).tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(("tau", "expectile"), [(0.5, 0.25), (0.75, 0.5), (0.9, 0.75)])
def test_its_minimum_is_the_expectile(tau, expectile):
    """Of targets 1 with probability ¼, else 0: τ ¼ (1 − m) = (1 − τ) ¾ m."""
    m = t(expectile).requires_grad_()
    expectile_loss(t(1.0, 0.0, 0.0, 0.0) - m, tau).mean().backward()
    assert m.grad.item() == pytest.approx(0, abs=1e-12)


def test_the_value_after_a_token_is_that_before_the_next_of_its_row():
    rows = torch.tensor([0, 0, 0, 1, 2, 2])
    assert following(t(1, 2, 3, 4, 5, 6), rows).tolist() == [2, 3, 0, 0, 6, 0]


def test_the_terms_of_two_tokens_by_hand():
    values = ActionValues(
        logprobs=t(-0.5, -1.0),
        q=t(0.2, 0.9),
        target_q=t(0.1, 1.0),
        q_logprobs=t(-2.0, -3.0),
        values=t(0.4, 0.6).requires_grad_(),
        rewards=t(0.0, 1.0),
        rows=torch.tensor([0, 0]),
    )
    terms = Ilql(tau=0.8, gamma=0.5, cql=0.1)(values)
    assert terms["lm"].tolist() == [0.5, 1.0]
    # targets 0 + ½ · 0.6 = 0.3 and 1 + 0
    assert terms["q"].tolist() == pytest.approx([0.01, 0.01])
    # u = 0.1 − 0.4 and 1 − 0.6: 0.2 · 0.09 and 0.8 · 0.16
    assert terms["v"].tolist() == pytest.approx([0.018, 0.128])
    assert terms["cql"].tolist() == pytest.approx([0.2, 0.3])
    assert not terms["q"].requires_grad, "V learns from no target that it is part of"


# --- the fixed point ---------------------------------------------------------------------------------------------------


def texts():
    """All responses over a (1) and b (2) that end within three tokens, and how often the data have them: b never comes
    after a, so Q(a, b) has no data."""
    rng = torch.Generator().manual_seed(3)
    found = {}
    for length in range(1, LONGEST + 1):
        for body in itertools.product((1, 2), repeat=length - 1):
            if (1, 2) not in itertools.pairwise(body):
                found[(*body, EOS)] = 0.1 + float(torch.rand((), generator=rng))
    total = sum(found.values())
    return {text: weight / total for text, weight in found.items()}


def score(text):
    return {(0,): 0.2, (1, 0): 0.9, (2, 0): 0.1, (1, 1, 0): 0.3, (2, 1, 0): 1.0, (2, 2, 0): -0.5}[
        text
    ]


def expectile(targets, weights, tau):
    """By bisection."""
    low, high = min(targets), max(targets)
    for _ in range(60):
        m = (low + high) / 2
        slope = sum(
            w * (tau if x > m else 1 - tau) * (x - m) for x, w in zip(targets, weights, strict=True)
        )
        low, high = (m, high) if slope > 0 else (low, m)
    return low


def value_iteration(tau, gamma):
    """Q and V of the data's own support, from the longest texts backwards."""
    data, q, v = texts(), {}, {}
    states = sorted({text[:n] for text in data for n in range(len(text))}, key=len, reverse=True)
    for state in states:
        actions = {}
        for text, weight in data.items():
            if text[: len(state)] == state:
                action = text[len(state)]
                actions[action] = actions.get(action, 0.0) + weight
        for action in actions:
            after = (*state, action)
            q[after] = score(after) if action == EOS else gamma * v[after]
        v[state] = expectile([q[*state, a] for a in actions], list(actions.values()), tau)
    return q, v


@pytest.mark.parametrize(("tau", "gamma"), [(0.5, 1.0), (0.8, 0.9), (0.99, 1.0)])
def test_q_and_v_come_to_rest_where_value_iteration_does(tau, gamma):
    data, (q_wanted, v_wanted) = texts(), value_iteration(tau, gamma)
    q_places = {place: i for i, place in enumerate(q_wanted)}
    v_places = {place: i for i, place in enumerate(v_wanted)}
    q = torch.zeros(len(q_places), dtype=torch.float64, requires_grad=True)
    v = torch.zeros(len(v_places), dtype=torch.float64, requires_grad=True)
    tokens = [(text, n) for text in data for n in range(len(text))]
    taken = torch.tensor([q_places[text[: n + 1]] for text, n in tokens])
    states = torch.tensor([v_places[text[:n]] for text, n in tokens])
    rows = torch.tensor([list(data).index(text) for text, _ in tokens])
    weights = t(*(data[text] for text, _ in tokens))
    rewards = t(*(score(text) if n == len(text) - 1 else 0.0 for text, n in tokens))
    loss, adam = Ilql(tau=tau, gamma=gamma, cql=0.0), torch.optim.Adam([q, v], lr=0.05)
    for step in range(1500):
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        zeros = torch.zeros(len(tokens), dtype=torch.float64)
        terms = loss(
            ActionValues(zeros, q[taken], q.detach()[taken], zeros, v[states], rewards, rows)
        )
        adam.zero_grad()
        (weights * (terms["q"] + terms["v"])).sum().backward()
        adam.step()
    assert q.tolist() == pytest.approx(list(q_wanted.values()), abs=1e-3)
    assert v.tolist() == pytest.approx(list(v_wanted.values()), abs=1e-3)


def test_near_1_tau_finds_the_best_that_the_data_do():
    _, v = value_iteration(0.999, 1.0)
    best = max(map(score, texts()))
    assert v[()] == pytest.approx(best, abs=0.02)
    assert value_iteration(0.5, 1.0)[1][()] == pytest.approx(
        sum(weight * score(text) for text, weight in texts().items()), abs=1e-9
    )
