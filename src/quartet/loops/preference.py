"""Learning from comparisons without a reward model: the DPO family, one loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from quartet.algorithms.preference import Pairs, PreferenceLoss
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import Prompt
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling
from quartet.loops.progress import Progress
from quartet.models.language_model import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.rewards.protocol import Weighted, rewarded
from quartet.tensors import Float, Tensor
from quartet.training.budget import Budget
from quartet.training.finite import check_finite
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step, sum_of_losses


@runtime_checkable
class Source(Protocol):
    """Where batches of comparisons come from: a sampler over a file, or the policy itself."""

    def next(self) -> list[Comparison]: ...

    def state(self) -> Any: ...

    def load_state(self, state: Any) -> None: ...


class OnlinePairs:
    """Two responses of the policy to each prompt; the reward says which is better (Guo et al. 2024,
    with a reward model for a judge). Prompts whose two responses score the same give no comparison;
    if none gives one, the next prompts are tried."""

    def __init__(
        self,
        prompts: Sampler[Prompt],
        generator: Generator,
        sampling: Sampling,
        rewards: Sequence[Weighted],
        rounds: int = 10,
        weights: Callable[[], Weights] | None = None,
    ) -> None:
        """`weights`: the policy's as they are now, where the generator has a copy."""
        self.prompts, self.generator, self.sampling, self.rewards, self.rounds = (
            prompts,
            generator,
            sampling,
            rewards,
            rounds,
        )
        self.weights = weights

    def state(self) -> dict[str, Any]:
        return {"prompts": self.prompts.state(), "generator": self.generator.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state(state["prompts"])
        self.generator.load_state(state["generator"])

    def next(self) -> list[Comparison]:
        if self.weights is not None:
            self.generator.load_weights(self.weights())
        for _ in range(self.rounds):
            rollouts = rewarded(
                self.generator.generate(self.prompts.next(), self.sampling, 2), self.rewards
            )
            pairs = []
            for two in zip(rollouts[::2], rollouts[1::2], strict=True):
                if any(r.score is None for r in two):
                    continue
                worse, better = sorted(two, key=lambda r: r.score or 0.0)
                if worse.score != better.score:
                    pairs.append(
                        Comparison(
                            better.prompt.id,
                            better.prompt.ids,
                            better.response_ids,
                            worse.response_ids,
                        )
                    )
            if pairs:
                return pairs
        raise ValueError(
            f"in {self.rounds} batches of prompts both responses always scored the same: there is "
            f"nothing to prefer. "
            "The task is too hard, too easy, or the reward never tells responses apart."
        )


def preference(
    model: Any,
    reference: Any | None,
    comparisons: Source,
    loss: PreferenceLoss,
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
) -> Iterator[Progress]:
    """Minimise the loss on batches of comparisons; the first steps may be done already."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within(
            "the update",
            partial(
                _step, model, reference, comparisons.next(), loss, optimizer, budget.process_group
            ),
        )
        yield Progress(number, {**metrics, "lr": lr})


def _step(
    model: Any,
    reference: Any | None,
    batch: Sequence[Comparison],
    loss: PreferenceLoss,
    optimizer: Optimizer,
    process_group: ProcessGroup,
    micro_batch_tokens: int,
) -> dict[str, float]:
    seen: list[Pairs] = []
    metrics = optimizer_step(
        _losses(model, reference, batch, loss, micro_batch_tokens, seen, process_group),
        {"policy": optimizer},
        process_group,
    )
    return (
        {**metrics, **preference_metrics(seen, process_group)}
        if "skipped" not in metrics
        else metrics
    )


@torch.no_grad()
def held_out_preference(
    model: Any,
    reference: Any | None,
    comparisons: Sequence[Comparison],
    loss: PreferenceLoss,
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """The loss, and how often the policy prefers what the labeller preferred."""
    seen: list[Pairs] = []
    total = sum_of_losses(
        _losses(model, reference, comparisons, loss, micro_batch_tokens, seen, process_group),
        process_group,
    )
    return {"loss": total, **preference_metrics(seen, process_group)}


def preference_metrics(
    seen: Sequence[Pairs], process_group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, float]:
    """Accuracy: the share of pairs whose chosen side gained more on the reference than the rejected
    (without a reference: is likelier per token); a tie counts half. How far from 0 the log-ratios
    to the reference are, which is where they start. The mean log-probs of both sides: they may fall
    together, which is worth seeing. Over the pairs that all ranks have seen."""
    margins = [_margin(pairs) for pairs in seen]
    numbers = {
        "accuracy": [(m > 0).double() + 0.5 * (m == 0).double() for m in margins],
        "margin": margins,
        "logratio/abs": [
            torch.cat(pairs.log_ratios()).abs() for pairs in seen if pairs.ref_chosen is not None
        ],
        "logprobs/chosen": [pairs.chosen[pairs.chosen_tokens > 0] for pairs in seen],
        "logprobs/rejected": [pairs.rejected[pairs.rejected_tokens > 0] for pairs in seen],
    }
    sums = process_group.all_reduce_sum(
        *(float(sum(n.detach().double().sum() for n in found)) for found in numbers.values())
    )
    counts = process_group.all_reduce_sum(
        *(float(sum(len(n) for n in found)) for found in numbers.values())
    )
    return {
        name: total / count
        for name, total, count in zip(numbers, sums, counts, strict=True)
        if count
    }


def _margin(pairs: Pairs) -> Float[Tensor, "P"]:
    if pairs.ref_chosen is None:
        return pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    chosen, rejected = pairs.log_ratios()
    return chosen - rejected


def _losses(
    model: Any,
    reference: Any | None,
    batch: Sequence[Comparison],
    loss: PreferenceLoss,
    micro_batch_tokens: int,
    seen: list[Pairs],
    process_group: ProcessGroup,
) -> Iterator[Float[Tensor, ""]]:
    """The loss of a batch in pieces that add up to it over all ranks; what was seen on the way is
    appended to `seen`."""
    kl = (
        _mismatched_kl(model, reference, batch, micro_batch_tokens, process_group)
        if loss.needs_kl
        else 0.0
    )
    for part in process_group.micro_batches(_longest(batch), micro_batch_tokens):
        piece = [batch[i] for i in part.rows]
        chosen, rejected = _both_sides(model, piece)
        ref_chosen, ref_rejected = None, None
        if reference is not None:
            with torch.no_grad():
                ref_chosen, ref_rejected = _both_sides(reference, piece)
        pairs = Pairs(
            chosen,
            rejected,
            torch.tensor([float(len(c.chosen_ids)) for c in piece], device=chosen.device),
            torch.tensor([float(len(c.rejected_ids)) for c in piece], device=chosen.device),
            ref_chosen,
            ref_rejected,
            kl,
        )
        if part.counts:
            seen.append(pairs)
        losses = loss(pairs)
        samples = [[*c.prompt_ids, *c.chosen_ids] for c in piece]
        check_finite("the loss", losses, [c.id for c in piece], samples.__getitem__)
        yield part.counts * losses.sum() / len(batch)


def _longest(batch: Sequence[Comparison]) -> list[int]:
    return [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in batch]


def _both_sides(
    model: Any, comparisons: Sequence[Comparison]
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    sides = [(c.prompt_ids, c.chosen_ids) for c in comparisons] + [
        (c.prompt_ids, c.rejected_ids) for c in comparisons
    ]
    chosen, rejected = _response_logprobs(model, sides).chunk(2)
    return chosen, rejected


@torch.no_grad()
def _mismatched_kl(
    model: Any,
    reference: Any,
    batch: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup,
) -> float:
    """KTO's z: the responses of both sides under their neighbours' prompts, mean of log π / π_ref,
    not below 0."""
    neighbours = [*batch[1:], batch[0]]
    sides = [
        (a.prompt_ids, ids)
        for a, b in zip(batch, neighbours, strict=True)
        for ids in (b.chosen_ids, b.rejected_ids)
        if ids
    ]
    mine = 0.0
    for part in process_group.micro_batches(
        [len(p) + len(r) for p, r in sides], micro_batch_tokens
    ):
        piece = [sides[i] for i in part.rows]
        mine += part.counts * float(
            (_response_logprobs(model, piece) - _response_logprobs(reference, piece)).sum()
        )
    [total] = process_group.all_reduce_sum(mine)
    return max(total / len(sides), 0.0)


def _response_logprobs(
    model: Any, sides: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Float[Tensor, "B"]:
    """Σ log π over the tokens of each response."""
    tokens, lengths = right_pad([(*prompt, *response) for prompt, response in sides], model.device)
    starts = torch.tensor([len(prompt) for prompt, _ in sides], device=model.device)
    mask = response_mask(starts, lengths, tokens.shape[1])
    return masked_logprobs(model, tokens, mask).sum(dim=1)
