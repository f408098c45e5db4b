"""Gradients of the KL to the reference, from samples of an older policy: bias and variance.

    python benchmarks/papers/kl_off_policy.py [--seeds 5] [--image docs/images/kl_off_policy.png]

Policies are tables of logits over V = 4 tokens, given the token before. The KL of whole responses
of T tokens, and its gradient, are then known exactly. Responses are sampled from one policy, a step
begins with another that is `staleness` updates ahead, and the gradient is taken at a third that is
`epoch − 1` updates further. The parts of an algorithm compute it as in training. Prints the tables
of docs/papers/kl_off_policy.md and writes benchmarks/results/papers/kl_off_policy.json.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import paper
import torch
from torch import Tensor

from quartet.algorithms.advantages import MonteCarlo
from quartet.algorithms.aggregation import FixedLength
from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.baselines import LeaveOneOut, ReturnToGo
from quartet.algorithms.correction import SequenceTruncated, Truncated
from quartet.algorithms.kl import Estimator, KLInLoss, KLInReward, exact_kl
from quartet.algorithms.policy_loss import ImportanceWeighted
from quartet.algorithms.value_loss import ClippedValueLoss
from quartet.experience import Batch

V, GROUP, BATCH, RESPONSES = 4, 16, 256, 4096
LENGTHS = (4, 8, 16, 32, 64, 128)
STALENESS, EPOCHS = (0, 1, 2, 4, 8), (1, 2, 3, 4)
SHOWN_AGES = ((0, 1), (1, 1), (2, 1), (4, 1), (8, 1), (0, 2), (0, 3), (0, 4), (8, 4))
GRID_LENGTH = 32
KL_PER_TOKEN, KL_PER_UPDATE = 0.05, 2e-4
"""In nats per token: from the policy that samples to the reference, and to the policy one update
ahead."""
STICKY = 3.0
"""What the reference's logit of the token before is raised by: an early token then decides for long
what comes after it, and how far that is from the reference."""
AGES = {"on-policy": (0, 1), "epoch 4": (0, 4), "staleness 4": (4, 1)}
"""Staleness and epoch of the tables by length."""


def in_reward(estimator: Estimator, **parts: Any) -> Algorithm:
    frame: dict[str, Any] = {"advantage": ReturnToGo(), "policy_loss": ImportanceWeighted()}
    kl = KLInReward(estimator=estimator, coef=1.0)
    return Algorithm(kl=kl, aggregation=FixedLength(length=1), **(frame | parts))


def in_loss(estimator: Estimator, weight: Any = "none", baseline: Any = "none") -> Algorithm:
    kl = KLInLoss(estimator=estimator, coef=1.0, weight=weight, baseline=baseline)
    return Algorithm(advantage=ReturnToGo(), kl=kl, aggregation=FixedLength(length=1))


def placements() -> dict[str, Algorithm]:
    """Return every placement × estimator × weight that is compared. Scores are 0: what is left of
    each algorithm's gradient is that of its KL."""
    critic = {"advantage": MonteCarlo(), "value_loss": ClippedValueLoss()}
    product = SequenceTruncated(ratio="product")
    found = {
        "reward k1": in_reward("k1"),
        "reward k1, leave one out": in_reward("k1", advantage=LeaveOneOut()),
        "reward k1, perfect critic": in_reward("k1", **critic),
        "reward k1, critic, weights ≤ 2": in_reward("k1", **critic, correction=Truncated()),
        "reward k1, critic, product ≤ 2": in_reward("k1", **critic, correction=product),
        "reward k3": in_reward("k3"),
        "reward exact": in_reward("exact"),
        "loss k1": in_loss("k1"),
        "loss k2": in_loss("k2"),
        "loss k3": in_loss("k3"),
        "loss exact": in_loss("exact"),
        "loss k1, token": in_loss("k1", "token"),
        "loss k3, token": in_loss("k3", "token"),
    }
    for estimator in ("k1", "k3", "exact"):
        found[f"loss {estimator}, sequence"] = in_loss(estimator, "sequence")
        found[f"loss {estimator}, sequence, baseline"] = in_loss(
            estimator, "sequence", "leave_one_out"
        )
    return found


@dataclass(frozen=True)
class World:
    """Tables of logits [V V]: row s is the distribution of the token after token s."""

    reference: Tensor
    start: Tensor
    """The policy that samples."""
    update: Tensor
    """What one update adds to the logits."""

    def policy(self, updates: int) -> Tensor:
        return self.start + updates * self.update


def mean_kl(logits: Tensor, other: Tensor) -> float:
    return float(exact_kl(logits.log_softmax(-1), other.log_softmax(-1)).mean())


def scaled(direction: Tensor, start: Tensor, kl: float) -> Tensor:
    """Return the direction at the length at which the policy behind it is `kl` from `start`."""
    low, high = 0.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        near = mean_kl(start + middle * direction, start) < kl
        low, high = (middle, high) if near else (low, middle)
    return low * direction


def make_world(seed: int) -> World:
    rng = torch.Generator().manual_seed(seed)
    reference, noise, direction = torch.randn(3, V, V, generator=rng, dtype=torch.float64)
    reference = reference + STICKY * torch.eye(V, dtype=torch.float64)
    start = reference + scaled(noise, reference, KL_PER_TOKEN)
    return World(reference, start, scaled(direction, start, KL_PER_UPDATE))


def sequence_kl(logits: Tensor, reference: Tensor, length: int) -> Tensor:
    """Return KL(π ‖ π_ref) of whole responses, in nats, with a gradient."""
    each = exact_kl(logits.log_softmax(-1), reference.log_softmax(-1))
    at, total = torch.eye(V, dtype=logits.dtype)[0], torch.zeros((), dtype=logits.dtype)
    for _ in range(length):
        total = total + at @ each
        at = at @ logits.softmax(-1)
    return total


def values_to_go(logits: Tensor, reference: Tensor, length: int) -> Tensor:
    """Return [T V]: what a perfect critic says of each place and token before, of −KL to go."""
    each = exact_kl(logits.log_softmax(-1), reference.log_softmax(-1))
    values, after = [], torch.zeros_like(each)
    for _ in range(length):
        after = logits.softmax(-1) @ after - each
        values.append(after)
    return torch.stack(values[::-1])


@dataclass(frozen=True)
class Sample:
    """N responses: the token before each token, and the token. Both [N T]."""

    states: Tensor
    tokens: Tensor

    @classmethod
    def draw(cls, logits: Tensor, num: int, length: int, seed: int) -> "Sample":
        rng = torch.Generator().manual_seed(seed)
        uniform = torch.rand(length, num, 1, generator=rng, dtype=logits.dtype)
        cumulative = logits.softmax(-1).cumsum(-1)[:, :-1]
        states, tokens = [], []
        state = torch.zeros(num, dtype=torch.long)
        for t in range(length):
            states.append(state)
            state = (uniform[t] > cumulative[state]).sum(-1)
            tokens.append(state)
        return cls(torch.stack(states, 1), torch.stack(tokens, 1))

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[self.states, self.tokens]


def make_batch(world: World, sample: Sample, staleness: int) -> Batch:
    num, length = sample.tokens.shape
    begins = world.policy(staleness)
    exact = exact_kl(begins.log_softmax(-1), world.reference.log_softmax(-1))
    values = values_to_go(begins, world.reference, length)
    return Batch(
        ids=("",) * num,
        tokens=sample.tokens,
        lengths=torch.full((num,), length),
        response_mask=torch.ones_like(sample.tokens, dtype=torch.bool),
        scores=torch.zeros(num, dtype=torch.float64),
        ended=torch.ones(num, dtype=torch.bool),
        groups=torch.arange(num) // GROUP,
        rollout_logprobs=sample.logprobs(world.start),
        old_logprobs=sample.logprobs(begins),
        ref_logprobs=sample.logprobs(world.reference),
        exact_kl=exact[sample.states],
        values=values[torch.arange(length), sample.states],
    )


def row_gradients(
    algorithm: Algorithm, batch: Batch, sample: Sample, world: World, now: Tensor
) -> Tensor:
    """Return [N V V]: the gradient of each response's loss with respect to the logits `now`."""
    made = algorithm.experience(batch)
    logprobs = sample.logprobs(now).requires_grad_()
    log_now, log_ref = now.log_softmax(-1), world.reference.log_softmax(-1)
    each = exact_kl(log_now, log_ref)
    exact = each[sample.states].requires_grad_()
    forward = Forward(logprobs, torch.zeros_like(logprobs), None, exact)
    ones = dict.fromkeys(algorithm.denominators(made), 1.0)
    loss = torch.stack(list(algorithm.loss(made, forward, ones).values())).sum()
    by_token, by_state = torch.autograd.grad(loss, [logprobs, exact], allow_unused=True)
    num = len(sample.tokens)
    found = torch.zeros(num, V * V, dtype=now.dtype)
    if by_token is not None:
        found.scatter_add_(1, sample.states * V + sample.tokens, by_token)
    chosen = found.view(num, V, V)
    gradients = chosen - chosen.sum(-1, keepdim=True) * now.softmax(-1)
    if by_state is not None:
        at = torch.zeros(num, V, dtype=now.dtype).scatter_add_(1, sample.states, by_state)
        gradients = gradients + at[..., None] * now.softmax(-1) * (
            log_now - log_ref - each[:, None]
        )
    return gradients


def judged(gradients: Tensor, true: Tensor) -> dict[str, float]:
    """Return bias and standard deviation of the gradient of a batch, in units of the length of the
    true one. The bias is what is left of its estimate when its noise is taken out; `noise`
    is the bias that the samples could not tell from 0."""
    groups = gradients.view(-1, GROUP, V * V).mean(dim=1)
    mean, size = groups.mean(dim=0), float(true.square().sum())
    spread = float(groups.var(dim=0).sum()) / size
    noise = spread / len(groups)
    bias = max(float((mean - true.flatten()).square().sum()) / size - noise, 0.0)
    return {
        "bias": math.sqrt(bias),
        "noise": math.sqrt(noise),
        "deviation": math.sqrt(spread * GROUP / BATCH),
    }


def measure(
    world: World, sample: Sample, staleness: int, epoch: int
) -> dict[str, dict[str, float]]:
    """Return what `judged` says of every placement, at one staleness and epoch."""
    length = sample.tokens.shape[1]
    now = world.policy(staleness + epoch - 1)
    leaf = now.clone().requires_grad_()
    [true] = torch.autograd.grad(sequence_kl(leaf, world.reference, length), leaf)
    batch = make_batch(world, sample, staleness)
    return {
        name: judged(row_gradients(algorithm, batch, sample, world, now), true)
        for name, algorithm in placements().items()
    }


def one_seed(seed: int, num: int, lengths: Iterable[int], grid: int) -> dict[str, Any]:
    """Return the numbers of one world: by length, and over staleness and epoch."""
    world = make_world(seed)
    by_length = {}
    for length in lengths:
        sample = Sample.draw(world.start, num, length, seed)
        by_length[str(length)] = {
            age: measure(world, sample, *place) for age, place in AGES.items()
        }
    sample = Sample.draw(world.start, num, grid, 1000 + seed)
    over_ages = {
        f"{staleness},{epoch}": measure(world, sample, staleness, epoch)
        for staleness in STALENESS
        for epoch in EPOCHS
    }
    return {"length": by_length, "age": over_ages}


def mean_of(seeds: list[Any], *path: Any) -> float:
    """Return the mean over seeds of the number at a path of keys."""
    numbers = []
    for found in seeds:
        value = found
        for key in path:
            value = value[key]
        numbers.append(value)
    return statistics.fmean(numbers)


def bias_of(seeds: list[Any], *path: Any) -> str:
    """Return the mean bias, or "< noise" where it cannot be told from 0."""
    bias, noise = mean_of(seeds, *path, "bias"), mean_of(seeds, *path, "noise")
    return f"{bias:.2f}" if bias > noise else f"< {noise:.2f}"


def error_of(seeds: list[Any], *path: Any, batch: int = BATCH) -> float:
    """Return the root mean square error of the gradient of a batch of this many responses. A bias
    that cannot be told from 0 counts as 0."""
    bias, noise, sd = (mean_of(seeds, *path, name) for name in ("bias", "noise", "deviation"))
    return math.hypot(bias if bias > noise else 0.0, sd * math.sqrt(BATCH / batch))


def tables(seeds: list[Any]) -> str:
    """Return the tables of the page."""
    text = ""
    lengths = list(seeds[0]["length"])
    for age in AGES:
        head = [f"{age}: bias, sd", *(f"T = {length}" for length in lengths)]
        rows = [
            [
                name,
                *(
                    f"{bias_of(seeds, 'length', t, age, name)}, "
                    f"{mean_of(seeds, 'length', t, age, name, 'deviation'):.2f}"
                    for t in lengths
                ),
            ]
            for name in placements()
        ]
        text += paper.table(head, rows) + "\n"
    for what in ("bias", "deviation"):
        head = [f"{what}, T = {GRID_LENGTH}", *(f"s {s}, e {e}" for s, e in SHOWN_AGES)]
        rows = [
            [
                name,
                *(
                    bias_of(seeds, "age", f"{s},{e}", name)
                    if what == "bias"
                    else f"{mean_of(seeds, 'age', f'{s},{e}', name, what):.2f}"
                    for s, e in SHOWN_AGES
                ),
            ]
            for name in placements()
        ]
        text += paper.table(head, rows) + "\n"
    return text


SHOWN = (
    "reward k1, perfect critic",
    "loss k2",
    "loss k3",
    "loss k3, token",
    "loss k3, sequence",
    "loss k3, sequence, baseline",
    "loss exact, sequence",
    "loss exact, sequence, baseline",
)


def figure(seeds: list[Any]) -> Any:
    """Return error over length, error over staleness, and error over the size of a batch."""
    from plotly.subplots import make_subplots

    sizes = [4**n for n in range(2, 10)]
    titles = [
        *("epoch 4, by length T", "staleness 4, by length T", f"T = {GRID_LENGTH}, by staleness"),
        *(f"{age}, T = 8, by batch size" for age in AGES),
    ]
    drawn = make_subplots(2, 3, subplot_titles=titles, vertical_spacing=0.14)
    for name, color in zip(SHOWN, paper.COLORS, strict=True):
        style = {"name": name, "line": {"color": color}, "legendgroup": name}
        lengths = list(seeds[0]["length"])
        for column, age in enumerate(("epoch 4", "staleness 4"), 1):
            y = [error_of(seeds, "length", t, age, name) for t in lengths]
            drawn.add_scatter(
                x=[int(t) for t in lengths], y=y, row=1, col=column, showlegend=column == 1, **style
            )
        y = [error_of(seeds, "age", f"{s},1", name) for s in STALENESS]
        drawn.add_scatter(x=STALENESS, y=y, row=1, col=3, showlegend=False, **style)
        for column, age in enumerate(AGES, 1):
            place = ("length", lengths[min(1, len(lengths) - 1)], age, name)
            y = [error_of(seeds, *place, batch=size) for size in sizes]
            drawn.add_scatter(x=sizes, y=y, row=2, col=column, showlegend=False, **style)
    ticks = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    drawn.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    for row, column in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3)):
        drawn.update_xaxes(type="log", row=row, col=column)
    drawn.update_yaxes(title_text="error / |true gradient|", col=1)
    drawn.update_layout(legend={"orientation": "h", "y": -0.08}, margin={"t": 40, "r": 20})
    return drawn


def main() -> None:
    options = paper.options(__doc__ or "", "kl_off_policy")
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"responses": RESPONSES, "batch": BATCH, "group": GROUP}
    settings |= {"vocabulary": V, "sticky": STICKY}
    settings |= {"kl_per_token": KL_PER_TOKEN, "kl_per_update": KL_PER_UPDATE}
    seeds = paper.over_seeds(
        lambda seed: one_seed(seed, RESPONSES, LENGTHS, GRID_LENGTH), options, **settings
    )
    print(tables(seeds))
    if options.image:
        paper.picture(figure(seeds), options.image, 1200, 760)


if __name__ == "__main__":
    main()
