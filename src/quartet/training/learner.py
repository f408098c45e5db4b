"""The learner: scores rollouts, and updates actor and critic from experience."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from quartet.algorithms.algorithm import Algorithm, Forward
from quartet.algorithms.kl import k3
from quartet.algorithms.masked import masked_mean, row_mean
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.offload import NO_OFFLOAD, Placement
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import GatheredWeights, is_first_replica, is_sharded, local_tensor
from quartet.experience import Batch, Experience, Rollout, row_tokens
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import ActorCritic
from quartet.models.language_model import policy_logprobs
from quartet.models.padding import PAD, response_mask, right_pad, spread
from quartet.tensors import Bool, Float, Int, Tensor
from quartet.training.budget import Budget
from quartet.training.checkpoint import python_random
from quartet.training.ema import Ema
from quartet.training.finite import check_finite
from quartet.training.imitation import imitation_losses
from quartet.training.optim import Optim, Optimizer
from quartet.training.optimizer_step import optimizer_step

AGREEMENT = 1e-4
"""How far from 1 the ratio of the learner's to the sampler's probability may be for the two to
count as the same numbers: more than float32 rounding in deep models, less than any other weights,
temperature or filter would give."""


@dataclass(frozen=True)
class Update:
    """What one call of `Learner.update` did. The tensors hold, for every token, what was seen at
    its last visit."""

    losses: dict[str, float]
    """The terms of the loss, averaged over the optimizer steps."""
    step_stats: dict[str, float]
    """The total loss and the gradient norms, averaged likewise, and the learning rates that the
    update began with."""
    clip_fraction: float
    """The share of token visits at which the clip took the gradient away."""
    first_ratio_error: float
    """max |ratio − 1| on the first minibatch, before any weight has moved: rounding, and nothing
    else."""
    step_kl: float | None
    """Mean KL(π_old ‖ π) per token when all was done, where the algorithm follows it and the actor
    was trained."""
    logprobs: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    clipped: Bool[Tensor, "B T"]
    row_advantages: Float[Tensor, "B"]
    """The mean advantage of each row, as it was learnt from."""
    trained_actor: bool = True
    """False while only the critic warms up."""
    reference_moved: bool = False
    """Whether the reference is no longer the model it was: a fault."""


class Learner:
    """Owns what learns (actor and critic, their optimizers) and the frozen reference."""

    def __init__(
        self,
        models: ActorCritic,
        reference: Any | None,
        optim: Optim,
        sampling: Sampling,
        steps: int,
        seed: int = 0,
        pretraining: Sampler[Demonstration] | None = None,
        micro_batch_tokens: int = 2048,
        process_group: ProcessGroup = SINGLE_PROCESS,
        placement: Placement = NO_OFFLOAD,
    ) -> None:
        """`sampling` says how rollouts are generated; log-probs take its temperature. `steps` is
        the number of updates, over which learning rates follow their schedule. `process_group` are the ranks
        that hold the same models: each is given the same rollouts and experience, computes its
        share of the rows, and returns the whole result."""
        self.process_group, self.budget, self.placement = (
            process_group,
            Budget(micro_batch_tokens, process_group),
            placement,
        )
        self.models, self.reference, self.optim = models, reference, optim
        self.sampling, self.steps = sampling, steps
        self.pretraining = pretraining
        self.ema = Ema(models.actor, optim.ema) if optim.ema else None
        total = steps * optim.epochs * optim.minibatches
        self.optimizers = {
            "actor": Optimizer(models.actor_parameters(), optim.descent(optim.lr), total)
        }
        if critic := models.critic_parameters():
            self.optimizers["critic"] = Optimizer(critic, optim.descent(optim.critic_lr), total)
        self.rng = random.Random(seed)
        self.version = 0
        self.sampler_agrees: bool | None = None
        """Whether the sampler's log-probs are the learner's; not known before the first step."""
        self.device = models.actor.device
        self.reference_checksum = (
            None if reference is None else parameter_checksum(reference, process_group)
        )
        """The reference's weights in one number: they never change."""
        placement.register(reference, shared_with=models.actor.parameters())
        for optimizer in self.optimizers.values():
            placement.register(optimizer.adam)

    def weights(self) -> Weights:
        return Weights(self.version, GatheredWeights(self.models.actor))

    def state(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state() for name, optimizer in self.optimizers.items()},
            "ema": None if self.ema is None else self.ema.state(),
            "rng": self.rng.getstate(),
            "version": self.version,
            "sampler_agrees": self.sampler_agrees,
            "reference_mark": self.reference_checksum,
            "budget": self.budget.state(),
            "pretraining": None if self.pretraining is None else self.pretraining.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(state["optimizers"][name])
            self.placement.register(optimizer.adam)
        if self.ema is not None:
            self.ema.load_state(state["ema"])
        if self.pretraining is not None:
            self.pretraining.load_state(state["pretraining"])
        if self.reference_checksum != state["reference_mark"]:
            raise ValueError("the reference is not the model that the run began with")
        self.budget.load_state(state["budget"])
        self.rng.setstate(python_random(state["rng"]))
        self.version, self.sampler_agrees = state["version"], state["sampler_agrees"]

    def score(self, rollouts: Sequence[Rollout], algorithm: Algorithm) -> Batch:
        """The rollouts as tensors, with what actor, critic and reference say of each token, as far
        as the algorithm reads it. Log-probs and entropies that the sampler took while it sampled
        are not computed again, once the first step has shown that they are the learner's."""
        batch = collate(rollouts, self.device)
        check_finite("the reward", batch.scores, batch.ids, partial(row_tokens, batch))
        with self.placement.on_device(self.reference):
            return self.budget.run_within(
                "scoring", partial(self._scored, batch, rollouts, algorithm)
            )

    @torch.no_grad()
    def _scored(
        self,
        batch: Batch,
        rollouts: Sequence[Rollout],
        algorithm: Algorithm,
        micro_batch_tokens: int,
    ) -> Batch:
        current = batch.entropy is not None and all(
            r.policy_version == self.version for r in rollouts
        )
        known = current and self.sampler_agrees is True and not algorithm.kl.exact_reward
        scores = _Scores(batch, torch.promote_types(self.models.actor.dtype, torch.float32))
        for piece in self.process_group.micro_batches(batch.lengths.tolist(), micro_batch_tokens):
            seen = self._look(batch, piece.rows, algorithm, only_values=known)
            if piece.counts:
                scores.put(piece.rows, *seen)
        scores.collect(self.process_group)
        old, entropy = (
            (batch.rollout_logprobs, batch.entropy) if known else (scores.old, scores.entropy)
        )
        if current and self.sampler_agrees is None:
            self.sampler_agrees = logprobs_agree(batch.rollout_logprobs, old, batch.response_mask)
        ref = (
            None
            if self.reference is None
            else self._logprobs(self.reference, batch, micro_batch_tokens)
        )
        seen_by = (
            ("the log-probability", old),
            ("the reference log-probability", ref),
            ("the value", scores.values),
        )
        for what, numbers in seen_by:
            if numbers is not None:
                check_finite(what, numbers, batch.ids, partial(row_tokens, batch))
        return dataclasses.replace(
            batch,
            old_logprobs=old,
            ref_logprobs=ref,
            exact_kl=scores.exact if algorithm.kl.exact_reward else None,
            entropy=entropy,
            values=scores.values if "critic" in self.optimizers else None,
            final_values=scores.final if algorithm.needs_final_values else None,
        )

    def _look(
        self, batch: Batch, rows: Sequence[int], algorithm: Algorithm, only_values: bool
    ) -> tuple[Forward | None, Float[Tensor, "b t"] | None]:
        """What actor and critic say of some rows; where the algorithm needs it, the values are one
        column longer."""
        lengths = batch.lengths[list(rows)]
        width = int(lengths.max())
        tokens, asked = batch.tokens[list(rows), :width], batch.response_mask[list(rows), :width]
        if (
            algorithm.needs_final_values
        ):  # the value before a token that was never written is that after the last
            tokens, asked = (
                torch.nn.functional.pad(tokens, (0, 1), value=PAD),
                torch.nn.functional.pad(asked, (0, 1)),
            )
            asked = asked.scatter(1, lengths[:, None], True)
        if only_values:
            return None, self.models.values(tokens, asked)
        reference = self.reference if algorithm.kl.exact_reward else None
        now = self.models.forward(tokens, asked, self.sampling.temperature, reference=reference)
        return now, now.values

    @property
    def trains_actor(self) -> bool:
        """Whether the next update trains the actor; in the first `optim.critic_warmup_steps` only
        the critic is trained."""
        return self.version >= self.optim.critic_warmup_steps

    def update(self, experience: Experience, algorithm: Algorithm) -> Update:
        """Train actor and critic on one step's experience, see `_update`."""
        return self._update(experience, algorithm, self.trains_actor)

    def _update(self, experience: Experience, algorithm: Algorithm, train_actor: bool) -> Update:
        """Epochs × minibatches of optimizer steps on one step's experience. Micro-batches bound the
        memory of a minibatch and change nothing else: its denominator is counted over all of it."""
        for what, numbers in (
            ("the advantage", experience.advantages),
            ("the return", experience.returns),
        ):
            if numbers is not None:
                shown = torch.where(experience.response_mask, numbers, 0.0)
                check_finite(what, shown, experience.ids, partial(row_tokens, experience))
        seen = _Seen(experience)
        optimizers = self.optimizers if train_actor else {"critic": self.optimizers["critic"]}
        rates = {f"lr/{name}": optimizer.lr for name, optimizer in optimizers.items()}
        moments = [optimizer.adam for optimizer in optimizers.values()]
        with self.placement.on_device(
            *moments, self.reference if algorithm.kl.exact_loss else None
        ):
            step_stats, epochs = self._descents(experience, algorithm, train_actor, seen)
        self.version += 1
        seen.collect(self.process_group)
        if self.sampler_agrees and seen.tallied.first_ratio_error > AGREEMENT:
            self.sampler_agrees = None  # the next step will tell
        return Update(
            losses={name: total / len(step_stats) for name, total in seen.tallied.losses.items()},
            step_stats=averaged(step_stats)
            | rates
            | ({"policy/epochs": float(epochs)} if self.optim.target_kl is not None else {}),
            clip_fraction=seen.tallied.num_clipped / max(seen.tallied.num_visits, 1),
            first_ratio_error=seen.tallied.first_ratio_error,
            step_kl=self.kl_since(experience) if train_actor and algorithm.needs_step_kl else None,
            logprobs=seen.logprobs,
            entropy=seen.entropy,
            clipped=seen.clipped,
            row_advantages=row_mean(experience.advantages, experience.response_mask),
            trained_actor=train_actor,
            reference_moved=self.reference is not None
            and parameter_checksum(self.reference, self.process_group) != self.reference_checksum,
        )

    def _descents(
        self, experience: Experience, algorithm: Algorithm, train_actor: bool, seen: "_Seen"
    ) -> tuple[list[dict[str, float]], int]:
        """All optimizer steps of an update: what each found, and how many epochs they were."""
        step_stats: list[dict[str, float]] = []
        epochs = 0
        for _ in range(self.optim.epochs):
            for rows in self._minibatches(len(experience)):
                texts = self._pretraining_texts(algorithm) if train_actor else ()
                step = partial(
                    self._step,
                    experience,
                    rows,
                    texts,
                    algorithm,
                    train_actor,
                    seen,
                    not step_stats,
                    seen.tally(),
                )
                step_stats.append(self.budget.run_within("the update", step))
                if train_actor and self.ema is not None:
                    self.ema.update(self.models.actor)
            epochs += 1
            if (
                self.optim.target_kl is not None
                and seen.epoch_kl(self.process_group) > self.optim.target_kl
            ):
                break
        return step_stats, epochs

    def _step(
        self,
        experience: Experience,
        rows: Sequence[int],
        texts: Sequence[Demonstration],
        algorithm: Algorithm,
        train_actor: bool,
        seen: "_Seen",
        first: bool,
        before: "_Tally",
        micro_batch_tokens: int,
    ) -> dict[str, float]:
        """One optimizer step. `before`: what was seen until then, for a step that is done again."""
        seen.tallied = before.copy()
        seen.forget(rows)
        losses = self._losses(
            experience, rows, algorithm, train_actor, seen, first, micro_batch_tokens
        )
        mixed_in = self._pretraining_losses(texts, algorithm, seen, micro_batch_tokens)
        optimizers = self.optimizers if train_actor else {"critic": self.optimizers["critic"]}
        done = optimizer_step(itertools.chain(losses, mixed_in), optimizers, self.process_group)
        if not train_actor:
            self.optimizers["actor"].zero_grad()
        return done

    def kl_since(self, experience: Experience) -> float:
        """Mean KL(π_old ‖ π) per token, by k3, of the policy as it is now to the one that made the
        experience."""
        now = self._logprobs(self.models.actor, experience, self.budget.tokens)
        return float(masked_mean(k3(experience.old_logprobs, now), experience.response_mask))

    def _logprobs(
        self, model: Any, rows: Batch | Experience, micro_batch_tokens: int
    ) -> Float[Tensor, "B T"]:
        return policy_logprobs(
            model,
            rows.tokens,
            rows.lengths,
            rows.response_mask,
            self.sampling.temperature,
            micro_batch_tokens,
            self.process_group,
        )

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
        micro_batch_tokens: int,
    ) -> Iterator[Float[Tensor, ""]]:
        """The loss of one minibatch in pieces that add up to it."""
        denominators = algorithm.denominators(experience.rows(rows))
        reference = self.reference if algorithm.kl.exact_loss else None
        lengths = experience.lengths[list(rows)].tolist()
        for piece in self.process_group.micro_batches(lengths, micro_batch_tokens):
            indices = [rows[i] for i in piece.rows]
            part = experience.rows(indices)
            now = self.models.forward(
                part.tokens,
                part.response_mask,
                self.sampling.temperature,
                algorithm.needs_entropy_gradient,
                reference,
            )
            for what, numbers in (("the log-probability", now.logprobs), ("the value", now.values)):
                if numbers is not None:
                    shown = torch.where(part.response_mask, numbers, 0.0)
                    check_finite(f"{what} in the update", shown, part.ids, partial(row_tokens, part))
            terms = algorithm.loss(part, now, denominators)
            if piece.counts:
                seen.record(indices, part, now, terms, algorithm, first_visit)
            yield piece.counts * (
                sum(terms.values(), torch.zeros((), device=self.device))
                if train_actor
                else terms["value"]
            )

    def _pretraining_texts(self, algorithm: Algorithm) -> Sequence[Demonstration]:
        """The demonstrations that PTX mixes into the next step."""
        return (
            () if self.pretraining is None or algorithm.ptx.coef == 0 else self.pretraining.next()
        )

    def _pretraining_losses(
        self,
        texts: Sequence[Demonstration],
        algorithm: Algorithm,
        seen: "_Seen",
        micro_batch_tokens: int,
    ) -> Iterator[Float[Tensor, ""]]:
        """PTX: the loss of some demonstrations beside that of the rollouts."""
        if not texts:
            return
        for loss in imitation_losses(
            self.models.actor, texts, micro_batch_tokens, self.process_group
        ):
            weighted = algorithm.ptx.coef * loss
            seen.tallied.add("ptx", float(weighted.detach()))
            yield weighted


@dataclass
class _Tally:
    """Sums over what an update has passed by so far."""

    losses: dict[str, float] = field(default_factory=dict)
    num_clipped: int = 0
    num_visits: int = 0
    first_ratio_error: float = 0.0
    kl: float = 0.0

    def add(self, name: str, loss: float) -> None:
        self.losses[name] = self.losses.get(name, 0.0) + loss

    def copy(self) -> "_Tally":
        return dataclasses.replace(self, losses=dict(self.losses))

    def of_all(self, process_group: ProcessGroup) -> "_Tally":
        """A rank that had no row at all knows no term's name."""
        names = sorted(
            {name for known in process_group.all_gather(list(self.losses)) for name in known}
        )
        counts = (float(self.num_clipped), float(self.num_visits), self.kl)
        clipped, visits, kl, *losses = process_group.all_reduce_sum(
            *counts, *(self.losses.get(name, 0.0) for name in names)
        )
        error = process_group.all_reduce_max(self.first_ratio_error)
        return _Tally(dict(zip(names, losses, strict=True)), int(clipped), int(visits), error, kl)


class _Scores:
    """Collects what the models say of the rows of a batch."""

    def __init__(self, batch: Batch, dtype: torch.dtype) -> None:
        self.batch = batch
        self.old, self.entropy, self.exact, self.values = (
            torch.zeros(batch.tokens.shape, dtype=dtype, device=batch.tokens.device)
            for _ in range(4)
        )
        self.final = torch.zeros(len(batch.ids), dtype=dtype, device=batch.tokens.device)
        """The values after the last tokens, where they were asked for."""

    def put(
        self, rows: Sequence[int], now: Forward | None, values: Float[Tensor, "b t"] | None
    ) -> None:
        rows = list(rows)
        lengths = self.batch.lengths[rows]
        width = int(lengths.max())
        mask = self.batch.response_mask[rows, :width]
        if now is not None:
            self.old[rows, :width] = torch.where(mask, now.logprobs[:, :width], 0.0)
            self.entropy[rows, :width] = torch.where(mask, now.entropy[:, :width], 0.0)
            if now.exact_kl is not None:
                self.exact[rows, :width] = torch.where(mask, now.exact_kl[:, :width], 0.0)
        if values is not None:
            self.values[rows, :width] = torch.where(mask, values[:, :width], 0.0)
            if values.shape[1] > width:
                self.final[rows] = values.gather(1, lengths[:, None])[:, 0]

    def collect(self, process_group: ProcessGroup) -> None:
        """What all ranks found; each row is one rank's."""
        process_group.all_reduce(self.old, self.entropy, self.exact, self.values, self.final)


class _Seen:
    """Collects what an update passes by."""

    def __init__(self, experience: Experience) -> None:
        self.logprobs, self.entropy = (torch.zeros_like(experience.old_logprobs) for _ in range(2))
        self.clipped = torch.zeros_like(experience.response_mask)
        self.tallied = _Tally()
        self._epoch = _Tally()
        """As it was when the last epoch ended."""

    def tally(self) -> _Tally:
        return self.tallied.copy()

    def epoch_kl(self, process_group: ProcessGroup) -> float:
        """Mean k3 of π_old to π over the visits since it was last asked, all ranks'."""
        before, self._epoch = self._epoch, self.tally()
        kl, visits = process_group.all_reduce_sum(
            self._epoch.kl - before.kl, float(self._epoch.num_visits - before.num_visits)
        )
        return kl / max(visits, 1)

    def forget(self, rows: Sequence[int]) -> None:
        """What was seen of these rows, before they are visited again, by this rank or another."""
        for seen in (self.logprobs, self.entropy, self.clipped):
            seen[rows] = 0

    def collect(self, process_group: ProcessGroup) -> None:
        """What all ranks saw."""
        process_group.all_reduce(self.logprobs, self.entropy, self.clipped)
        self.tallied = self.tallied.of_all(process_group)

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
        tally = self.tallied
        tally.num_clipped += int(clipped.sum())
        tally.num_visits += int(mask.sum())
        tally.kl += float(torch.where(mask, k3(part.old_logprobs, now.logprobs), 0.0).sum())
        for name, term in terms.items():
            tally.add(name, float(term))
        if first_visit:
            error = ((now.logprobs - part.old_logprobs).expm1().abs() * mask).max()
            tally.first_ratio_error = max(tally.first_ratio_error, float(error))


def averaged(step_stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the steps that were taken; `skipped` counts the others."""
    taken = [d for d in step_stats if "skipped" not in d]
    means = {name: sum(d[name] for d in taken) / len(taken) for name in (taken[0] if taken else {})}
    return means | (
        {"skipped": float(len(step_stats) - len(taken))} if len(taken) < len(step_stats) else {}
    )


@torch.no_grad()
def parameter_checksum(model: Any, process_group: ProcessGroup = SINGLE_PROCESS) -> int:
    """The bits of all parameters, added up: another number, almost surely, when one of them
    changes."""
    held, parts = (
        torch.stack(
            [_bits(p) for p in model.parameters() if is_sharded(p) == kind]
            or [torch.zeros((), dtype=torch.int64)]
        )
        for kind in (False, True)
    )
    total = parts.sum()
    process_group.all_reduce(total)
    return int(held.sum()) + int(total)


def _bits(parameter: Tensor) -> Int[Tensor, ""]:
    """Of this rank's part, where it is the one that counts."""
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = local_tensor(parameter.detach()).view(size).sum(dtype=torch.int64).cpu()
    return (
        bits if not is_sharded(parameter) or is_first_replica(parameter) else torch.zeros_like(bits)
    )


def logprobs_agree(
    sampled: Float[Tensor, "B T"], own: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> bool:
    """Whether the ratio of two policies' probabilities is 1 up to rounding, token by token."""
    return float(((sampled - own).expm1().abs() * mask).max()) <= AGREEMENT


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """Rollouts side by side, padded on the right. Log-probs of the old policy are the sampler's
    until the learner has taken its own."""
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts], device)
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts], device=device)
    mask = response_mask(starts, lengths, tokens.shape[1])
    for row, r in enumerate(rollouts):
        if r.written is not None:
            mask[row, len(r.prompt.ids) : len(r.prompt.ids) + len(r.written)] &= torch.tensor(
                r.written, device=device
            )
    logprobs = spread([_own(r.logprobs, r) or () for r in rollouts], mask)
    return Batch(
        ids=tuple(r.id for r in rollouts),
        tokens=tokens,
        lengths=lengths,
        response_mask=mask,
        scores=torch.tensor(
            [math.nan if r.score is None else r.score for r in rollouts],
            dtype=torch.float32,
            device=device,
        ),
        ended=torch.tensor([r.finish_reason == "stop" for r in rollouts], device=device),
        groups=torch.tensor([r.group for r in rollouts], device=device),
        rollout_logprobs=logprobs,
        old_logprobs=logprobs,
        entropy=_where_all_have_it(
            [_own(r.entropies, r) for r in rollouts], lambda rows: spread(rows, mask)
        ),
        token_scores=_where_all_have_it(
            [_own(r.token_scores, r) for r in rollouts], lambda rows: spread(rows, mask)
        ),
        greedy_scores=_where_all_have_it(
            [r.greedy_score for r in rollouts],
            lambda scores: torch.tensor(scores, dtype=torch.float32, device=device),
        ),
    )


def _own(numbers: Sequence[float] | None, rollout: Rollout) -> Sequence[float] | None:
    """Those that stand on tokens of the policy's own."""
    if numbers is None or rollout.written is None:
        return numbers
    return [number for number, own in zip(numbers, rollout.written, strict=True) if own]


def _where_all_have_it(values: Sequence[Any], make: Callable[[Any], Tensor]) -> Tensor | None:
    return None if any(value is None for value in values) else make(values)
