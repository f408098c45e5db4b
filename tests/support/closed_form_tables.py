"""The tables of docs/algorithms.md on what reaches the optimum: those of `closed_form.py`, the update of trust regions, and the
losses on comparisons.

    python -m tests.support.closed_form_tables        writes the tables, in about 25 minutes of a busy core
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from quartet.algorithms.advantages import AsEstimated
from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.kl import exact_kl
from quartet.algorithms.preference import PREFERENCES, Pairs
from quartet.experience import Experience
from quartet.training.trust_region import _Objective, natural_step
from tests.support.closed_form import (
    BETA,
    LENGTHS,
    MASK,
    PLACEMENTS,
    PREFIXES,
    PRESETS,
    REFERENCE,
    RESPONSES,
    SAMPLED_STEPS,
    SAMPLES,
    SCORES,
    VISITED,
    WHY_NOT,
    Reached,
    Sampling,
    distribution,
    exact,
    exact_values,
    gradients,
    make_batch,
    off_policy,
    reached,
    sampled,
    token_logprobs,
)

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"

# --- the update of TRPO and of the natural gradient ------------------------------------------------------------------------


@dataclass
class Tabular(_Objective):
    """The objective of `natural_step` on a table of logits."""

    algorithm: Algorithm
    made: Experience
    rows: torch.Tensor
    weights: torch.Tensor | None
    logits: torch.Tensor

    def __post_init__(self) -> None:
        self.old = self.logits.detach().clone().log_softmax(-1)
        share = 1.0 if self.weights is None else self.weights[:, None]
        visits = (share * MASK[self.rows].double())[MASK[self.rows]]
        times = torch.zeros(len(PREFIXES), dtype=torch.float64)
        self.visits = times.index_add_(0, VISITED[self.rows][MASK[self.rows]], visits)
        self.visits /= self.visits.sum()

    def loss(self) -> float:
        logprobs = token_logprobs(self.logits.detach(), self.rows)
        per_token = self.algorithm._policy(self.made, logprobs)
        if self.weights is None:
            return float(per_token[MASK[self.rows]].mean())
        return float((self.weights[:, None] * per_token)[MASK[self.rows]].sum())

    def gradient(self, parameters: list[torch.Tensor]) -> torch.Tensor:
        values = torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
        terms = (self.algorithm, self.made, self.logits, values, self.rows, self.weights)
        return gradients(*terms)[0].flatten()

    def _kl(self) -> torch.Tensor:
        return self.visits @ exact_kl(self.old, self.logits.log_softmax(-1))

    def kl(self) -> float:
        return float(self._kl().detach())

    def fisher_product(self, parameters: list[torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
        [slope] = torch.autograd.grad(self._kl(), parameters, create_graph=True)
        return torch.autograd.grad(slope.flatten() @ vector, parameters)[0].flatten()


def natural(name: str, samples: int = 0, seed: int = 0) -> Reached:
    """Where the preset's own update comes to, with a perfect critic. Steps become smaller as in the other tables: their size is
    the root of the region's. With a region that stays, as in a run, the last steps are as large as the first."""
    algorithm = dataclasses.replace(PRESETS[name], normalize=AsEstimated())
    logits = REFERENCE.clone().requires_grad_()
    rng = torch.Generator().manual_seed(seed)
    for step in range(NATURAL_STEPS):
        p = distribution(logits.detach())
        rows, groups, weights = Sampling(samples).draw(algorithm, p, rng)
        judge = exact_values(algorithm, logits)
        made = algorithm.experience(make_batch(logits, rows, groups, judge))
        rate = (1 + math.cos(math.pi * step / NATURAL_STEPS)) / 2
        settings = dataclasses.replace(
            algorithm.update, max_kl=algorithm.update.max_kl * max(rate, 1e-3) ** 2
        )
        natural_step(Tabular(algorithm, made, rows, weights, logits), [logits], settings)
    return reached(logits.detach())


NATURAL_STEPS = 200


# --- the DPO family ------------------------------------------------------------------------------------------------------


def preference(name: str, samples: int = 0, seed: int = 0) -> Reached:
    """What a loss on comparisons comes to rest at. Two responses of the reference are compared, and the first is preferred with
    probability σ(difference of their scores); `online_dpo` compares two of the policy's and always prefers the better one. Every
    pair weighted by its probability, or `samples` new pairs in each step."""
    part = dataclasses.replace(PREFERENCES[name], **({"beta": BETA} if name in WITH_BETA else {}))
    logits, ref = REFERENCE.clone().requires_grad_(), distribution(REFERENCE)
    adam = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    rng = torch.Generator().manual_seed(seed)
    everything = torch.arange(len(RESPONSES))
    for step in range(SAMPLED_STEPS):
        adam.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / SAMPLED_STEPS))
        p = distribution(logits.detach()) if name == "online_dpo" else ref
        if samples:
            a, b = torch.multinomial(p, 2 * samples, replacement=True, generator=rng).view(2, -1)
            weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
        else:
            a, b = torch.cartesian_prod(everything, everything).unbind(1)
            weights = p[a] * p[b]
        margin = SCORES[a] - SCORES[b]
        wins = (margin > 0).double() if name == "online_dpo" else margin.sigmoid()
        if samples:
            wins = (torch.rand(samples, generator=rng, dtype=torch.float64) < wins).double()
        if name == "online_dpo":
            weights = weights * (margin != 0)
        now, before = token_logprobs(logits, everything).sum(1), ref.log()
        kl = max(float((p * (now - before)).sum().detach()), 0.0)

        def loss(good: torch.Tensor, bad: torch.Tensor, now=now, before=before, kl=kl):
            lengths = LENGTHS.double()
            pairs = Pairs(
                *(now[good], now[bad], lengths[good], lengths[bad]), before[good], before[bad], kl
            )
            return part(pairs)

        adam.zero_grad()
        (weights * (wins * loss(a, b) + (1 - wins) * loss(b, a))).sum().backward()
        adam.step()
    return reached(logits.detach())


WITH_BETA = {"dpo", "cdpo", "ipo", "kto", "online_dpo"}
WHY_NOT_PREFERENCES = {
    "cdpo": "it takes a tenth of the labels for wrong, and here none is",
    "ipo": "its optimum regresses the chance of winning, not its log odds",
    "kto": "another objective: each response against the mean",
    "orpo": "no reference",
    "simpo": "no reference, means over tokens",
    "online_dpo": "labels without noise: the better response wins always, however near the scores are",
}


# --- the tables of docs/algorithms.md ------------------------------------------------------------------------------------

GROUPS = (2, 4, 8, 16)
WITH_GROUPS = [name for name, a in {**PLACEMENTS, **PRESETS}.items() if a.needs_group]
ABOUT_PRESETS = """The presets, with β as their coefficient and no controller. The exact column omits whitening, which only scales the expectation of an
on-policy step. `trpo` and `npg` are represented by their loss; their update has a table of its own. `instructgpt` is without PTX."""
ABOUT_GROUPS = """Algorithms that compare groups, with four epochs, by the size of the group:"""
REGIONS = ("trpo", "npg")
ABOUT_REGIONS = """The update of the trust regions themselves (`natural_step`), 200 steps with a perfect critic and a region that shrinks to 1e-6 of
its size:"""
ABOUT_PREFERENCES = """Losses on comparisons with β = 0.5, of responses of the reference that are labelled by Bradley–Terry (`online_dpo`: of responses
of the policy, the better one preferred): with every pair weighted by its probability, and with 2,048 new pairs per step."""


def marks(block: str) -> tuple[str, str]:
    return f"<!-- {block}: begin -->", f"<!-- {block}: end -->"


def lines(head: str, names: Iterable[str], cells: Callable[[str], list[str]]) -> str:
    found = [head, "|---" * head.count(" |") + "|"]
    for name in names:
        found.append(f"| {' | '.join([name, *cells(name)])} |")
        print(found[-1], flush=True)
    return "\n".join(found)


def cells(name: str) -> list[str]:
    found = exact(name)
    first = "–" if found is None else f"{found.distance:.4f}"
    rest = [f"{reach(name).distance:.3f}" for reach in (sampled, off_policy)]
    return [first, *rest, WHY_NOT.get(name, "π*")]


def by_group(name: str) -> list[str]:
    return [f"{off_policy(name, size).distance:.3f}" for size in GROUPS]


def of_preference(name: str) -> list[str]:
    distances = [f"{preference(name, n).distance:.3f}" for n in (0, SAMPLES)]
    return [*distances, WHY_NOT_PREFERENCES.get(name, "π*")]


def of_trust_region(name: str) -> list[str]:
    return [f"{natural(name, n).distance:.4f}" for n in (0, SAMPLES)]


def published(block: str = "closed form") -> dict[str, list[float | None]]:
    """The distances that docs/algorithms.md prints, by name: exact, sampled, sampled with four epochs."""
    begin, end = marks(block)
    text = DOCS.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {
        row[0]: [None if cell == "–" else float(cell) for cell in row[1:] if cell[:1] in "–01"]
        for row in rows
        if row[0]
    }


def write(block: str, text: str) -> None:
    begin, end = marks(block)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    DOCS.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    head = "| | exact | sampled | 4 epochs | |"
    tables = (lines(head, PLACEMENTS, cells), ABOUT_PRESETS, lines(head, PRESETS, cells))
    write("closed form", "\n\n".join(tables))
    head = "| | exact | sampled |"
    write("regions", f"{ABOUT_REGIONS}\n\n{lines(head, REGIONS, of_trust_region)}")
    head = f"| | {' | '.join(map(str, GROUPS))} |"
    write("groups", f"{ABOUT_GROUPS}\n\n{lines(head, WITH_GROUPS, by_group)}")
    head = "| | exact | sampled | |"
    write("comparisons", f"{ABOUT_PREFERENCES}\n\n{lines(head, PREFERENCES, of_preference)}")


if __name__ == "__main__":
    main()
