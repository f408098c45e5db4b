"""Learning from comparisons without a reward model: one loop for the DPO family."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from quartet.algorithms.preference import Pairs, PreferenceLoss
from quartet.data.records import Comparison
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.experience import Prompt, Rollout
from quartet.loops.progress import Progress, Sampled
from quartet.loops.responses import Responses
from quartet.models.adapters import LanguageModel
from quartet.models.forward import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.models.protocols import CausalModel
from quartet.models.routing import recorded_routing
from quartet.parts import of_shape
from quartet.tensors import Float, Tensor
from quartet.training.budget import Budget
from quartet.training.finite import check_finite
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step, sum_of_losses


@runtime_checkable
class ComparisonSource(Protocol):
    """A source of batches of comparisons: a sampler over a file, or the policy itself."""

    def next(self) -> list[Comparison]:
        """Return the next batch."""
        ...

    def state(self) -> Any: ...

    def load_state(self, state: Any) -> None: ...


class OnlinePairs:
    """Comparisons of two responses of the policy itself, of which the rewards score one higher (Guo
    et al. 2024, with a reward model in the place of the LLM judge).

    A prompt whose two responses score the same, or have no score, gives no comparison. If no prompt
    of a batch gives one, the next batch is tried, up to `rounds` times; then `next` raises
    ValueError.
    """

    def __init__(self, prompts: Sampler[Prompt], responses: Responses, rounds: int = 10) -> None:
        self.prompts, self.responses, self.rounds = prompts, responses, rounds
        self.rollouts: list[Rollout] = []
        """The responses of the last batch of prompts."""

    def state(self) -> dict[str, Any]:
        return {"prompts": self.prompts.state(), "generator": self.responses.generator.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.prompts.load_state(state["prompts"])
        self.responses.generator.load_state(state["generator"])

    def next(self) -> list[Comparison]:
        for _ in range(self.rounds):
            rollouts = self.responses.sample(self.prompts.next(), 2)
            self.rollouts, pairs = rollouts, []
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
    model: CausalModel,
    reference: LanguageModel | None,
    comparisons: ComparisonSource,
    loss: PreferenceLoss,
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
    balance_coef: float = 0.0,
) -> Iterator[Progress]:
    """Yield the steps that follow the first `done` ones. Each minimises the loss on one batch of
    comparisons, and `balance_coef` times the load-balancing loss of a mixture of experts."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within(
            "the update",
            partial(
                _step,
                model,
                reference,
                comparisons.next(),
                loss,
                optimizer,
                budget.process_group,
                balance_coef,
            ),
        )
        metrics = {**metrics, "lr": lr}
        if isinstance(comparisons, OnlinePairs):
            yield Sampled(number, metrics, comparisons.rollouts)
        else:
            yield Progress(number, metrics)


def _step(
    model: CausalModel,
    reference: LanguageModel | None,
    batch: Sequence[Comparison],
    loss: PreferenceLoss,
    optimizer: Optimizer,
    process_group: ProcessGroup,
    balance_coef: float,
    micro_batch_tokens: int,
) -> dict[str, float]:
    collected: list[Pairs] = []
    balancing = LoadBalancing(balance_coef)
    metrics = optimizer_step(
        _losses(
            model, reference, batch, loss, micro_batch_tokens, collected, process_group, balancing
        ),
        {"policy": optimizer},
        process_group,
    )
    if "skipped" in metrics:
        return metrics
    metrics |= balancing.metrics(process_group)
    return {**metrics, **preference_metrics(collected, process_group)}


@torch.no_grad()
def held_out_preference(
    model: CausalModel,
    reference: LanguageModel | None,
    comparisons: Sequence[Comparison],
    loss: PreferenceLoss,
    micro_batch_tokens: int,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, float]:
    """Return the loss and the metrics of `preference_metrics` on held-out comparisons, and as
    `prefers_longer` the share of pairs, of those with sides of different lengths, in which the
    policy prefers the longer side."""
    collected: list[Pairs] = []
    total = sum_of_losses(
        _losses(model, reference, comparisons, loss, micro_batch_tokens, collected, process_group),
        process_group,
    )
    by_length = [_wins(_margins_of_longer(pairs)) for pairs in collected]
    return {
        "loss": total,
        **preference_metrics(collected, process_group),
        **_means({"prefers_longer": by_length}, process_group),
    }


def preference_metrics(
    collected: Sequence[Pairs], process_group: ProcessGroup = SINGLE_PROCESS
) -> dict[str, float]:
    """Return the metrics of pairs, over all ranks:

    - `accuracy`: the share of pairs with a positive margin; a tie counts half;
    - `margin`: how much more the chosen side gained on the reference than the rejected one;
      without a reference, the difference of their log-probs per token;
    - `logratio/abs`: the mean distance of the log-ratios to the reference from 0, where they start;
    - `logprobs/chosen`, `logprobs/rejected`: the mean log-probs, which may fall together;
    - `labels/chosen`: of unpaired preferences, the share that is desirable.
    """
    margins = [_margin(pairs) for pairs in collected]
    numbers = {
        "accuracy": [_wins(m) for m in margins],
        "margin": margins,
        "logratio/abs": [
            torch.cat(pairs.log_ratios()).abs()
            for pairs in collected
            if pairs.ref_chosen is not None
        ],
        "logprobs/chosen": [pairs.chosen[pairs.chosen_tokens > 0] for pairs in collected],
        "logprobs/rejected": [pairs.rejected[pairs.rejected_tokens > 0] for pairs in collected],
        "labels/chosen": [
            (pairs.chosen_tokens > 0)[(pairs.chosen_tokens == 0) | (pairs.rejected_tokens == 0)]
            for pairs in collected
        ],
    }
    return _means(numbers, process_group)


def _means(
    numbers: Mapping[str, Sequence[Tensor]], process_group: ProcessGroup
) -> dict[str, float]:
    """Return the mean of each list of numbers over all ranks; of an empty one there is none."""
    sums = process_group.all_reduce_sum(
        *(float(sum(n.detach().double().sum() for n in values)) for values in numbers.values())
    )
    counts = process_group.all_reduce_sum(
        *(float(sum(len(n) for n in values)) for values in numbers.values())
    )
    return {
        name: total / count
        for name, total, count in zip(numbers, sums, counts, strict=True)
        if count
    }


def _wins(margins: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Return 1 for a positive margin and ½ for a tie."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def _margins_of_longer(pairs: Pairs) -> Float[Tensor, "N"]:
    """Return by how much the policy prefers the longer side, of pairs whose sides differ in
    length. An unpaired preference has no two sides."""
    longer = (pairs.chosen_tokens - pairs.rejected_tokens).sign()
    differ = (longer != 0) & (pairs.chosen_tokens > 0) & (pairs.rejected_tokens > 0)
    return (_margin(pairs) * longer)[differ]


def _margin(pairs: Pairs) -> Float[Tensor, "P"]:
    """Return by how much the policy prefers the chosen side of each pair."""
    if pairs.ref_chosen is None:
        return pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    chosen, rejected = pairs.log_ratios()
    return chosen - rejected


def _losses(
    model: CausalModel,
    reference: LanguageModel | None,
    batch: Sequence[Comparison],
    loss: PreferenceLoss,
    micro_batch_tokens: int,
    collected: list[Pairs],
    process_group: ProcessGroup,
    balancing: LoadBalancing | None = None,
) -> Iterator[Float[Tensor, ""]]:
    """Yield the loss of each micro-batch; their sum over all ranks is the loss of the batch. This
    rank's pairs are appended to `collected`."""
    kl = 0.0
    if loss.needs_kl:
        assert reference is not None, "the loss needs a reference"
        kl = _mismatched_kl(model, reference, batch, micro_batch_tokens, process_group)
    tokens = [comparison.num_tokens for comparison in batch]
    for micro_batch in process_group.micro_batches(_lengths(batch), micro_batch_tokens):
        comparisons = [batch[i] for i in micro_batch.rows]
        with recorded_routing(model.base_model) as routers:
            chosen, rejected = _both_sides(model, comparisons)
        ref_chosen, ref_rejected = None, None
        if reference is not None:
            with torch.no_grad():
                ref_chosen, ref_rejected = _both_sides(reference, comparisons)
        pairs = Pairs(
            chosen,
            rejected,
            torch.tensor([float(len(c.chosen_ids)) for c in comparisons], device=chosen.device),
            torch.tensor([float(len(c.rejected_ids)) for c in comparisons], device=chosen.device),
            ref_chosen,
            ref_rejected,
            kl,
        )
        if micro_batch.counts:
            collected.append(pairs)
        losses = of_shape(loss, loss(pairs), chosen.shape)
        samples = [[*c.prompt_ids, *c.chosen_ids] for c in comparisons]
        check_finite("the loss", losses, [c.id for c in comparisons], samples.__getitem__)
        total = micro_batch.counts * losses.sum() / len(batch)
        if balancing is not None:
            total = balancing.added_to(total, routers.routing, micro_batch.share_of(tokens))
        yield total


def _lengths(batch: Sequence[Comparison]) -> list[int]:
    """Return the tokens that each pair takes in a batch, padding included."""
    return [2 * (len(c.prompt_ids) + max(len(c.chosen_ids), len(c.rejected_ids))) for c in batch]


def _both_sides(
    model: LanguageModel, comparisons: Sequence[Comparison]
) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    sides = [(c.prompt_ids, c.chosen_ids) for c in comparisons] + [
        (c.prompt_ids, c.rejected_ids) for c in comparisons
    ]
    chosen, rejected = _response_logprobs(model, sides).chunk(2)
    return chosen, rejected


@torch.no_grad()
def _mismatched_kl(
    model: LanguageModel,
    reference: LanguageModel,
    batch: Sequence[Comparison],
    micro_batch_tokens: int,
    process_group: ProcessGroup,
) -> float:
    """Return the reference point z of KTO (Ethayarajh et al. 2024): the mean of log π / π_ref of
    responses to the prompt of another pair, and at least 0."""
    neighbours = [*batch[1:], batch[0]]
    sides = [
        (a.prompt_ids, ids)
        for a, b in zip(batch, neighbours, strict=True)
        for ids in (b.chosen_ids, b.rejected_ids)
        if ids
    ]
    total = 0.0
    for micro_batch in process_group.micro_batches(
        [len(p) + len(r) for p, r in sides], micro_batch_tokens
    ):
        responses = [sides[i] for i in micro_batch.rows]
        total += micro_batch.counts * float(
            (_response_logprobs(model, responses) - _response_logprobs(reference, responses)).sum()
        )
    [total] = process_group.all_reduce_sum(total)
    return max(total / len(sides), 0.0)


def _response_logprobs(
    model: LanguageModel, sides: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Float[Tensor, "B"]:
    """Return Σ log π over the tokens of each response."""
    tokens, lengths = right_pad([(*prompt, *response) for prompt, response in sides])
    starts = torch.tensor([len(prompt) for prompt, _ in sides])
    mask = response_mask(starts, lengths, tokens.shape[1])
    return masked_logprobs(model, tokens, mask).sum(dim=1)
