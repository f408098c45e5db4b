"""Claims about log-probs, estimators of the KL, and advantages: the numbers of their formulas."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rl_conformance import conventions, inputs, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.inputs import numbers, padded, rows, tensors_of
from rl_conformance.library import Library

# --- log-probs and KL ---

LOGITS = torch.tensor([[[0.5, -1.0, 2.0], [0.0, 0.25, -0.75]], [[3.0, 1.0, 1.5], [-2.0, 0.5, 0.5]]])
IDS = torch.tensor([[0, 2], [1, 1]])


def logprobs_of(logits: Tensor) -> list[float]:
    return [
        oracles.log_softmax(step)[token]
        for row, ids in zip(logits.tolist(), IDS.tolist(), strict=True)
        for step, token in zip(row, ids, strict=True)
    ]


def token_logprobs(library: Library) -> Evidence:
    return Evidence(
        tensors_of([library.token_logprobs(LOGITS.clone(), IDS)]), numbers(logprobs_of(LOGITS))
    )


ESTIMATORS: dict[str, tuple[str, Callable[[float], float]]] = {
    "k1": ("d", lambda d: d),
    "k2": ("d² / 2", lambda d: d**2 / 2),
    "k3": ("exp(−d) − 1 + d", lambda d: math.expm1(-d) + d),
}


def estimator(name: str) -> Claim:
    text, formula = ESTIMATORS[name]

    def check(library: Library) -> Evidence:
        measured = getattr(library, name)(inputs.NEW, inputs.REFERENCE)[inputs.MASK]
        expected = [formula(d) for d in (inputs.NEW - inputs.REFERENCE)[inputs.MASK].tolist()]
        return Evidence(tensors_of([measured]), numbers(expected))

    sentence = f"{name} of a token is {text} with d = log π − log π_ref."
    return Claim(
        f"kl/{name}", sentence, "Schulman 2020, Approximating KL divergence", (name,), check
    )


# --- advantages ---


def gae_rows(gamma: float, lam: float) -> tuple[list[list[float]], list[list[float]]]:
    """Return advantages and returns of the shared inputs."""
    values = rows(inputs.VALUES)
    advantages = [
        oracles.gae(r, v, gamma, lam) for r, v in zip(rows(inputs.REWARDS), values, strict=True)
    ]
    targets = [
        [a + x for a, x in zip(row, v, strict=True)]
        for row, v in zip(advantages, values, strict=True)
    ]
    return advantages, targets


def gae(library: Library) -> Evidence:
    advantages, targets = library.gae(inputs.REWARDS, inputs.VALUES, inputs.MASK, 0.875, 0.75)
    expected = gae_rows(0.875, 0.75)
    return Evidence(
        tensors_of([advantages[inputs.MASK], targets[inputs.MASK]]),
        tensors_of([padded(each)[inputs.MASK] for each in expected]),
    )


def gae_with_gap(library: Library) -> Evidence:
    """The response has 2 tokens, one of a tool, and 1 more token."""
    mask = torch.tensor([[True, True, False, True]])
    rewards, values = torch.tensor([[0.0, 0.5, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.0, 0.75]])
    advantages, _ = library.gae(rewards, values, mask, 0.875, 0.75)
    stepped_over = oracles.gae([0.0, 0.5, 1.0], [0.5, 0.25, 0.75], 0.875, 0.75)
    all_states = oracles.gae(rewards[0].tolist(), values[0].tolist(), 0.875, 0.75)
    return Evidence(
        tensors_of([advantages[mask]]),
        numbers(stepped_over),
        {conventions.CONTIGUOUS: numbers([all_states[t] for t in (0, 1, 3)])},
    )


def token_rewards(library: Library) -> Evidence:
    """The padding of the first response is part of what is compared: it has no reward."""
    scores = torch.tensor([1.5, -0.5])
    measured = library.token_rewards(scores, inputs.OLD, inputs.REFERENCE, inputs.MASK, 0.25)
    table = zip(scores.tolist(), rows(inputs.OLD), rows(inputs.REFERENCE), strict=True)
    expected = padded([oracles.token_rewards(score, p, q, 0.25) for score, p, q in table])
    later = expected.clone()
    later[0, 2:] += torch.tensor([-1.5, 1.5])
    return Evidence(
        tensors_of([measured]), expected.flatten(), {conventions.AFTER_THE_END: later.flatten()}
    )


def returns(library: Library) -> Evidence:
    expected = [oracles.returns(row, 0.875) for row in rows(inputs.REWARDS)]
    return Evidence(
        tensors_of([library.returns(inputs.REWARDS, inputs.MASK, 0.875)[inputs.MASK]]),
        padded(expected)[inputs.MASK],
    )


def whitened(measured: Tensor, table: list[list[float]]) -> Evidence:
    flat = [x for row in table for x in row]
    return Evidence(
        tensors_of([measured[inputs.MASK]]),
        numbers(oracles.whiten(flat)),
        {conventions.SAMPLE_DEVIATION: numbers(oracles.whiten(flat, less=1))},
    )


def whiten(library: Library) -> Evidence:
    return whitened(
        library.whiten(inputs.ADVANTAGES, inputs.MASK), [list(r) for r in rows(inputs.ADVANTAGES)]
    )


def reinforce_pp(library: Library) -> Evidence:
    measured = library.reinforce_pp(inputs.REWARDS, inputs.MASK, 0.875)
    return whitened(measured, [oracles.returns(row, 0.875) for row in rows(inputs.REWARDS)])


def grpo(library: Library) -> Evidence:
    scores, groups = inputs.SCORES.tolist(), inputs.GROUPS.tolist()
    return Evidence(
        tensors_of([library.grpo(inputs.SCORES, inputs.GROUPS)]),
        numbers(oracles.grpo(scores, groups)),
        {conventions.POPULATION_DEVIATION: numbers(oracles.grpo(scores, groups, less=0))},
    )


def dr_grpo(library: Library) -> Evidence:
    expected = oracles.dr_grpo(inputs.SCORES.tolist(), inputs.GROUPS.tolist())
    return Evidence(tensors_of([library.dr_grpo(inputs.SCORES, inputs.GROUPS)]), numbers(expected))


def rloo(library: Library) -> Evidence:
    expected = oracles.rloo(inputs.SCORES.tolist(), inputs.GROUPS.tolist())
    return Evidence(tensors_of([library.rloo(inputs.SCORES, inputs.GROUPS)]), numbers(expected))


GRPO, DR_GRPO = "Shao et al. 2024, section 4.1.2", "Liu et al. 2025, eq. 3"

CLAIMS = (
    Claim(
        "log-probs/value",
        "The log-prob of a token is its logit less the log of the sum of exponentials.",
        "definition",
        ("token_logprobs",),
        token_logprobs,
    ),
    *[estimator(name) for name in ("k1", "k2", "k3")],
    Claim(
        "rewards/kl-and-score",
        "−β k1 is the reward of each token, and the last one has the score, too; padding has none.",
        "Ziegler et al. 2019, eq. 2",
        ("token_rewards",),
        token_rewards,
    ),
    Claim(
        "advantages/gae",
        "A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t, V = 0 after the last token; the "
        "critic's targets are A + V.",
        "Schulman et al. 2016, eq. 16",
        ("gae",),
        gae,
    ),
    Claim(
        "advantages/gae-of-turns",
        "GAE steps over tokens that the policy did not sample.",
        "they are part of the environment's transition",
        ("gae",),
        gae_with_gap,
    ),
    Claim(
        "advantages/returns",
        "G_t = Σ_k γ^k r_{t+k} over a response's own tokens.",
        "Sutton & Barto, eq. 3.8",
        ("returns",),
        returns,
    ),
    Claim(
        "advantages/whitening",
        "Whitening divides by the deviation of the population, over the tokens of the mask.",
        "Ziegler et al. 2019, their code",
        ("whiten",),
        whiten,
    ),
    Claim(
        "advantages/reinforce++",
        "REINFORCE++: returns to go, whitened over all tokens (deviation of the population).",
        "Hu 2025",
        ("reinforce_pp",),
        reinforce_pp,
    ),
    Claim(
        "advantages/grpo",
        "(r − mean) / deviation of the sample within the group, but for an ε beside it.",
        GRPO,
        ("grpo",),
        grpo,
        tolerance=5e-4,
    ),
    Claim("advantages/dr-grpo", "r − mean of the group.", DR_GRPO, ("dr_grpo",), dr_grpo),
    Claim(
        "advantages/rloo",
        "r − mean of the others of the group.",
        "Ahmadian et al. 2024, section 3.3",
        ("rloo",),
        rloo,
    ),
)
