"""The learner: scores rollouts, and trains actor and critic on experience."""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from quartet.distributed.sharding import GatheredWeights
from quartet.errors import QuartetError
from quartet.experience import Batch, Experience, Rollout, row_tokens
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import ActorCritic, ForwardRequest
from quartet.models.adapters import LanguageModel
from quartet.models.forward import prompts
from quartet.models.trunk import block_matrices
from quartet.tensors import Float, Tensor
from quartet.training.batch import collate
from quartet.training.budget import Budget
from quartet.training.checksum import ReferenceChecksum
from quartet.training.ema import Ema
from quartet.training.finite import check_finite
from quartet.training.imitation import imitation_losses
from quartet.training.load_balancing import LoadBalancing
from quartet.training.optim import Optim, Optimizer
from quartet.training.optimizer_step import optimizer_step
from quartet.training.random_state import python_random
from quartet.training.scoring import AGREEMENT, Scorer, logprobs_agree
from quartet.training.update import Update, UpdateRecord, mean_stats


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step learns from."""

    experience: Experience
    """The experience of the whole update."""
    rows: list[int]
    """The rows of it that this step takes."""
    demonstrations: Sequence[Demonstration] = ()
    """What PTX adds."""


class Learner:
    """Holds the models that are trained (actor and critic), their optimizers, and the frozen
    reference."""

    def __init__(
        self,
        models: ActorCritic,
        reference: LanguageModel | None,
        optim: Optim,
        sampling: Sampling,
        steps: int,
        seed: int = 0,
        pretraining: Sampler[Demonstration] | None = None,
        micro_batch_tokens: int = 2048,
        process_group: ProcessGroup = SINGLE_PROCESS,
        placement: Placement = NO_OFFLOAD,
        balance_coef: float = 0.0,
        scoring_tokens: int | None = None,
    ) -> None:
        """`sampling` says how rollouts are generated: log-probs are taken at its temperature.
        `steps` is the number of updates, over which learning rates follow their schedule.
        `pretraining` gives the demonstrations of PTX. `process_group` is the ranks that hold the
        same models: each is given the same rollouts and experience, computes its share of the rows,
        and returns the results of all. `balance_coef` multiplies the load-balancing losses of actor
        and critic, where they are mixtures of experts. `scoring_tokens` are those of a forward pass
        without a gradient; None: as many as a micro-batch has."""
        self.process_group, self.placement = process_group, placement
        self.budget = Budget(micro_batch_tokens, process_group, scoring_tokens)
        self.models, self.reference, self.optim = models, reference, optim
        self.sampling, self.steps, self.balance_coef = sampling, steps, balance_coef
        self.pretraining = pretraining
        self.ema = Ema(models.actor, optim.ema) if optim.ema else None
        self.scorer = Scorer(models, reference, sampling.temperature, process_group)
        num_steps = steps * optim.epochs * optim.minibatches
        matrices = block_matrices(models.actor, getattr(models, "critic", None))
        self.optimizers = {
            "actor": Optimizer(
                models.actor_parameters(), optim.optimizer_config(optim.lr), num_steps, matrices
            )
        }
        if critic := models.critic_parameters():
            self.optimizers["critic"] = Optimizer(
                critic, optim.optimizer_config(optim.critic_lr), num_steps, matrices
            )
        self.rng = random.Random(seed)
        self.version = 0
        """The number of updates that the weights have had."""
        self.sampler_agrees: bool | None = None
        """Whether the sampler's log-probs are the learner's; None until a step has compared them.
        """
        self.device = models.actor.device
        self.reference_checksum = ReferenceChecksum(reference, process_group)
        placement.register(reference, shared_with=models.actor.parameters())
        for optimizer in self.optimizers.values():
            self._register_moments(optimizer)

    def weights(self) -> Weights:
        """Return the actor's weights as they are now, for a generator."""
        return Weights(self.version, GatheredWeights(self.models.actor))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds. Moments may still be on their way to main memory:
        `placement.settle` waits until they can be read."""
        return {
            "optimizers": {name: optimizer.state() for name, optimizer in self.optimizers.items()},
            "ema": None if self.ema is None else self.ema.state(),
            "rng": self.rng.getstate(),
            "version": self.version,
            "sampler_agrees": self.sampler_agrees,
            "reference_mark": self.reference_checksum.state(),
            "budget": self.budget.state(),
            "pretraining": None if self.pretraining is None else self.pretraining.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`, in which the optimizers have the weights. Raises `StateMisfit`
        for one of other models."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(state["optimizers"][name])
            self._register_moments(optimizer)  # they have been loaded to the device
        if self.ema is not None:
            self.ema.load_state(state["ema"])
        if self.pretraining is not None:
            self.pretraining.load_state(state["pretraining"])
        self.reference_checksum.load_state(state["reference_mark"])
        self.budget.load_state(state["budget"])
        self.rng.setstate(python_random(state["rng"]))
        self.version, self.sampler_agrees = state["version"], state["sampler_agrees"]

    def _register_moments(self, optimizer: Optimizer) -> None:
        for moments in optimizer.torch_optimizers:
            self.placement.register(moments)

    # --- scoring

    def score(self, rollouts: Sequence[Rollout], algorithm: Algorithm) -> Batch:
        """Return the rollouts as a batch, with the outputs of actor, critic and reference that the
        algorithm reads.

        Where the first step has shown that the sampler's log-probs are the learner's, the sampler's
        log-probs and entropies are taken, and the actor does not run again.
        """
        batch = collate(rollouts)
        check_finite("the reward", batch.scores, batch.ids, partial(row_tokens, batch))
        if self.sampling.keep_mask and batch.kept is None:
            raise QuartetError(
                "rollout.keep_mask = true, but the generator's rollouts do not say which ids the "
                "filter left (Rollout.kept). Take it out, or use the native generator."
            )
        with self.placement.on_device(self.reference, wait=False):
            return self.budget.run_within(
                "scoring", partial(self._score, batch, rollouts, algorithm), scoring=True
            )

    @torch.no_grad()
    def _score(
        self,
        batch: Batch,
        rollouts: Sequence[Rollout],
        algorithm: Algorithm,
        micro_batch_tokens: int,
    ) -> Batch:
        on_policy = batch.entropy is not None and all(
            r.policy_version == self.version for r in rollouts
        )
        reuse = on_policy and self.sampler_agrees is True and not algorithm.kl.exact_reward
        if algorithm.kl.exact_reward:
            self.placement.ready(self.reference)
        scores = self.scorer.score(batch, algorithm, micro_batch_tokens, only_values=reuse)
        old = batch.rollout_logprobs if reuse else scores.logprobs
        if on_policy and self.sampler_agrees is None:
            self.sampler_agrees = logprobs_agree(batch.rollout_logprobs, old, batch.response_mask)
        reference = None
        if self.reference is not None:
            self.placement.ready(self.reference)  # it came while the actor and critic read
            reference = self.scorer.logprobs(self.reference, batch, micro_batch_tokens)
        for what, numbers in (
            ("the log-probability", old),
            ("the reference log-probability", reference),
            ("the value", scores.values),
        ):
            if numbers is not None:
                check_finite(what, numbers, batch.ids, partial(row_tokens, batch))
        return dataclasses.replace(
            batch,
            old_logprobs=old,
            ref_logprobs=reference,
            exact_kl=scores.exact_kl if algorithm.kl.exact_reward else None,
            entropy=batch.entropy if reuse else scores.entropy,
            values=scores.values if "critic" in self.optimizers else None,
            final_values=scores.final_values if algorithm.needs_final_values else None,
        )

    # --- training

    @property
    def trains_actor(self) -> bool:
        """Whether the next update trains the actor. The first `optim.critic_warmup_steps` updates
        train the critic alone."""
        return self.version >= self.optim.critic_warmup_steps

    def stepped_optimizers(self) -> Mapping[str, Optimizer]:
        """Return the optimizers that step in the next update."""
        return self.optimizers if self.trains_actor else {"critic": self.optimizers["critic"]}

    def update(self, experience: Experience, algorithm: Algorithm) -> Update:
        """Train actor and critic on the experience of one step, in `optim.epochs` passes of
        `optim.minibatches` optimizer steps each.

        Micro-batches bound the memory of a minibatch and change nothing else: the denominators of
        its loss are counted over all of it.
        """
        _check_experience(experience)
        optimizers = self.stepped_optimizers()
        train_actor = "actor" in optimizers
        rates = {f"lr/{name}": optimizer.lr for name, optimizer in optimizers.items()}
        moments = [m for o in optimizers.values() for m in o.torch_optimizers]
        reference = self.reference_in_loss(algorithm)
        record = UpdateRecord(experience, self.process_group, self.device)
        step_stats: list[dict[str, float]] = []
        num_epochs = 0
        with self.placement.on_device(reference, *moments, wait=False):
            self.placement.ready(reference)
            for num_epochs in range(1, self.optim.epochs + 1):  # noqa: B007
                for minibatch in self._minibatches(experience, algorithm, train_actor):
                    record.begin_step(minibatch.rows)
                    step = partial(self._step, minibatch, algorithm, optimizers, record)
                    step_stats.append(self.budget.run_within("the update", step))
                    if train_actor and self.ema is not None:
                        self.ema.update(self.models.actor)
                if self.optim.target_kl is not None and record.end_epoch() > self.optim.target_kl:
                    break
        self.version += 1
        record.all_reduce()
        if self.sampler_agrees and record.tally.first_ratio_error > AGREEMENT:
            self.sampler_agrees = None  # the next step compares again
        if self.optim.target_kl is not None:
            rates["policy/epochs"] = float(num_epochs)
        return Update(
            losses={n: total / len(step_stats) for n, total in record.tally.losses.items()},
            step_stats=mean_stats(step_stats) | rates,
            clip_fraction=record.tally.num_clipped / max(record.tally.num_visits, 1),
            first_ratio_error=record.tally.first_ratio_error,
            step_kl=self.kl_since(experience) if train_actor and algorithm.needs_step_kl else None,
            logprobs=record.logprobs,
            entropy=record.entropy,
            clipped=record.clipped,
            row_advantages=row_mean(experience.advantages, experience.response_mask),
            trained_actor=train_actor,
            reference_moved=self.reference_checksum.now() != self.reference_checksum.value,
        )

    def _minibatches(
        self, experience: Experience, algorithm: Algorithm, train_actor: bool
    ) -> Iterator[Minibatch]:
        """Yield the minibatches of one epoch, which divide the rows at random."""
        order = list(range(len(experience)))
        self.rng.shuffle(order)
        count = min(self.optim.minibatches, len(order))
        sampler = self.pretraining if train_actor and algorithm.ptx.coef != 0 else None
        for i in range(count):
            demonstrations = () if sampler is None else sampler.next()
            yield Minibatch(experience, order[i::count], demonstrations)

    def _step(
        self,
        minibatch: Minibatch,
        algorithm: Algorithm,
        optimizers: Mapping[str, Optimizer],
        record: UpdateRecord,
        micro_batch_tokens: int,
    ) -> dict[str, float]:
        """Take one optimizer step, or try again what ran out of memory."""
        record.rewind()
        train_actor = "actor" in optimizers
        actor_load = LoadBalancing(self.balance_coef if train_actor else 0.0)
        critic_load = LoadBalancing(self.balance_coef)

        def losses() -> Iterator[Float[Tensor, ""]]:
            for forward, loss, share in self._losses(
                minibatch, algorithm, train_actor, record, micro_batch_tokens
            ):
                balanced = actor_load.added_to(loss, forward.routing, share)
                balanced = critic_load.added_to(balanced, forward.critic_routing, share)
                if balanced.requires_grad:  # the actor's has none where only the critic is trained
                    yield balanced
            yield from self._ptx_losses(minibatch, algorithm, record, micro_batch_tokens)
            record.settle()
            for optimizer in optimizers.values():  # moments came during the first gradients
                self.placement.ready(*optimizer.torch_optimizers)

        stats = optimizer_step(losses(), optimizers, self.process_group)
        if not train_actor:  # a critic on the actor's trunk has left gradients there
            self.optimizers["actor"].zero_grad()
        stats |= actor_load.metrics(self.process_group)
        return stats | critic_load.metrics(self.process_group, "critic_experts")

    def _losses(
        self,
        minibatch: Minibatch,
        algorithm: Algorithm,
        train_actor: bool,
        record: UpdateRecord,
        micro_batch_tokens: int,
    ) -> Iterator[tuple[Forward, Float[Tensor, ""], float]]:
        """Yield the outputs of each forward pass over each micro-batch, their loss, and the
        micro-batch's share of the tokens. The sum of the losses over all ranks is the minibatch's
        loss."""
        experience, rows = minibatch.experience, minibatch.rows
        denominators = algorithm.denominators(experience.rows(rows))
        index = list(rows)
        lengths = experience.lengths[index].tolist()
        for micro_batch in self.process_group.micro_batches(
            lengths,
            micro_batch_tokens,
            prompts(experience.tokens[index], experience.response_mask[index]),
        ):
            indices = [rows[i] for i in micro_batch.rows]
            part = experience.rows(indices)
            passes = self.forward_passes(part, algorithm, train_actor)
            part = part.to(self.device)
            for forward in passes:
                record.check("the log-probability in the update", forward.logprobs, part, indices)
                record.check("the value in the update", forward.values, part, indices)
                terms = algorithm.loss(part, forward, denominators)
                if micro_batch.counts:
                    record.add(indices, part, forward, terms, algorithm)
                trained = (term for name, term in terms.items() if train_actor or name == "value")
                loss = micro_batch.counts * sum(trained, torch.zeros((), device=self.device))
                yield forward, loss, micro_batch.share_of(lengths)

    def _ptx_losses(
        self,
        minibatch: Minibatch,
        algorithm: Algorithm,
        record: UpdateRecord,
        micro_batch_tokens: int,
    ) -> Iterator[Float[Tensor, ""]]:
        """Yield the weighted loss of the minibatch's demonstrations (PTX, Ouyang et al. 2022)."""
        if not minibatch.demonstrations:
            return
        for loss in imitation_losses(
            self.models.actor, minibatch.demonstrations, micro_batch_tokens, self.process_group
        ):
            weighted = algorithm.ptx.coef * loss
            record.add_terms({"ptx": weighted})
            yield weighted

    def reference_in_loss(self, algorithm: Algorithm) -> LanguageModel | None:
        """Return the reference where the loss runs it, for the exact KL over the vocabulary."""
        return self.reference if algorithm.kl.exact_loss else None

    def forward_passes(
        self, part: Experience, algorithm: Algorithm, train_actor: bool = True
    ) -> Iterator[Forward]:
        """Yield the outputs of actor and critic that the loss of some rows reads, with a gradient,
        by forward pass."""
        return self.models.forward_passes(
            ForwardRequest(
                part.tokens,
                part.response_mask,
                self.sampling.temperature,
                algorithm.needs_entropy_gradient,
                self.reference_in_loss(algorithm),
                part.kept,
                train_actor,
            )
        )

    def logprobs(self, experience: Experience) -> Float[Tensor, "B T"]:
        """Return the log-probs of the response tokens by the actor as it is now; 0 elsewhere."""
        return self.scorer.logprobs(
            self.models.actor, experience, self.budget.scoring_tokens, experience.kept
        )

    def kl_since(self, experience: Experience) -> float:
        """Return the mean k3 estimate of KL(π_old ‖ π) per token, of the policy that sampled the
        experience to the actor as it is now."""
        now = self.logprobs(experience)
        return float(masked_mean(k3(experience.old_logprobs, now), experience.response_mask))


def _check_experience(experience: Experience) -> None:
    _check_response_tokens("the advantage", experience.advantages, experience)
    _check_response_tokens("the return", experience.returns, experience)


def _check_response_tokens(
    what: str, numbers: Float[Tensor, "B T"] | None, part: Experience
) -> None:
    """Raise `NonFinite` where a number of a response token is not finite."""
    if numbers is not None:
        shown = torch.where(part.response_mask, numbers, 0.0)
        check_finite(what, shown, part.ids, partial(row_tokens, part))
