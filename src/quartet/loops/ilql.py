"""Offline Q-learning on text with rewards (ILQL)."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from quartet.algorithms.ilql import ActionValues, Ilql, is_last
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.loops.progress import Progress
from quartet.models.forward import forward_positions, statistics
from quartet.models.logprobs import at_least_float32
from quartet.models.padding import response_mask, right_pad
from quartet.models.protocols import CausalModel
from quartet.models.q_heads import QHeads
from quartet.models.routing import recorded_routing
from quartet.tensors import Float, Tensor
from quartet.training.budget import Budget
from quartet.training.finite import check_finite
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step, sum_of_losses

NUMBERS = ("lm", "q", "v", "cql", "values", "action_values", "returns", "squares", "errors")
"""What is summed over tokens for the metrics: the terms of the loss, V, Q, the returns of the data,
their squares, and the squares of return − Q."""


def ilql(
    learner: "IlqlLearner",
    rows: Sampler[Demonstration],
    optimizer: Optimizer,
    steps: int,
    budget: Budget,
    done: int = 0,
) -> Iterator[Progress]:
    """Yield the steps that follow the first `done` ones. Each minimises the loss on one batch of
    rows, and moves the target network. `optimizer` steps the model and the heads."""
    for number in range(done + 1, steps + 1):
        lr = optimizer.lr
        metrics = budget.run_within("the update", partial(learner.step, rows.next(), optimizer))
        yield Progress(number, {**metrics, "lr": lr})


class IlqlLearner:
    """A model with its heads, and the loss that they learn by."""

    def __init__(
        self,
        model: CausalModel,
        heads: QHeads,
        loss: Ilql,
        process_group: ProcessGroup = SINGLE_PROCESS,
        balance_coef: float = 0.0,
    ) -> None:
        """`balance_coef` multiplies the load-balancing loss of a mixture of experts."""
        self.model, self.heads, self.loss, self.process_group = model, heads, loss, process_group
        self.balance_coef = balance_coef

    def step(
        self, batch: Sequence[Demonstration], optimizer: Optimizer, micro_batch_tokens: int
    ) -> dict[str, float]:
        """Take one optimizer step, move the target network, and return the metrics."""
        sums: list[Float[Tensor, "n"]] = []
        balancing = LoadBalancing(self.balance_coef)
        metrics = optimizer_step(
            self._losses(batch, micro_batch_tokens, sums, balancing),
            {"policy": optimizer},
            self.process_group,
        )
        if "skipped" in metrics:
            return metrics
        self.heads.follow(self.loss.polyak)
        metrics |= balancing.metrics(self.process_group)
        return metrics | self._metrics(sums, num_tokens(batch))

    @torch.no_grad()
    def held_out(self, rows: Sequence[Demonstration], micro_batch_tokens: int) -> dict[str, float]:
        """Return the loss on held-out rows."""
        return {
            "loss": sum_of_losses(self._losses(rows, micro_batch_tokens, []), self.process_group)
        }

    def _losses(
        self,
        batch: Sequence[Demonstration],
        micro_batch_tokens: int,
        sums: list[Tensor],
        balancing: LoadBalancing | None = None,
    ) -> Iterator[Float[Tensor, ""]]:
        """Yield the loss of each micro-batch; their sum over all ranks is the mean over the
        response tokens of the batch. This rank's sums for the metrics are appended to `sums`."""
        sizes = [len(row.prompt_ids) + len(row.response_ids) for row in batch]
        for micro_batch in self.process_group.micro_batches(sizes, micro_batch_tokens):
            rows = [batch[i] for i in micro_batch.rows]
            with recorded_routing(self.model.base_model) as routers:
                values = self.action_values(rows)
            terms = self.loss(values)
            losses = torch.stack(list(terms.values())).sum(0)
            if micro_batch.counts:
                sums.append(_sums(values, terms, self.loss.gamma))
            samples = [[*row.prompt_ids, *row.response_ids] for row in rows]
            per_row = torch.zeros(len(rows), device=losses.device).index_add(
                0, values.rows, losses.detach().float()
            )
            check_finite("the loss", per_row, [row.id for row in rows], samples.__getitem__)
            loss = micro_batch.counts * losses.sum() / num_tokens(batch)
            if balancing is not None:
                loss = balancing.added_to(loss, routers.routing, micro_batch.share_of(sizes))
            yield loss

    def action_values(self, rows: Sequence[Demonstration]) -> ActionValues:
        """Return what the models say of the response tokens of these rows. A row's reward is its
        score, at its last token."""
        tokens, lengths = right_pad([(*row.prompt_ids, *row.response_ids) for row in rows])
        starts = torch.tensor([len(row.prompt_ids) for row in rows])
        mask = response_mask(starts, lengths, tokens.shape[1])
        for number, row in enumerate(rows):
            if row.loss_mask is not None:
                end = len(row.prompt_ids) + len(row.loss_mask)
                mask[number, len(row.prompt_ids) : end] &= torch.tensor(row.loss_mask)
        outputs = forward_positions(self.model, tokens, mask)
        device = outputs.hidden.device
        logprobs, _ = statistics(self.model, outputs, tokens, mask, 1.0)
        of_row = mask.nonzero()[:, 0].to(device)
        scores = torch.tensor([float(row.score or 0.0) for row in rows], device=device)
        rewards = torch.where(is_last(of_row), scores[of_row], 0.0)
        q, target_q, q_logprobs, values = self.heads(outputs, tokens[mask].to(device))
        return ActionValues(
            at_least_float32(logprobs[mask.to(device)]),
            q,
            target_q,
            q_logprobs,
            values,
            rewards,
            of_row,
        )

    def _metrics(self, sums: Sequence[Tensor], count: int) -> dict[str, float]:
        """Return the metrics of a step from sums over tokens on each rank."""
        own = torch.stack(list(sums)).sum(0).tolist() if sums else [0.0] * len(NUMBERS)
        totals = self.process_group.all_reduce_sum(*own)
        means = {name: total / count for name, total in zip(NUMBERS, totals, strict=True)}
        variance = means["squares"] - means["returns"] ** 2
        # The variance of return − Q: that of its mean is left out, as in explained_variance.
        bias = means["returns"] - means["action_values"]
        unexplained = means["errors"] - bias**2
        return {
            **{f"loss/{name}": means[name] for name in ("lm", "q", "v", "cql")},
            "value/mean": means["values"],
            "q/mean": means["action_values"],
            "return/mean": means["returns"],
            "return/rms": math.sqrt(means["squares"]),
            "q/explained_variance": 1 - unexplained / variance if variance > 1e-12 else 0.0,
        }


def num_tokens(batch: Sequence[Demonstration]) -> int:
    """Return how many tokens of these rows are learnt from."""
    return sum(
        len(row.response_ids) if row.loss_mask is None else sum(row.loss_mask) for row in batch
    )


def _sums(
    values: ActionValues, terms: dict[str, Float[Tensor, "N"]], gamma: float
) -> Float[Tensor, "n"]:
    """Return the sums of `NUMBERS` over the tokens."""
    returns = discounted(values, gamma)
    rows = [
        *(terms[name] for name in ("lm", "q", "v", "cql")),
        values.values,
        values.q,
        returns,
        returns.square(),
        (returns - values.q).square(),
    ]
    return torch.stack([row.detach().double().sum() for row in rows])


def discounted(values: ActionValues, gamma: float) -> Float[Tensor, "N"]:
    """Return the return from each token on: the reward at the end of its row, discounted once for
    each token before it."""
    ends = is_last(values.rows).nonzero()[:, 0]
    places = torch.arange(len(values.rows), device=ends.device)
    end = ends[torch.searchsorted(ends, places)]
    return values.rewards[end] * gamma ** (end - places)
