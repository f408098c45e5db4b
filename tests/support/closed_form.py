"""A token environment small enough to enumerate, and its optimum in closed form.

Responses are made of four tokens, of which token 0 ends them; after three tokens they are cut off: 40 responses, 13 states.
Every response has a score and the reference is a fixed random policy, so that the policy which maximises
E[score] − β KL(π ‖ π_ref) is known: π* ∝ π_ref exp(score / β). An algorithm trains a table of logits on it through
`Algorithm.experience` and `Algorithm.loss`, as they are, either with exact expectations (every response, weighted by its
probability; every pair of responses where groups are compared) or with samples. What is measured is the total variation
between what it converges to and π*.

`closed_form_tables.py` writes the tables of docs/algorithms.md.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch

from quartet.algorithms.advantages import AsEstimated
from quartet.algorithms.aggregation import SequenceMean, TokenMean
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.baselines import GroupMean, LeaveOneOut, ReturnToGo
from quartet.algorithms.kl import FixedCoef, KLInLoss, KLInReward, NoKL, exact_kl
from quartet.algorithms.policy_loss import ImportanceWeighted
from quartet.algorithms.presets import ALGORITHMS
from quartet.experience import Batch, Experience

V, L, EOS, BETA = 4, 3, 0, 0.5

PREFIXES = [p for n in range(L) for p in itertools.product(range(1, V), repeat=n)]
STATE = {prefix: i for i, prefix in enumerate(PREFIXES)}
RESPONSES = [(*p, EOS) for p in PREFIXES] + [
    (*p, t) for p in PREFIXES if len(p) == L - 1 for t in range(1, V)
]
RNG = torch.Generator().manual_seed(20)
SCORES = 2 * torch.rand(len(RESPONSES), generator=RNG, dtype=torch.float64) - 1
REFERENCE = torch.randn(len(PREFIXES), V, generator=RNG, dtype=torch.float64)

# Column 0 is the prompt. `VISITED[r, t]` is the state in which response r chose its token t, `CHOSEN[r, t]` that token.
LENGTHS = torch.tensor([len(r) for r in RESPONSES])
MASK = (torch.arange(L + 1) >= 1) & (torch.arange(L + 1) <= LENGTHS[:, None])
CHOSEN = torch.tensor([[0, *r, *[0] * (L - len(r))] for r in RESPONSES])
VISITED = torch.tensor(
    [[0, *[STATE[r[:t]] for t in range(len(r))], *[0] * (L - len(r))] for r in RESPONSES]
)


def token_logprobs(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, L + 1] log-probs of the tokens of these responses."""
    logprobs = logits.log_softmax(-1)[VISITED[rows], CHOSEN[rows]]
    return torch.where(MASK[rows], logprobs, 0.0)


def distribution(logits: torch.Tensor) -> torch.Tensor:
    """The probability of each response."""
    return token_logprobs(logits, torch.arange(len(RESPONSES))).sum(dim=1).exp()


def optimum(beta: float = BETA) -> torch.Tensor:
    """π* ∝ π_ref exp(score / β)."""
    weights = distribution(REFERENCE) * (SCORES / beta).exp()
    return weights / weights.sum()


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@dataclass(frozen=True)
class Reached:
    """Where an algorithm came to rest."""

    distance: float
    """Total variation to π*."""
    score: float
    kl: float


def reached(logits: torch.Tensor) -> Reached:
    p, ref = distribution(logits), distribution(REFERENCE)
    kl = torch.where(p > 0, p * (p / ref).log(), 0.0).sum()
    return Reached(total_variation(p, optimum()), float(p @ SCORES), float(kl))


def make_batch(
    logits: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor, values: torch.Tensor
) -> Batch:
    mask = MASK[rows]
    old = token_logprobs(logits, rows).detach()
    kl = exact_kl(logits.detach().log_softmax(-1), REFERENCE.log_softmax(-1))
    entropy = -(logits.detach().softmax(-1) * logits.detach().log_softmax(-1)).sum(-1)
    return Batch(
        ids=tuple(str(i) for i in range(len(rows))),
        tokens=CHOSEN[rows],
        lengths=1 + LENGTHS[rows],
        response_mask=mask,
        scores=SCORES[rows],
        ended=CHOSEN[rows].gather(1, LENGTHS[rows][:, None])[:, 0] == EOS,
        groups=groups,
        rollout_logprobs=old,
        old_logprobs=old,
        ref_logprobs=token_logprobs(REFERENCE, rows),
        exact_kl=torch.where(mask, kl[VISITED[rows]], 0.0),
        entropy=torch.where(mask, entropy[VISITED[rows]], 0.0),
        values=torch.where(mask, values[VISITED[rows]], 0.0),
        state_values=torch.where(mask, values[VISITED[rows]], math.nan),
        greedy_scores=SCORES[greedy(logits)].expand(len(rows)),
    )


def greedy(logits: torch.Tensor) -> int:
    prefix: tuple[int, ...] = ()
    while len(prefix) < L:
        token = int(logits[STATE[prefix]].argmax())
        prefix = (*prefix, token)
        if token == EOS:
            break
    return RESPONSES.index(prefix)


def exact_values(algorithm: Algorithm, logits: torch.Tensor) -> torch.Tensor:
    """What a perfect critic says of each state: the expected token rewards from there on."""
    everything = torch.arange(len(RESPONSES))
    batch = make_batch(
        logits, everything, everything, torch.zeros(len(PREFIXES), dtype=torch.float64)
    )
    to_go = algorithm.token_rewards(batch).flip(1).cumsum(1).flip(1)
    weights = distribution(logits.detach())[:, None].expand_as(to_go)[MASK]
    visited = VISITED[MASK]
    total = torch.zeros(len(PREFIXES), dtype=torch.float64).index_add_(
        0, visited, weights * to_go[MASK]
    )
    return total / torch.zeros(len(PREFIXES), dtype=torch.float64).index_add_(0, visited, weights)


def gradients(
    algorithm: Algorithm,
    made: Experience,
    logits: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Of the algorithm's loss with respect to the tables of logits and values. Rows do not mix in the loss, so that a row may
    be given a weight by scaling the gradient of its log-probs."""
    state = torch.where(MASK[rows], VISITED[rows], 0)
    now = {
        "logprobs": token_logprobs(logits, rows),
        "entropy": -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)[state],
        "values": values[state],
        "exact_kl": exact_kl(logits.log_softmax(-1), REFERENCE.log_softmax(-1))[state],
    }
    leaves = {name: x.detach().requires_grad_() for name, x in now.items()}
    denominators = (
        algorithm.denominators(made)
        if weights is None
        else dict.fromkeys(algorithm.denominators(made), 1.0)
    )
    loss = sum(algorithm.loss(made, Forward(**leaves), denominators).values())
    per_row = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    scale = 1.0 if weights is None else weights[:, None]
    surrogate = sum(
        (scale * g * now[name]).sum()
        for name, g in zip(leaves, per_row, strict=True)
        if g is not None
    )
    found = torch.autograd.grad(surrogate, [logits, values], allow_unused=True)
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip((logits, values), found, strict=True)
    ]


@dataclass(frozen=True)
class Sampling:
    """What a step learns from."""

    samples: int = 0
    """Responses per step; 0: every response, or every pair where others are compared with, weighted by its probability."""
    group: int = 8
    epochs: int = 1
    """Updates from the responses of one step, all but the first of them off-policy."""

    def draw(
        self, algorithm: Algorithm, p: torch.Tensor, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Responses, their groups, and their weights."""
        everything = torch.arange(len(RESPONSES))
        if self.samples:
            rows = torch.multinomial(p, self.samples, replacement=True, generator=rng)
            return rows, torch.arange(self.samples) // self.group, None
        if algorithm.needs_group or getattr(algorithm.kl, "baseline", "none") != "none":
            pairs = torch.cartesian_prod(everything, everything)
            groups = torch.arange(len(pairs)).repeat_interleave(2)
            return pairs.flatten(), groups, p[pairs].prod(dim=1).repeat_interleave(2)
        return everything, everything, p


def train(
    algorithm: Algorithm,
    sampling: Sampling = Sampling(),
    steps: int = 2000,
    lr: float = 0.1,
    seed: int = 0,
) -> Reached:
    """Gradient steps from the reference until the rate has gone to 0: with exact expectations, or with sampled responses and a
    critic that is learnt along."""
    logits = REFERENCE.clone().requires_grad_()
    values = torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits, values], lr=lr, betas=(0.9, 0.99), eps=1e-6)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        if step % sampling.epochs == 0:
            old = logits.detach().clone()
            rows, groups, weights = sampling.draw(algorithm, distribution(old), rng)
            knows = algorithm.num_continuations or (algorithm.needs_critic and not sampling.samples)
            judge = exact_values(algorithm, old) if knows else values.detach().clone()
            made = algorithm.experience(make_batch(old, rows, groups, judge))
        adam.zero_grad()
        critic = judge.requires_grad_() if knows else values
        logits.grad, values.grad = gradients(algorithm, made, logits, critic, rows, weights)
        adam.step()
    return reached(logits.detach())


# --- what is compared ----------------------------------------------------------------------------------------------------


def at_beta(algorithm: Algorithm) -> Algorithm:
    """The preset with the environment's β, held fixed."""
    return dataclasses.replace(
        algorithm, kl=dataclasses.replace(algorithm.kl, coef=BETA, controller=FixedCoef())
    )


BATCH_STATISTICS = {"lm_human_preferences", "moss_ppo_max"}
"""Their token rewards depend on the other rows of the batch: there is no expectation over single responses."""

PRESETS = {name: at_beta(a) for name, a in ALGORITHMS.items() if not isinstance(a.kl, NoKL)}
"""The presets that hold a policy to its reference: those whose objective may be E[score] − β KL."""


def placement(kl: KLInReward | KLInLoss, **parts: object) -> Algorithm:
    """−ρ A with the return for an advantage: nothing between the penalty and its gradient."""
    frame = {
        "advantage": ReturnToGo(),
        "aggregation": TokenMean(),
        "policy_loss": ImportanceWeighted(),
    }
    return Algorithm(kl=kl, **(frame | parts))


def in_reward(estimator: str) -> KLInReward:
    return KLInReward(estimator=estimator, coef=BETA)


def in_loss(estimator: str, weight: str = "none") -> KLInLoss:
    return KLInLoss(estimator=estimator, coef=BETA, weight=weight)


BY_SEQUENCE = in_loss("k1", "sequence")
PLACEMENTS: dict[str, Algorithm] = {
    **{
        f"in the reward, {e}": placement(in_reward(e))
        for e in ("k1", "k2", "k3", "abs", "squared", "exact")
    },
    **{
        f"in the loss, {e}": placement(in_loss(e))
        for e in ("k1", "k2", "k3", "abs", "squared", "exact")
    },
    **{f"in the loss, {e}, weight token": placement(in_loss(e, "token")) for e in ("k1", "k3")},
    **{
        f"in the loss, {e}, weight sequence": placement(in_loss(e, "sequence"))
        for e in ("k1", "k3", "exact")
    },
    **{
        f"in the loss, {e}, weight sequence, baseline": placement(
            KLInLoss(estimator=e, coef=BETA, weight="sequence", baseline="leave_one_out")
        )
        for e in ("k1", "k3", "exact")
    },
    "in the reward, k1; group mean": placement(in_reward("k1"), advantage=GroupMean(std="none")),
    "in the reward, k1; group mean / deviation": placement(in_reward("k1"), advantage=GroupMean()),
    "in the reward, k1; return to go, mean over each response": placement(
        in_reward("k1"), aggregation=SequenceMean()
    ),
    "in the loss, k1, weight sequence; leave one out": placement(
        BY_SEQUENCE, advantage=LeaveOneOut()
    ),
    "in the loss, k1, weight sequence; group mean": placement(
        BY_SEQUENCE, advantage=GroupMean(std="none")
    ),
    "in the loss, k1, weight sequence; group mean / deviation": placement(
        BY_SEQUENCE, advantage=GroupMean()
    ),
}

WHY_NOT = {
    "in the reward, k2": "a policy gradient treats the reward as a constant and misses E[∇k2]",
    "in the reward, k3": "as k2: E[∇k3] is not 0",
    "in the reward, abs": "another penalty",
    "in the reward, squared": "another penalty",
    "in the reward, exact": "it does not depend on the sampled token, so that token is not penalized for it",
    "in the loss, k1": "E[∇k1] = 0: no constraint at all",
    "in the loss, k2": "the right gradient for each token, without its effect on later tokens",
    "in the loss, k3": "its sampled gradient is that of KL(π_ref ‖ π)",
    "in the loss, abs": "another penalty",
    "in the loss, squared": "k2 with twice the coefficient",
    "in the loss, exact": "as k2: right for each token, without its effect on later tokens",
    "in the loss, k1, weight token": "as k2",
    "in the loss, k3, weight token": "as k2",
    "in the reward, k1; return to go, mean over each response": "each token of a short response counts more",
    "in the loss, k1, weight sequence; group mean": "the response's own score in the mean shrinks rewards by 1 − 1/n: β is n / (n − 1) times as large",
    "in the loss, k1, weight sequence; group mean / deviation": "rewards are divided by their standard deviation, the KL is not",
    "a2c": "its entropy bonus of 0.01",
    "grpo": "k3 in the loss, standard deviation, mean over each response",
    "vineppo": "k3 in the loss; whitening scales advantages and not the KL",
    "reinforce_pp_baseline": "k2 in the loss with whitened rewards",
    "on_policy_distillation": "another objective: the KL of each token alone; a score is only the last token's",
    "lm_human_preferences": "whitened rewards reward short or long responses",
    "summarize_from_feedback": "another objective: a truncated response scores −1",
    "moss_ppo_max": "scores are divided by their running standard deviation, the KL is not",
}
"""Those that do not come to rest at π*, and what keeps them away. All others must."""

EXACT_STEPS, SAMPLED_STEPS, SAMPLES = 500, 500, 2048


def exact(name: str, steps: int = EXACT_STEPS) -> Reached | None:
    if name in BATCH_STATISTICS:
        return None
    # Whitening scales the gradient of a step and, on-policy, changes its expectation in no other way.
    algorithm = dataclasses.replace({**PLACEMENTS, **PRESETS}[name], normalize=AsEstimated())
    return train(algorithm, steps=steps)


def sampled(name: str) -> Reached:
    return train({**PLACEMENTS, **PRESETS}[name], Sampling(SAMPLES), SAMPLED_STEPS)


def off_policy(name: str, group: int = 8) -> Reached:
    """Four updates from the responses of each step."""
    sampling = Sampling(SAMPLES, group, epochs=4)
    return train({**PLACEMENTS, **PRESETS}[name], sampling, SAMPLED_STEPS)
