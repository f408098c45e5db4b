"""Claims that nothing changes where nothing should: padding, order, offsets, and how the batch is
cut. They compare a library with itself, so that they hold for any convention."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_conformance import conventions, inputs, oracles
from rl_conformance.claims import Claim, Evidence
from rl_conformance.formulas import IDS, LOGITS
from rl_conformance.inputs import leaf, numbers, rows, tensors_of
from rl_conformance.library import Library

# --- padding and order, for each function of [B T] ---


@dataclass(frozen=True)
class Layout:
    """The shared batch, laid out otherwise."""

    sentence: str
    move: Callable[[Tensor], Tensor]
    """From a table [B T] of the shared inputs to the other layout."""
    back: Callable[[Tensor], Tensor]
    """From the other layout to the shared one."""
    filler: float = 0.0
    """What the padding holds."""


def wider(table: Tensor) -> Tensor:
    return torch.nn.functional.pad(table, (0, 2))


def to_the_right(table: Tensor) -> Tensor:
    """Move each response to the end of its row: the padding is on the left."""
    moved = [row.roll(table.shape[1] - n) for row, n in zip(table, inputs.LENGTHS, strict=True)]
    return torch.stack(moved)


def to_the_left(table: Tensor) -> Tensor:
    moved = [row.roll(n - table.shape[1]) for row, n in zip(table, inputs.LENGTHS, strict=True)]
    return torch.stack(moved)


LAYOUTS = {
    "longer": Layout("Two more columns of padding change nothing", wider, lambda t: t[:, :4]),
    "left": Layout("Padding on the left changes nothing", to_the_right, to_the_left),
    "order": Layout(
        "Another order of the rows changes nothing", lambda t: t.flip(0), lambda t: t.flip(0)
    ),
    "garbage": Layout(
        "Finite numbers in the padding change nothing", wider, lambda t: t[:, :4], 1000.0
    ),
    "nan": Layout("NaN in the padding changes nothing", wider, lambda t: t[:, :4], math.nan),
}


def call(library: Library, operation: str, layout: Layout) -> Tensor:
    """Return what an operation gives in a layout, laid out as the shared inputs are: values per
    token, or a loss and its gradient. Losses get the filler where models speak (log-probs, values);
    advantages and returns, which are computed, are 0 in the padding."""
    mask = layout.move(inputs.MASK)

    def laid_out(table: Tensor, filler: float = layout.filler) -> Tensor:
        return layout.move(table).masked_fill(~mask, filler)

    def per_token(*tables: Tensor) -> Tensor:
        return tensors_of([layout.back(table)[inputs.MASK] for table in tables])

    rewards, values = laid_out(inputs.REWARDS), laid_out(inputs.VALUES)
    match operation:
        case "gae":
            return per_token(*library.gae(rewards, values, mask, 0.875, 0.75))
        case "returns":
            return per_token(library.returns(rewards, mask, 0.875))
        case "whiten":
            return per_token(library.whiten(laid_out(inputs.ADVANTAGES), mask))
        case "reinforce_pp":
            return per_token(library.reinforce_pp(rewards, mask, 0.875))
        case "value_loss":
            moving = leaf(laid_out(inputs.NEW_VALUES))
            loss = library.value_loss(moving, values, laid_out(inputs.RETURNS, 0.0), mask, 0.25)
        case _:
            moving = leaf(laid_out(inputs.NEW))
            advantages = laid_out(inputs.ADVANTAGES, 0.0)
            arguments = (moving, laid_out(inputs.OLD), advantages, mask, 0.2, 0.2)
            loss = getattr(library, operation)(*arguments)
    (gradient,) = torch.autograd.grad(loss, [moving], materialize_grads=True)
    of_padding = gradient.masked_fill(mask, 0.0).abs().sum()
    return tensors_of([loss, layout.back(gradient)[inputs.MASK], of_padding])


SHARED = Layout("", lambda t: t, lambda t: t)
WHAT = {
    "policy_loss": "PPO's loss",
    "gspo_loss": "GSPO's loss",
    "value_loss": "the value loss",
    "gae": "GAE",
    "returns": "returns",
    "whiten": "whitening",
    "reinforce_pp": "REINFORCE++",
}


def invariance(operation: str, name: str) -> Claim:
    layout = LAYOUTS[name]

    def check(library: Library) -> Evidence:
        expected = call(library, operation, SHARED)
        return Evidence(call(library, operation, layout), expected)

    has_gradient = operation.endswith("_loss") and name != "order"
    gradient = ", and padding has no gradient" if has_gradient else ""
    return Claim(
        f"{name}/{operation.replace('_', '-')}",
        f"{layout.sentence} in {WHAT[operation]}{gradient}.",
        "identity",
        (operation,),
        check,
    )


# --- how the batch is cut ---


def pieces() -> tuple[list[Tensor], list[Tensor]]:
    """Return the losses and masks of two pieces of unequal numbers of tokens."""
    return [inputs.LOSSES[:1], inputs.LOSSES[1:]], [inputs.MASK[:1], inputs.MASK[1:]]


def cut(operation: str) -> Callable[[Library], Evidence]:
    def check(library: Library) -> Evidence:
        measured = getattr(library, operation)(*pieces())
        own = oracles.mean([oracles.mean(row) for row in rows(inputs.LOSSES)])
        expected = numbers(oracles.token_mean(rows(inputs.LOSSES)))
        return Evidence(tensors_of([measured]), expected, {conventions.MEAN_OF_MEANS: numbers(own)})

    return check


# --- offsets ---


def offset(operation: str) -> Claim:
    def check(library: Library) -> Evidence:
        function = getattr(library, operation)
        expected = tensors_of([function(inputs.SCORES, inputs.GROUPS)])
        return Evidence(tensors_of([function(inputs.SCORES + 64, inputs.GROUPS)]), expected)

    return Claim(
        f"offset/{operation.replace('_', '-')}",
        "A constant that is added to all scores does not change the advantages.",
        "identity",
        (operation,),
        check,
        tolerance=1e-4,
    )


def offset_of_logits(library: Library) -> Evidence:
    expected = tensors_of([library.token_logprobs(LOGITS.clone(), IDS)])
    return Evidence(tensors_of([library.token_logprobs(LOGITS + 64, IDS)]), expected)


def offset_of_pairs(library: Library) -> Evidence:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    expected = tensors_of([library.bradley_terry(chosen, rejected)])
    return Evidence(tensors_of([library.bradley_terry(chosen + 64, rejected + 64)]), expected)


CLAIMS = (
    *[invariance(operation, name) for name in LAYOUTS for operation in WHAT],
    Claim(
        "cut/micro-batches",
        "A token mean over micro-batches of unequal numbers of tokens is that of the whole batch.",
        "identity",
        ("over_micro_batches",),
        cut("over_micro_batches"),
    ),
    Claim(
        "cut/ranks",
        "A token mean over ranks with unequal numbers of tokens is that of the whole batch.",
        "identity",
        ("over_ranks",),
        cut("over_ranks"),
    ),
    *[offset(operation) for operation in ("grpo", "dr_grpo", "rloo")],
    Claim(
        "offset/log-probs",
        "A constant that is added to all logits does not change log-probs.",
        "identity",
        ("token_logprobs",),
        offset_of_logits,
        tolerance=1e-4,
    ),
    Claim(
        "offset/bradley-terry",
        "A constant that is added to all scores does not change the loss.",
        "identity",
        ("bradley_terry",),
        offset_of_pairs,
    ),
)
