"""The learner: scores rollouts, and updates actor and critic from experience."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.kl import k3
from quartet.algorithms.masked import masked_mean
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.experience import Batch, Experience, Rollout
from quartet.generation.protocol import Weights
from quartet.models.actor_critic import ActorCritic
from quartet.models.language_model import policy_logprobs
from quartet.models.padding import PAD, micro_batches, response_mask, right_pad, spread
from quartet.tensors import Bool, Float, Tensor
from quartet.training.checkpoint import python_random
from quartet.training.descend import check_finite, descend
from quartet.training.ema import Ema
from quartet.training.imitation import imitation_losses
from quartet.training.optim import Optim, Optimizer

AGREEMENT = 1e-4
"""How far from 1 the ratio of the learner's to the sampler's probability may be for the two to count as the same numbers: more
than float32 rounding in deep models, less than any other weights, temperature or filter would give."""


@dataclass(frozen=True)
class Update:
    """What one call of `Learner.update` did. The tensors hold, for every token, what was seen at its last visit."""

    losses: dict[str, float]
    """The terms of the loss, averaged over the optimizer steps."""
    descents: dict[str, float]
    """The total loss and the gradient norms, averaged likewise, and the learning rates that the update began with."""
    clip_fraction: float
    """The share of token visits at which the clip took the gradient away."""
    first_ratio_error: float
    """max |ratio − 1| on the first minibatch, before any weight has moved: rounding, and nothing else."""
    step_kl: float | None
    """Mean KL(π_old ‖ π) per token when all was done, where the algorithm follows it and the actor was trained."""
    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]
    trained_actor: bool = True
    """False while only the critic warms up."""


class Learner:
    """Owns what learns (actor and critic, their optimizers) and the frozen reference."""

    def __init__(
        self,
        models: ActorCritic,
        reference: Any | None,
        optim: Optim,
        temperature: float,
        steps: int,
        seed: int,
        pretraining: Sampler[Demonstration] | None = None,
        micro_batch_tokens: int = 2048,
    ) -> None:
        self.micro_batch_tokens = micro_batch_tokens
        self.models, self.reference, self.optim, self.temperature = models, reference, optim, temperature
        self.pretraining = pretraining
        self.ema = Ema(models.actor, optim.ema) if optim.ema else None
        total = steps * optim.epochs * optim.minibatches
        self.optimizers = {"actor": Optimizer(models.actor_parameters(), optim.descent(optim.lr), total)}
        if critic := models.critic_parameters():
            self.optimizers["critic"] = Optimizer(critic, optim.descent(optim.critic_lr), total)
        self.rng = random.Random(seed)
        self.version = 0
        self.sampler_agrees: bool | None = None
        """Whether the sampler's log-probs are the learner's; not known before the first step."""
        self.device = models.actor.device

    def weights(self) -> Weights:
        return Weights(self.version, self.models.actor.state_dict())

    def state(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state() for name, optimizer in self.optimizers.items()},
            "ema": None if self.ema is None else self.ema.state(),
            "rng": self.rng.getstate(),
            "version": self.version,
            "sampler_agrees": self.sampler_agrees,
            "pretraining": None if self.pretraining is None else self.pretraining.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(state["optimizers"][name])
        if self.ema is not None:
            self.ema.load_state(state["ema"])
        if self.pretraining is not None:
            self.pretraining.load_state(state["pretraining"])
        self.rng.setstate(python_random(state["rng"]))
        self.version, self.sampler_agrees = state["version"], state["sampler_agrees"]

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], algorithm: Algorithm) -> Batch:
        """The rollouts as tensors, with what actor, critic and reference say of each token, as far as the algorithm reads
        it. Log-probs and entropies that the sampler took while it sampled are not computed again, once the first step has
        shown that they are the learner's."""
        batch = collate(rollouts, self.device)
        check_finite("the reward", batch.scores, batch.ids)
        current = batch.entropy is not None and all(r.policy_version == self.version for r in rollouts)
        known = current and self.sampler_agrees is True and not algorithm.kl.exact_reward
        old, entropy, values, exact = (torch.zeros_like(batch.rollout_logprobs) for _ in range(4))
        if known and batch.entropy is not None:
            old, entropy = batch.rollout_logprobs, batch.entropy
        final = torch.zeros_like(batch.scores)
        for rows in micro_batches(batch.lengths.tolist(), self.micro_batch_tokens):
            width = int(batch.lengths[rows].max())
            tokens, mask = batch.tokens[rows, :width], batch.response_mask[rows, :width]
            asked = mask
            if algorithm.needs_final_values:  # the value before a token that was never written is that after the last
                tokens, asked = torch.nn.functional.pad(tokens, (0, 1), value=PAD), torch.nn.functional.pad(mask, (0, 1))
                asked = asked.scatter(1, batch.lengths[rows][:, None], True)
            if known:
                seen = self.models.values(tokens, asked)
            else:
                reference = self.reference if algorithm.kl.exact_reward else None
                now = self.models.forward(tokens, asked, self.temperature, reference=reference)
                seen = now.values
                old[rows, :width] = torch.where(mask, now.logprobs[:, :width], 0.0)
                entropy[rows, :width] = torch.where(mask, now.entropy[:, :width], 0.0)
                if now.exact_kl is not None:
                    exact[rows, :width] = torch.where(mask, now.exact_kl[:, :width], 0.0)
            if seen is not None:
                values[rows, :width] = torch.where(mask, seen[:, :width], 0.0)
                if algorithm.needs_final_values:
                    final[rows] = seen.gather(1, batch.lengths[rows][:, None])[:, 0]
        if current and self.sampler_agrees is None:
            self.sampler_agrees = same_numbers(batch.rollout_logprobs, old, batch.response_mask)
        ref = None if self.reference is None else self._reference_logprobs(batch)
        for what, numbers in (("the log-probability", old), ("the value", values)):
            check_finite(what, numbers, batch.ids)
        return dataclasses.replace(
            batch,
            old_logprobs=old,
            ref_logprobs=ref,
            exact_kl=exact if algorithm.kl.exact_reward else None,
            entropy=entropy,
            values=values if "critic" in self.optimizers else None,
            final_values=final if algorithm.needs_final_values else None,
        )

    def update(self, experience: Experience, algorithm: Algorithm, train_actor: bool = True) -> Update:
        """Epochs × minibatches of optimizer steps on one step's experience. Micro-batches bound the memory of a
        minibatch and change nothing else: its denominator is counted over all of it."""
        for what, numbers in (("the advantage", experience.advantages), ("the return", experience.returns)):
            if numbers is not None:
                check_finite(what, torch.where(experience.response_mask, numbers, 0.0), experience.ids)
        seen = _Seen(experience)
        steps = [m for _ in range(self.optim.epochs) for m in self._minibatches(len(experience))]
        optimizers = self.optimizers if train_actor else {"critic": self.optimizers["critic"]}
        descents: dict[str, float] = {}
        rates = {f"lr/{name}": optimizer.lr for name, optimizer in optimizers.items()}
        for number, rows in enumerate(steps):
            losses = self._losses(experience, rows, algorithm, train_actor, seen, first_visit=number == 0)
            mixed_in = self._pretraining_losses(algorithm, seen) if train_actor else ()
            for name, value in descend(itertools.chain(losses, mixed_in), optimizers).items():
                descents[name] = descents.get(name, 0.0) + value / len(steps)
            if not train_actor:
                self.optimizers["actor"].zero_grad()
            elif self.ema is not None:
                self.ema.update(self.models.actor)
        self.version += 1
        if self.sampler_agrees and seen.first_ratio_error > AGREEMENT:
            self.sampler_agrees = None  # the next step will tell
        return Update(
            losses={name: total / len(steps) for name, total in seen.losses.items()},
            descents=descents | rates,
            clip_fraction=seen.num_clipped / max(seen.num_visits, 1),
            first_ratio_error=seen.first_ratio_error,
            step_kl=self._step_kl(experience) if train_actor and algorithm.needs_step_kl else None,
            logprobs=seen.logprobs,
            entropy=seen.entropy,
            clipped=seen.clipped,
            trained_actor=train_actor,
        )

    def _step_kl(self, experience: Experience) -> float:
        now = self._logprobs(self.models.actor, experience)
        return float(masked_mean(k3(experience.old_logprobs, now), experience.response_mask))

    def _logprobs(self, model: Any, rows: Batch | Experience) -> Float[Tensor, "B T"]:
        return policy_logprobs(model, rows.tokens, rows.lengths, rows.response_mask, self.temperature, self.micro_batch_tokens)

    def _reference_logprobs(self, batch: Batch) -> Float[Tensor, "B T"]:
        logprobs = self._logprobs(self.reference, batch)
        check_finite("the reference log-probability", logprobs, batch.ids)
        return logprobs

    def _minibatches(self, num_rows: int) -> list[list[int]]:
        order = list(range(num_rows))
        self.rng.shuffle(order)
        count = min(self.optim.minibatches, num_rows)
        return [order[i::count] for i in range(count)]

    def _losses(
        self,
        experience: Experience,
        rows: Sequence[int],
        algorithm: Algorithm,
        train_actor: bool,
        seen: "_Seen",
        first_visit: bool,
    ) -> Iterator[Float[Tensor, ""]]:
        """The loss of one minibatch in pieces that add up to it."""
        denominators = algorithm.denominators(experience.rows(rows))
        reference = self.reference if algorithm.kl.exact_loss else None
        lengths = experience.lengths[list(rows)].tolist()
        for piece in micro_batches(lengths, self.micro_batch_tokens):
            indices = [rows[i] for i in piece]
            part = experience.rows(indices)
            now = self.models.forward(
                part.tokens,
                part.response_mask,
                self.temperature,
                algorithm.needs_entropy_gradient,
                reference,
            )
            check_finite("the log-probability in the update", torch.where(part.response_mask, now.logprobs, 0.0), part.ids)
            if now.values is not None:
                check_finite("the value in the update", torch.where(part.response_mask, now.values, 0.0), part.ids)
            terms = algorithm.loss(part, now, denominators)
            seen.record(indices, part, now, terms, algorithm, first_visit)
            yield sum(terms.values(), torch.zeros((), device=self.device)) if train_actor else terms["value"]

    def _pretraining_losses(self, algorithm: Algorithm, seen: "_Seen") -> Iterator[Float[Tensor, ""]]:
        """PTX: the loss of some demonstrations beside that of the rollouts."""
        if self.pretraining is None or algorithm.ptx.coef == 0:
            return
        for loss in imitation_losses(self.models.actor, self.pretraining.next(), self.micro_batch_tokens):
            weighted = algorithm.ptx.coef * loss
            seen.losses["ptx"] = seen.losses.get("ptx", 0.0) + float(weighted.detach())
            yield weighted


class _Seen:
    """Collects what an update passes by."""

    def __init__(self, experience: Experience) -> None:
        self.logprobs, self.entropy = (torch.zeros_like(experience.old_logprobs) for _ in range(2))
        self.clipped = torch.zeros_like(experience.response_mask)
        self.losses: dict[str, float] = {}
        self.num_clipped = self.num_visits = 0
        self.first_ratio_error = 0.0

    @torch.no_grad()
    def record(
        self,
        indices: list[int],
        part: Experience,
        now: Forward,
        terms: dict[str, Tensor],
        algorithm: Algorithm,
        first_visit: bool,
    ) -> None:
        mask, width = part.response_mask, part.tokens.shape[1]
        clipped = algorithm.clipped(part, now.logprobs)
        self.logprobs[indices, :width] = torch.where(mask, now.logprobs, 0.0)
        self.entropy[indices, :width] = torch.where(mask, now.entropy, 0.0)
        self.clipped[indices, :width] = clipped
        self.num_clipped += int(clipped.sum())
        self.num_visits += int(mask.sum())
        for name, term in terms.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(term)
        if first_visit:
            error = ((now.logprobs - part.old_logprobs).expm1().abs() * mask).max()
            self.first_ratio_error = max(self.first_ratio_error, float(error))


def same_numbers(sampled: Float[Tensor, "B T"], own: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> bool:
    """Whether the ratio of two policies' probabilities is 1 up to rounding, token by token."""
    return float(((sampled - own).expm1().abs() * mask).max()) <= AGREEMENT


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """Rollouts side by side, padded on the right. Log-probs of the old policy are the sampler's until the learner has
    taken its own."""
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts], device)
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts], device=device)
    mask = response_mask(starts, lengths, tokens.shape[1])
    for row, r in enumerate(rollouts):
        if r.written is not None:
            mask[row, len(r.prompt.ids) : len(r.prompt.ids) + len(r.written)] &= torch.tensor(r.written, device=device)
    logprobs = spread([_own(r.logprobs, r) or () for r in rollouts], mask)
    return Batch(
        ids=tuple(r.id for r in rollouts),
        tokens=tokens,
        lengths=lengths,
        response_mask=mask,
        scores=torch.tensor([math.nan if r.score is None else r.score for r in rollouts], dtype=torch.float32, device=device),
        ended=torch.tensor([r.finish_reason == "stop" for r in rollouts], device=device),
        groups=torch.tensor([r.group for r in rollouts], device=device),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        entropy=_where_all_have_it([_own(r.entropies, r) for r in rollouts], lambda rows: spread(rows, mask)),
        token_scores=_where_all_have_it([_own(r.token_scores, r) for r in rollouts], lambda rows: spread(rows, mask)),
        greedy_scores=_where_all_have_it(
            [r.greedy_score for r in rollouts], lambda scores: torch.tensor(scores, dtype=torch.float32, device=device)
        ),
    )


def _own(numbers: Sequence[float] | None, rollout: Rollout) -> Sequence[float] | None:
    """Those that stand on tokens of the policy's own."""
    if numbers is None or rollout.written is None:
        return numbers
    return [number for number, own in zip(numbers, rollout.written, strict=True) if own]


def _where_all_have_it(values: Sequence[Any], make: Callable[[Any], Tensor]) -> Tensor | None:
    return None if any(value is None for value in values) else make(values)
