"""Claims about losses of comparisons: the DPO family, and reward models."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rl_conformance import conventions, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.inputs import leaf, numbers, with_gradient
from rl_conformance.library import Library, Pairs


class Pair(NamedTuple):
    """One of `Pairs`, as plain numbers."""

    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_tokens: float
    rejected_tokens: float

    def log_ratios(self) -> tuple[float, float]:
        """Return log π / π_ref of the chosen and of the rejected response."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def mean_log_ratios(self) -> tuple[float, float]:
        """Return the same as means over the tokens of a response."""
        chosen, rejected = self.log_ratios()
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens

    def mean_logprobs(self) -> tuple[float, float]:
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def shared_pairs() -> Pairs:
    """Return two pairs of responses of 4 and 2, and of 3 and 5 tokens, with a gradient to the
    policy."""
    return Pairs(
        chosen=leaf(torch.tensor([-3.0, -6.0])),
        rejected=leaf(torch.tensor([-2.5, -4.0])),
        ref_chosen=torch.tensor([-5.0, -5.5]),
        ref_rejected=torch.tensor([-1.5, -5.0]),
        chosen_tokens=torch.tensor([4.0, 3.0]),
        rejected_tokens=torch.tensor([2.0, 5.0]),
    )


Formula = Callable[[Pair], float]


def value_and_gradient(formula: Formula, pairs: Pairs) -> Tensor:
    """Return the mean of a plain loop's loss over pairs, and its derivatives by central
    differences."""
    columns = [each.detach().double().tolist() for each in vars(pairs).values()]
    table = [Pair(*row) for row in zip(*columns, strict=True)]
    step, count = 1e-5, len(table)
    of_chosen, of_rejected = [], []
    for pair in table:
        up, down = pair.chosen + step, pair.chosen - step
        rise = formula(pair._replace(chosen=up)) - formula(pair._replace(chosen=down))
        of_chosen.append(rise / (2 * step * count))
        up, down = pair.rejected + step, pair.rejected - step
        rise = formula(pair._replace(rejected=up)) - formula(pair._replace(rejected=down))
        of_rejected.append(rise / (2 * step * count))
    return numbers(oracles.mean([formula(pair) for pair in table]), of_chosen, of_rejected)


def compared(
    loss_of: Callable[[Pairs], Tensor], formula: Formula, conventions: dict[str, Formula]
) -> Evidence:
    """Compare a loss and its gradients with a formula of one pair, and with conventions of it."""
    pairs = shared_pairs()
    return Evidence(
        with_gradient(loss_of(pairs), pairs.chosen, pairs.rejected),
        value_and_gradient(formula, pairs),
        {name: value_and_gradient(other, pairs) for name, other in conventions.items()},
    )


def dpo(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.dpo(pairs, 0.25),
        lambda pair: oracles.dpo(*pair.log_ratios(), 0.25),
        {},
    )


def cdpo(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.cdpo(pairs, 0.25, 0.125),
        lambda pair: oracles.dpo(*pair.log_ratios(), 0.25, 0.125),
        {},
    )


def ipo(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.ipo(pairs, 0.25),
        lambda pair: oracles.ipo(*pair.log_ratios(), 0.25),
        {conventions.PER_TOKEN: lambda pair: oracles.ipo(*pair.mean_log_ratios(), 0.25)},
    )


def kto(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.kto(pairs, 0.5, 0.25),
        lambda pair: oracles.mean(oracles.kto(*pair.log_ratios(), 0.5, 0.25)),
        {conventions.PER_PAIR: lambda pair: sum(oracles.kto(*pair.log_ratios(), 0.5, 0.25))},
    )


def orpo(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.orpo(pairs, 0.25),
        lambda pair: oracles.orpo(*pair.mean_logprobs(), 0.25),
        {},
    )


def simpo(library: Library) -> Evidence:
    return compared(
        lambda pairs: library.simpo(pairs, 2.0, 0.5),
        lambda pair: oracles.simpo(*pair.mean_logprobs(), 2.0, 0.5),
        {},
    )


def bradley_terry(library: Library) -> Evidence:
    """Margins 2, −1 and −200: log(1 + e⁻²), log(1 + e), 200."""
    chosen, rejected = leaf(torch.tensor([1.0, 0.0, -100.0])), torch.tensor([-1.0, 1.0, 100.0])
    loss = library.bradley_terry(chosen, rejected)
    margins = (2.0, -1.0, -200.0)
    expected = numbers(
        oracles.mean([-oracles.log_sigmoid(m) for m in margins]),
        [-oracles.sigmoid(-m) / 3 for m in margins],
    )
    return Evidence(with_gradient(loss, chosen), expected)


CLAIMS = (
    Claim("pairs/dpo", "DPO, value and gradient.", "Rafailov et al. 2023, eq. 7", ("dpo",), dpo),
    Claim(
        "pairs/cdpo",
        "DPO where a label is wrong with the chance ε, value and gradient.",
        "Mitchell 2023, eq. 3",
        ("cdpo",),
        cdpo,
    ),
    Claim(
        "pairs/ipo",
        "IPO on log-ratios of whole responses, value and gradient.",
        "Azar et al. 2023, eq. 17",
        ("ipo",),
        ipo,
    ),
    Claim(
        "pairs/kto",
        "KTO, value and gradient, mean over responses.",
        "Ethayarajh et al. 2024, eq. 8",
        ("kto",),
        kto,
    ),
    Claim("pairs/orpo", "ORPO, value and gradient.", "Hong et al. 2024, eq. 6", ("orpo",), orpo),
    Claim(
        "pairs/simpo", "SimPO, value and gradient.", "Meng et al. 2024, eq. 6", ("simpo",), simpo
    ),
    Claim(
        "pairs/bradley-terry",
        "−log σ(margin), value and gradient, also at a margin of −200.",
        "Stiennon et al. 2020, eq. 1",
        ("bradley_terry",),
        bradley_terry,
    ),
)
