"""The loop of a user's own stage, and what its steps are given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.process_group import ProcessGroup
from quartet.errors import PartError
from quartet.experience import Prompt, Rollout
from quartet.io.texts import type_in_words
from quartet.loops.progress import Progress, Sampled
from quartet.loops.responses import Responses
from quartet.loops.source import StageSource
from quartet.models.adapters import LanguageModel
from quartet.models.forward import policy_logprobs
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.parts import of_shape
from quartet.tensors import Float, Tensor
from quartet.training.budget import Budget
from quartet.training.load_balancing import LoadBalancing
from quartet.training.metrics import response_metrics
from quartet.training.optim import Optimizer
from quartet.training.optimizer_step import optimizer_step
from quartet.training.state_tree import Tree
from quartet.training.token_losses import RowTokens, padded, token_losses


class StageContext:
    """What `StageSource.step` works with: the policy, its data, responses, and updates.

    Every method gives the same on all ranks of a run, each of which does its share of the work.
    """

    def __init__(
        self,
        source: StageSource,
        policy: CausalModel,
        reference: LanguageModel | None,
        tokenizer: Tokenizer,
        rows: Sampler[Any],
        responses: Responses | None,
        optimizer: Optimizer,
        budget: Budget,
        balance_coef: float = 0.0,
    ) -> None:
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.saved: dict[str, Tree] = {}
        """What the stage keeps from step to step: numbers, texts, tensors, and lists and
        dictionaries of them, by name. It is in every checkpoint."""
        self.number = 0
        """The number of the step, from 1."""
        self.rollouts: list[Rollout] = []
        """The responses that were sampled in this step, which are kept in the record."""
        self._source, self._rows, self._responses = source, rows, responses
        self._optimizer, self._budget, self._balance_coef = optimizer, budget, balance_coef
        self._metrics: dict[str, float] = {}
        self._updates = 0

    @property
    def process_group(self) -> ProcessGroup:
        """The ranks of the run."""
        return self._budget.process_group

    @property
    def temperature(self) -> float:
        """What log-probs are taken at: the sampler's temperature, and 1 where nothing is
        sampled."""
        return 1.0 if self._responses is None else self._responses.sampling.temperature

    def batch(self) -> list[Any]:
        """Return the next `batch_size` rows of what the stage `reads`: `Prompt`s, `Demonstration`s
        or `Comparison`s."""
        return self._rows.next()

    def sample(self, prompts: Sequence[Prompt], samples_per_prompt: int = 1) -> list[Rollout]:
        """Return responses of the present policy, with their scores: those to the first prompt
        come first. Their mean reward and length are among the metrics of the step.

        Raises `PartError` where the stage does not read prompts.
        """
        responses = self._responses
        if responses is None:
            raise PartError('sample: the stage samples only where its class has reads = "prompts".')
        rollouts = responses.sample(prompts, samples_per_prompt)
        self.rollouts += rollouts
        self._metrics |= response_metrics(self.rollouts)
        return rollouts

    def logprobs(
        self, rows: Sequence[Any], model: LanguageModel | None = None
    ) -> Float[Tensor, "B T"]:
        """Return the log-probs that the policy, or another model, gives to the response tokens of
        rollouts or demonstrations, without a gradient: entry t is that of token t of prompt and
        response, and 0 outside the response."""
        records = [record(row) for row in rows]
        tokens, lengths, mask = padded(records)
        return self._budget.run_within(
            "the log-probs",
            lambda most: policy_logprobs(
                self.policy if model is None else model,
                tokens,
                lengths,
                mask,
                self.temperature,
                most,
                self.process_group,
            ),
        )

    def update(
        self, rows: Sequence[Any], loss: Callable[[RowTokens], Float[Tensor, "b t"]]
    ) -> dict[str, float]:
        """Take one optimizer step on the mean of a loss over the response tokens of rows, which are
        rollouts or demonstrations. Return
        the loss, the norm of its gradient before clipping, and the learning rate, which are among
        the metrics of the step.

        `loss` is called once for each micro-batch, with some of the rows, and returns the loss of
        each token, [b t]. Raises `PartError` for another shape, and for more optimizer steps than
        `updates` says.
        """
        source = self._source
        if self._updates == source.updates:
            raise PartError(
                f"{source.type}: takes more than {source.updates} optimizer steps in a step. Say "
                "how many there are in its property updates: the learning rate counts them."
            )
        records, lr = [record(row) for row in rows], self._optimizer.lr
        if not sum(len(r.response_ids) for r in records):
            raise PartError(f"{source.type}: update was given no response token.")
        metrics = self._budget.run_within("the update", partial(self._update, records, loss))
        self._updates += 1
        self._metrics |= {**metrics, "lr": lr}
        return {**metrics, "lr": lr}

    def _update(
        self,
        records: Sequence[Demonstration],
        loss: Callable[[RowTokens], Float[Tensor, "b t"]],
        micro_batch_tokens: int,
    ) -> dict[str, float]:
        def masked(tokens: RowTokens) -> Float[Tensor, "b t"]:
            losses = of_shape(self._source, loss(tokens), tokens.mask.shape)
            if not losses.requires_grad:
                raise PartError(f"{self._source.type}: the loss of update has no gradient.")
            return torch.where(tokens.mask, losses, 0.0)

        balancing = LoadBalancing(self._balance_coef)
        losses = token_losses(
            self.policy,
            records,
            masked,
            micro_batch_tokens,
            self.process_group,
            balancing,
            self.reference,
            self.temperature,
        )
        metrics = optimizer_step(losses, {"policy": self._optimizer}, self.process_group)
        return metrics | balancing.metrics(self.process_group)

    def take_step(self, number: int) -> dict[str, float]:
        """Take the step of this number, and return its metrics."""
        self.number, self.rollouts, self._metrics, self._updates = number, [], {}, 0
        own = self._source.step(self)
        if not isinstance(own, Mapping):
            name = type(own).__name__
            raise PartError(f"{self._source.type}: step returned a {name}, not a dict of metrics.")
        return self._metrics | {str(name): self._number(name, value) for name, value in own.items()}

    def _number(self, name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise PartError(
                f"{self._source.type}: step returned {type_in_words(value)} as the metric {name}, "
                "not a number."
            ) from None

    def state(self) -> Tree:
        """Return what a checkpoint holds beside the policy and its optimizer."""
        sampled = {} if self._responses is None else self._responses.generator.state()
        return {"rows": self._rows.state(), "generator": sampled, "saved": self.saved}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._rows.load_state(state["rows"])
        if self._responses is not None:
            self._responses.generator.load_state(state["generator"])
        self.saved = dict(state["saved"])


def custom(context: StageContext, steps: int, done: int = 0) -> Iterator[Progress]:
    """Yield the steps that follow the first `done` ones."""
    for number in range(done + 1, steps + 1):
        metrics = context.take_step(number)
        rollouts = context.rollouts
        yield Sampled(number, metrics, rollouts) if rollouts else Progress(number, metrics)


def record(row: Any) -> Demonstration:
    """Return a prompt and its response as a demonstration."""
    if isinstance(row, Rollout):
        return Demonstration(row.id, row.prompt.ids, row.response_ids, row.policy_mask)
    if isinstance(row, Demonstration):
        return row
    raise PartError(
        f"a {type(row).__name__} is no row with a response: give rollouts or demonstrations."
    )
