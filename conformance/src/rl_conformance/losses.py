"""Claims about the losses of the policy and of the critic, and about means over tokens."""

import torch
from torch import Tensor

from rl_conformance import conventions, inputs, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.inputs import leaf, numbers, padded, rows, tensors_of, with_gradient
from rl_conformance.library import Library


def ppo_rows(low: float, high: float) -> tuple[list[list[float]], list[list[float]]]:
    """Return the loss of each token of the shared inputs, and its derivative by log π."""
    pairs = [
        list(zip(d, a, strict=True))
        for d, a in zip(rows(inputs.LOG_RATIOS), rows(inputs.ADVANTAGES), strict=True)
    ]
    losses = [[oracles.ppo(d, a, low, high) for d, a in row] for row in pairs]
    gradients = [[oracles.ppo_gradient(d, a, low, high) for d, a in row] for row in pairs]
    return losses, gradients


def as_mean(losses: list[list[float]], gradients: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return the token mean, and the mean over responses of means per token, each with its
    gradient."""
    count, rows_count = sum(inputs.LENGTHS), len(inputs.LENGTHS)
    of_tokens = [[g / count for g in row] for row in gradients]
    of_rows = [[g / (rows_count * len(row)) for g in row] for row in gradients]
    return (
        torch.cat([numbers(oracles.token_mean(losses)), padded(of_tokens).flatten()]),
        torch.cat([numbers(oracles.sequence_mean(losses)), padded(of_rows).flatten()]),
    )


def policy_loss(library: Library) -> Evidence:
    logprobs = leaf(inputs.NEW)
    loss = library.policy_loss(logprobs, inputs.OLD, inputs.ADVANTAGES, inputs.MASK, 0.2, 0.2)
    expected, per_response = as_mean(*ppo_rows(0.2, 0.2))
    return Evidence(
        with_gradient(loss, logprobs), expected, {conventions.SEQUENCE_MEAN: per_response}
    )


def clip_higher(library: Library) -> Evidence:
    """The first ratio, 1.245, is in the range only because of its upper end."""
    mask, old = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[-1.0, -2.0, -0.5]])
    log_ratios, advantages = (0.21875, 0.5, -0.5), (1.0, 1.0, -1.0)
    logprobs = leaf(old + torch.tensor([log_ratios]))
    loss = library.policy_loss(logprobs, old, torch.tensor([advantages]), mask, 0.2, 0.28)
    pairs = list(zip(log_ratios, advantages, strict=True))
    expected = oracles.mean([oracles.ppo(d, a, 0.2, 0.28) for d, a in pairs])
    gradients = [oracles.ppo_gradient(d, a, 0.2, 0.28) / 3 for d, a in pairs]
    return Evidence(with_gradient(loss, logprobs), numbers(expected, gradients))


def dual_clip(library: Library) -> Evidence:
    """Log-ratio 2 with A = −1: 7.39 without the cap, 3 with it."""
    mask, old = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-3.0, -1.0]])
    logprobs, advantages = leaf(torch.tensor([[-1.0, -0.875]])), torch.tensor([[-1.0, -2.0]])
    loss = library.dual_clip_loss(logprobs, old, advantages, mask, 3.0)
    expected = oracles.mean(
        [oracles.dual_clip(2.0, -1.0, 3.0), oracles.dual_clip(0.125, -2.0, 3.0)]
    )
    gradient = oracles.ppo_gradient(0.125, -2.0, 0.2, 0.2) / 2
    return Evidence(with_gradient(loss, logprobs), numbers(expected, 0.0, gradient))


def cispo(library: Library) -> Evidence:
    """Of the shared ratios, 1.65 is above the cap of 1.5."""
    logprobs = leaf(inputs.NEW)
    loss = library.cispo_loss(logprobs, inputs.OLD, inputs.ADVANTAGES, inputs.MASK, 1.5)
    tables = (inputs.NEW, inputs.LOG_RATIOS, inputs.ADVANTAGES)
    triples = [list(zip(*three, strict=True)) for three in zip(*map(rows, tables), strict=True)]
    both = [[oracles.cispo(p, d, a, 1.5) for p, d, a in row] for row in triples]
    expected, per_response = as_mean(
        [[loss for loss, _ in row] for row in both], [[slope for _, slope in row] for row in both]
    )
    alternatives = {conventions.SEQUENCE_MEAN: per_response}
    return Evidence(with_gradient(loss, logprobs), expected, alternatives)


def gspo(library: Library) -> Evidence:
    """One response with A > 0 and a ratio in the range, one with A < 0 and a ratio below it."""
    logprobs, advantages = leaf(inputs.NEW), torch.tensor([[1.0] * 4, [-2.0] * 4]) * inputs.MASK
    log_ratios = torch.tensor([[0.125, 0.25, -0.25, 0.0], [-0.5, -0.25, 0.25, -0.5]])
    loss = library.gspo_loss(logprobs, inputs.NEW - log_ratios, advantages, inputs.MASK, 0.2, 0.2)
    losses, gradients = [], []
    for row, advantage in zip(rows(log_ratios), (1.0, -2.0), strict=True):
        losses.append([oracles.ppo(oracles.mean(row), advantage, 0.2, 0.2)] * len(row))
        gradients.append([oracles.ppo_gradient(oracles.mean(row), advantage, 0.2, 0.2)] * len(row))
    per_token, expected = as_mean(losses, gradients)
    return Evidence(with_gradient(loss, logprobs), expected, {conventions.TOKEN_MEAN: per_token})


def value_loss(library: Library) -> Evidence:
    values = leaf(inputs.NEW_VALUES)
    loss = library.value_loss(values, inputs.VALUES, inputs.RETURNS, inputs.MASK, 0.25)
    triples = [
        list(zip(*three, strict=True))
        for three in zip(
            rows(inputs.NEW_VALUES), rows(inputs.VALUES), rows(inputs.RETURNS), strict=True
        )
    ]
    losses = [
        [oracles.value(new, old, target, 0.25) for new, old, target in row] for row in triples
    ]
    step = 1e-6
    gradients = [
        [
            (oracles.value(v + step, old, g, 0.25) - oracles.value(v - step, old, g, 0.25))
            / (2 * step)
            for v, old, g in row
        ]
        for row in triples
    ]
    expected, per_response = as_mean(losses, gradients)
    count = sum(inputs.LENGTHS)
    alternatives = {
        conventions.WITHOUT_HALF: 2 * expected,
        conventions.SEQUENCE_MEAN: per_response,
        conventions.ONE_FURTHER: expected
        * count
        / (count + 1),  # of a value and a return that are 0
    }
    return Evidence(with_gradient(loss, values), expected, alternatives)


# --- means ---


def token_mean(library: Library) -> Evidence:
    measured = library.token_mean(inputs.LOSSES, inputs.MASK)
    return Evidence(tensors_of([measured]), numbers(oracles.token_mean(rows(inputs.LOSSES))))


def sequence_mean(library: Library) -> Evidence:
    measured = library.sequence_mean(inputs.LOSSES, inputs.MASK)
    return Evidence(tensors_of([measured]), numbers(oracles.sequence_mean(rows(inputs.LOSSES))))


def fixed_length_mean(library: Library) -> Evidence:
    measured = library.fixed_length_mean(inputs.LOSSES, inputs.MASK, 8)
    expected = oracles.fixed_length_mean(rows(inputs.LOSSES), 8)
    alternatives = {conventions.NOT_PER_RESPONSE: numbers(2 * expected)}
    return Evidence(tensors_of([measured]), numbers(expected), alternatives)


CLAIMS = (
    Claim(
        "losses/ppo",
        "−min(ρA, clip(ρ, 0.8, 1.2) A), value and gradient in all six cases, mean over tokens.",
        "Schulman et al. 2017, eq. 7",
        ("policy_loss",),
        policy_loss,
    ),
    Claim(
        "losses/clip-higher",
        "The range of the ratio may be wider above: 0.8 to 1.28.",
        "Yu et al. 2025, section 3.1",
        ("policy_loss",),
        clip_higher,
    ),
    Claim(
        "losses/dual-clip",
        "Where A < 0 the loss is not above 3·|A|, and there it has no gradient.",
        "Ye et al. 2020, eq. 5",
        ("dual_clip_loss",),
        dual_clip,
    ),
    Claim(
        "losses/cispo",
        "−sg[min(ρ, 1.5)] A log π, value and gradient: the weight is cut, the gradient stays.",
        "MiniMax-M1 2025, eq. 4",
        ("cispo_loss",),
        cispo,
    ),
    Claim(
        "losses/gspo",
        "The clip acts on exp(mean log-ratio) of the response; value and gradient.",
        "Zheng et al. 2025, eq. 5",
        ("gspo_loss",),
        gspo,
    ),
    Claim(
        "losses/value",
        "½ max((V − G)², (clip(V, V_old ± c) − G)²), value and gradient, mean over tokens.",
        "OpenAI baselines, ppo2",
        ("value_loss",),
        value_loss,
    ),
    Claim(
        "means/tokens",
        "Each token weighs the same.",
        "Yu et al. 2025, eq. 8",
        ("token_mean",),
        token_mean,
    ),
    Claim(
        "means/responses",
        "Each response weighs the same, and in it each token.",
        "Shao et al. 2024, eq. 3",
        ("sequence_mean",),
        sequence_mean,
    ),
    Claim(
        "means/fixed-length",
        "The sum over tokens, divided by the number of responses and a constant length.",
        "Liu et al. 2025, eq. 3",
        ("fixed_length_mean",),
        fixed_length_mean,
    ),
)
