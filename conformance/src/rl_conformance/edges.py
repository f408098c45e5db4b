"""Claims about what seldom happens: groups without signal, ratios beyond any clip, probabilities
near 0, responses without tokens."""

import math
from collections.abc import Callable

import torch

from rl_conformance import conventions, inputs, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.inputs import leaf, numbers, rows, tensors_of, with_gradient
from rl_conformance.library import Library

EPSILONS = (1e-4, 1e-5, 1e-6, 1e-8)


# --- groups ---


def equal_scores(operation: str) -> Claim:
    """float32 noise of a mean over a deviation that is noise too gives anything."""

    def check(library: Library) -> Evidence:
        scores, groups = torch.full((7,), 0.7), torch.zeros(7, dtype=torch.long)
        return Evidence(
            tensors_of([getattr(library, operation)(scores, groups)]), numbers([0.0] * 7)
        )

    return Claim(
        f"groups/equal-scores-{operation.replace('_', '-')}",
        "Seven responses that all score 0.7 have advantages of 0, within 0.001.",
        "identity",
        (operation,),
        check,
        tolerance=1e-3,
    )


def group_of_one(operation: str) -> Claim:
    def check(library: Library) -> Evidence:
        measured = getattr(library, operation)(torch.tensor([1.5]), torch.tensor([0]))
        return Evidence(tensors_of([measured]), numbers(0.0), {conventions.RAW_SCORE: numbers(1.5)})

    return Claim(
        f"groups/of-one-{operation.replace('_', '-')}",
        "A response that nothing is compared with has the advantage 0.",
        "no baseline, no signal",
        (operation,),
        check,
    )


def small_scores(library: Library) -> Evidence:
    """Scores a thousandth of the shared ones: the ratio to the deviation is the same."""
    scores, groups = (inputs.SCORES / 1024).tolist(), inputs.GROUPS.tolist()
    alternatives = {
        conventions.epsilon(eps): numbers(oracles.grpo(scores, groups, eps=eps)) for eps in EPSILONS
    }
    measured = tensors_of([library.grpo(inputs.SCORES / 1024, inputs.GROUPS)])
    return Evidence(measured, numbers(oracles.grpo(scores, groups)), alternatives)


# --- ratios ---


def ratio(
    log_ratio: float, advantage: float, expected: tuple[float, float]
) -> Callable[[Library], Evidence]:
    """Check the loss and the gradient of one token."""

    def check(library: Library) -> Evidence:
        mask, old = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[-max(log_ratio, 0.0) - 1]])
        logprobs = leaf(old + log_ratio)
        loss = library.policy_loss(logprobs, old, torch.tensor([[advantage]]), mask, 0.2, 0.2)
        held = math.exp(20.0) * -advantage
        alternatives = {
            conventions.HELD_AT_20: numbers(held, 0.0),
            conventions.DUAL_CLIP: numbers(-3 * advantage, 0.0),
        }
        return Evidence(with_gradient(loss, logprobs), numbers(*expected), alternatives)

    return check


# --- KL far from the reference ---


def far_from_reference(name: str, difference: float, value: float, gradient: float) -> Claim:
    def check(library: Library) -> Evidence:
        logprobs = leaf(torch.tensor([[min(difference, 0.0) - 1]]))
        reference = torch.tensor([[min(difference, 0.0) - 1 - difference]])
        estimate = getattr(library, name)(logprobs, reference).sum()
        cut = math.copysign(10.0, value)
        return Evidence(
            with_gradient(estimate, logprobs),
            numbers(value, gradient),
            {conventions.CUT_AT_10: numbers(cut, 0.0)},
        )

    return Claim(
        f"kl/{name}-far",
        f"{name} and its gradient at log π − log π_ref = {difference:g}.",
        "Schulman 2020; where the gradient is needed most",
        (name,),
        check,
    )


# --- others ---


def response_without_tokens(library: Library) -> Evidence:
    mask = torch.cat([inputs.MASK, torch.zeros(1, 4, dtype=torch.bool)])
    losses = torch.cat([inputs.LOSSES, torch.zeros(1, 4)])
    expected = oracles.sequence_mean(rows(inputs.LOSSES))
    alternatives = {conventions.EMPTY_IS_ZERO: numbers(expected * 2 / 3)}
    measured = library.sequence_mean(losses, mask)
    return Evidence(tensors_of([measured]), numbers(expected), alternatives)


def unlikely_token(library: Library) -> Evidence:
    logits = torch.tensor([[[0.0, 10000.0, -10000.0]]])
    both = [library.token_logprobs(logits.clone(), torch.tensor([[token]])) for token in (0, 1)]
    return Evidence(tensors_of(both), numbers(-10000.0, 0.0))


def exp(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).exp())


GROUPED = ("grpo", "dr_grpo", "rloo")
CLAIMS: tuple[Claim, ...] = (
    *[equal_scores(operation) for operation in GROUPED],
    *[group_of_one(operation) for operation in ("grpo", "rloo")],
    Claim(
        "groups/small-scores",
        "Scores that are 1024 times smaller have the same normalised advantages.",
        "identity",
        ("grpo",),
        small_scores,
        tolerance=2e-4,
    ),
    Claim(
        "ratios/far-above-clipped",
        "log-ratio 100, A = 1: the clip gives a loss of −1.2 and a gradient of 0.",
        "Schulman et al. 2017, eq. 7",
        ("policy_loss",),
        ratio(100.0, 1.0, (-1.2, 0.0)),
    ),
    Claim(
        "ratios/far-above",
        "log-ratio 22, A = −1: the clip does not act, loss and gradient are e²².",
        "Schulman et al. 2017, eq. 7",
        ("policy_loss",),
        ratio(22.0, -1.0, (exp(22.0), exp(22.0))),
        tolerance=1e-4,
    ),
    Claim(
        "ratios/far-below",
        "log-ratio −100, A = −1: the clip gives a loss of 0.8 and a gradient of 0.",
        "Schulman et al. 2017, eq. 7",
        ("policy_loss",),
        ratio(-100.0, -1.0, (0.8, 0.0)),
    ),
    far_from_reference("k1", 30.0, 30.0, 1.0),
    far_from_reference("k2", 6.0, 18.0, 6.0),
    far_from_reference("k3", -5.0, exp(5.0) - 6, 1 - exp(5.0)),
    Claim(
        "means/without-tokens",
        "A response without tokens does not count in the mean over responses.",
        "it has no mean",
        ("sequence_mean",),
        response_without_tokens,
    ),
    Claim(
        "log-probs/unlikely",
        "A token whose logit is 10,000 below the highest has the log-prob −10,000.",
        "definition",
        ("token_logprobs",),
        unlikely_token,
    ),
)
