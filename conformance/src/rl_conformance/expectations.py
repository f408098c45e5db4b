"""Claims about expected gradients, by enumeration of every response of a vocabulary of three.

A policy is a table of logits, one row per state. The expectation of a gradient over what it samples
is a finite sum, so it is compared with the exact gradient of the objective, without noise.
"""

import itertools

import torch
from torch import Tensor

from rl_conformance import conventions, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.inputs import tensors_of
from rl_conformance.library import Library

VOCABULARY, BETA = 3, 0.5
RESPONSES = list(itertools.product(range(VOCABULARY), repeat=2))
STATES = torch.tensor([[0, 1 + first] for first, _ in RESPONSES])
"""The state in which each response chooses its tokens: the prompt, then its first token."""
TOKENS = torch.tensor(RESPONSES)
SCORES = torch.tensor([1.0, -0.5, 0.25, 0.75, 0.0, -1.0, 0.5, 1.5, -0.25])
POLICY = torch.tensor([[0.5, -0.25, 0.0], [1.0, 0.0, -0.5], [0.25, 0.5, -1.0], [0.0, -0.75, 0.5]])
REFERENCE = torch.tensor([[0.0, 0.5, -0.5], [0.25, -0.5, 1.0], [0.0, 0.0, 0.5], [-1.0, 0.25, 0.0]])


def logprobs_of(logits: Tensor) -> Tensor:
    """Return the log-probs of the tokens of all responses [9 2]."""
    return logits.log_softmax(dim=-1)[STATES, TOKENS]


def optimum(beta: float) -> Tensor:
    """Return logits of π* ∝ π_ref exp(score / β), the maximum of E[score] − β KL, in float64."""
    joint = (logprobs_of(REFERENCE.double()).sum(dim=1) + SCORES.double() / beta).reshape(3, 3)
    first = joint.logsumexp(dim=1)
    return torch.cat([first[None], joint - first[:, None]])


def objective(logits: Tensor, beta: float) -> Tensor:
    """Return E[score] − β KL(π ‖ π_ref)."""
    own, reference = logprobs_of(logits), logprobs_of(REFERENCE.double())
    chance = own.sum(dim=1).exp()
    return (chance * (SCORES.double() - beta * (own - reference).sum(dim=1))).sum()


def expected_gradient(library: Library, logits: Tensor, beta: float) -> Tensor:
    """Return Σ_y π(y) ∇ loss(y), the loss being the library's policy loss at ratio 1 of returns to
    go of its k1 in the reward and the score on the last token."""
    parameters = logits.float().clone().requires_grad_()
    own, reference = logprobs_of(parameters), logprobs_of(REFERENCE)
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses = []
    for row, score in enumerate(SCORES.tolist()):
        old = own[row : row + 1].detach()
        rewards = -beta * library.k1(old, reference[row : row + 1])[0]
        returns = oracles.returns([rewards[0].item(), rewards[1].item() + score], 1.0)
        advantages = torch.tensor([returns])
        losses.append(library.policy_loss(own[row : row + 1], old, advantages, mask, 0.2, 0.2))
    chances = own.detach().sum(dim=1).exp()
    total = (chances * torch.stack(losses)).sum()
    return torch.autograd.grad(total, parameters)[0]


def closed_form(library: Library) -> Evidence:
    """At the optimum the gradient is 0; elsewhere it is that of the objective, halved because the
    loss is a mean over two tokens."""
    parameters = POLICY.double().clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective(parameters, BETA), parameters)
    measured = [
        expected_gradient(library, optimum(BETA), BETA),
        expected_gradient(library, POLICY, BETA),
    ]
    return Evidence(tensors_of(measured), tensors_of([torch.zeros_like(exact), -exact / 2]))


# --- one token: groups of two, and KL in the loss ---


def groups_of_two(library: Library, operation: str) -> Tensor:
    """Return the expected gradient of the policy loss over all pairs of one-token responses."""
    parameters = POLICY[0].clone().requires_grad_()
    own, scores = parameters.log_softmax(dim=0), SCORES[:3]
    mask, groups = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    total = torch.zeros(())
    for pair in itertools.product(range(VOCABULARY), repeat=2):
        logprobs = own[list(pair)][:, None]
        advantages = getattr(library, operation)(scores[list(pair)], groups)[:, None]
        loss = library.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.2)
        total = total + logprobs.detach().sum().exp() * loss
    return torch.autograd.grad(total, parameters)[0]


def unbiased(operation: str, share: float) -> Claim:
    def check(library: Library) -> Evidence:
        parameters = POLICY[0].double().clone().requires_grad_()
        expectation = (parameters.softmax(dim=0) * SCORES[:3].double()).sum()
        (exact,) = torch.autograd.grad(expectation, parameters)
        measured = groups_of_two(library, operation)
        return Evidence(tensors_of([measured]), tensors_of([-share * exact]))

    times = "" if share == 1 else ", times 1 − 1/n"
    return Claim(
        f"expectations/{operation.replace('_', '-')}",
        f"Over all groups of two, the policy loss has the gradient of −E[score]{times}.",
        "policy gradient theorem, by enumeration",
        (operation, "policy_loss"),
        check,
    )


def kl_loss(is_off_policy: bool) -> Claim:
    """The expected gradient of the KL term, under the policy that sampled, against ∇KL(π‖π_ref)."""

    def check(library: Library) -> Evidence:
        parameters = POLICY[0].clone().requires_grad_()
        own, reference = parameters.log_softmax(dim=0), REFERENCE[0].log_softmax(dim=0)
        old = (POLICY[1].log_softmax(dim=0) if is_off_policy else own).detach()
        term = library.kl_loss(own[:, None], old[:, None], reference[:, None])[:, 0]
        (measured,) = torch.autograd.grad(
            (old.exp() * term).sum(), parameters, materialize_grads=True
        )
        exact, *others = exact_gradients(old.double())
        alternatives = dict(
            zip(
                (conventions.AS_K3, conventions.AS_K1, conventions.WITHOUT_RATIO),
                (tensors_of([each]) for each in others),
                strict=True,
            )
        )
        return Evidence(tensors_of([measured]), tensors_of([exact]), alternatives)

    where = "off-policy" if is_off_policy else "on-policy"
    return Claim(
        f"expectations/kl-loss-{where}",
        f"The KL term of the loss has, in expectation and {where}, the gradient of KL(π ‖ π_ref).",
        "by enumeration; Schulman 2020 is about values",
        ("kl_loss",),
        check,
    )


def exact_gradients(old: Tensor) -> list[Tensor]:
    """Return the gradient of KL(π ‖ π_ref), and those that k3 and k1 have as losses on what π_old
    sampled, and k3 with the gradient of its own probability, by autograd over the whole
    vocabulary."""
    parameters = POLICY[0].double().clone().requires_grad_()
    own, reference = parameters.log_softmax(dim=0), REFERENCE[0].double().log_softmax(dim=0)
    difference = own - reference
    k3 = (-difference).exp() - 1 + difference
    terms = [
        (own.exp() * difference).sum(),
        (old.exp() * k3).sum(),
        (old.exp() * difference).sum(),
        (old.exp() * (own - own.detach()).exp() * k3).sum(),
    ]
    return [torch.autograd.grad(each, parameters, retain_graph=True)[0] for each in terms]


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "expectations/closed-form",
        "With k1 in the reward the policy loss has, in expectation, the gradient of "
        "E[score] − β KL: 0 at π* ∝ π_ref exp(score / β).",
        "by enumeration; Ziegler et al. 2019, eq. 2",
        ("k1", "policy_loss"),
        closed_form,
    ),
    unbiased("rloo", 1.0),
    unbiased("dr_grpo", 0.5),
    kl_loss(is_off_policy=False),
    kl_loss(is_off_policy=True),
)
