"""TRPO and the natural policy gradient: one step of the actor along F⁻¹g, as far as a KL constraint
allows.

F, the Fisher matrix, is the Hessian of the mean KL(π_old ‖ π) at π = π_old. It is never built:
conjugate gradients need only products F v, and each of them is two backward passes (Schulman et al.
2015, appendix C). This is for small models: a step costs about twenty passes over the whole
experience, and several vectors as large as the weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.kl import exact_kl
from quartet.algorithms.update import TrustRegion
from quartet.experience import Experience
from quartet.models.forward import filter_of, forward_positions, logits_of, prompts
from quartet.models.logprobs import at_least_float32
from quartet.tensors import Float, Tensor
from quartet.training.learner import Learner
from quartet.training.optim import Optimizer
from quartet.training.update import Update

Vector = Float[Tensor, "P"]


def conjugate_gradient(
    product: Callable[[Vector], Vector], b: Vector, steps: int, tolerance: float = 1e-10
) -> Vector:
    """Return x with A x ≈ b, for a positive definite A of which only the products A v are known
    (Hestenes & Stiefel 1952).

    In n dimensions it is exact after n steps: A = diag(1, 4), b = (1, 4) gives (1, 1).
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(steps):
        if size < tolerance:
            break
        image = product(direction)
        along = size / (direction @ image)
        x, residual = x + along * direction, residual - along * image
        new_size = residual @ residual
        direction, size = residual + new_size / size * direction, new_size
    return x


@dataclass(frozen=True)
class NaturalStep:
    """What one natural step did."""

    kl: float
    """Mean KL(π_old ‖ π) per token after it, over the whole vocabulary."""
    loss_before: float
    loss_after: float
    fraction: float
    """The share of the full step that was taken; 0 where the line search found no step."""
    gradient_norm: float


class TrustRegionLearner(Learner):
    """A learner whose actor takes one natural step on each experience. The critic is trained as in
    `Learner`."""

    def stepped_optimizers(self) -> Mapping[str, Optimizer]:
        return {"critic": self.optimizers["critic"]}

    def update(self, experience: Experience, algorithm: Algorithm) -> Update:
        trains_actor = self.trains_actor
        # `Learner.update` trains the critic only, and records entropies and clips of the policy.
        update = super().update(experience, algorithm)
        if not trains_actor:
            return update
        assert isinstance(algorithm.update, TrustRegion)
        with self.placement.on_device(self.reference_in_loss(algorithm)):
            objective = _Objective(self, experience, algorithm)
            step = natural_step(objective, self.models.actor_parameters(), algorithm.update)
        if self.ema is not None:
            self.ema.update(self.models.actor)
        return dataclasses.replace(
            update,
            logprobs=self.logprobs(experience),
            trained_actor=True,
            step_stats=update.step_stats
            | {
                "grad_norm/actor": step.gradient_norm,
                "trust_region/kl": step.kl,
                "trust_region/fraction": step.fraction,
                "trust_region/improvement": step.loss_before - step.loss_after,
            },
        )


def natural_step(
    objective: "_Objective", parameters: Sequence[Tensor], settings: TrustRegion
) -> NaturalStep:
    """Take the step θ ← θ − √(2 δ / xᵀFx) · x with x = F⁻¹g, where δ is `max_kl`.

    With a line search the step is halved until the loss is lower and the KL within δ. Where no such
    step is found, the weights stay as they were.
    """
    # Second derivatives of attention exist for torch's plain kernel only.
    with sdpa_kernel(SDPBackend.MATH):
        before = objective.loss()
        gradient = objective.gradient(parameters)
        norm = float(gradient.norm())
        if norm == 0:
            return NaturalStep(0.0, before, before, 0.0, 0.0)

        def fisher(vector: Vector) -> Vector:
            return objective.fisher_product(parameters, vector) + settings.damping * vector

        direction = conjugate_gradient(fisher, gradient, settings.conjugate_gradient_steps)
        full = torch.sqrt(2 * settings.max_kl / (direction @ fisher(direction))) * direction
    start = torch.cat([p.detach().flatten() for p in parameters]).clone()
    fraction = 1.0
    for _ in range(settings.line_search_steps):
        _assign(parameters, start - fraction * full)
        after, kl = objective.loss(), objective.kl()
        if after < before and kl <= settings.max_kl:
            return NaturalStep(kl, before, after, fraction, norm)
        fraction /= 2
    if settings.line_search_steps:
        _assign(parameters, start)
        return NaturalStep(0.0, before, before, 0.0, norm)
    _assign(parameters, start - full)
    return NaturalStep(objective.kl(), before, objective.loss(), 1.0, norm)


class _Objective:
    """The actor's loss on one experience, without the critic's, and the KL of the policy that the
    experience began with to the actor as it is now.

    Each rank goes through its share of the rows; sums are those of all ranks.
    """

    def __init__(self, learner: Learner, experience: Experience, algorithm: Algorithm) -> None:
        self.learner, self.experience, self.algorithm = learner, experience, algorithm
        self.process_group = learner.process_group
        self.denominators = algorithm.denominators(experience)
        self.num_tokens = int(experience.response_mask.sum())
        micro_batches = self.process_group.micro_batches(
            experience.lengths.tolist(),
            learner.budget.tokens,
            prompts(experience.tokens, experience.response_mask),
        )
        # Weights are never sharded here, so no rank has to keep pace with another.
        self.rows = [micro_batch.rows for micro_batch in micro_batches if micro_batch.counts]
        with torch.no_grad():
            self.old = [self._vocabulary_logprobs(rows) for rows in self.rows]

    def loss(self) -> float:
        """Return the loss at the present weights."""
        with torch.no_grad():
            [total] = self.process_group.all_reduce_sum(float(sum(self._losses())))
        return total

    def gradient(self, parameters: Sequence[Tensor]) -> Vector:
        """Return the gradient of the loss."""
        total = _sum_of_gradients(self._losses(), parameters)
        self.process_group.all_reduce(total)
        return total

    def kl(self) -> float:
        """Return the mean KL(π_old ‖ π) per token."""
        with torch.no_grad():
            [total] = self.process_group.all_reduce_sum(float(sum(self._kls())))
        return total

    def fisher_product(self, parameters: Sequence[Tensor], vector: Vector) -> Vector:
        """Return F v = ∇(∇KL · v), summed over micro-batches."""
        total = torch.zeros_like(vector)
        for kl in self._kls():
            slope = _flat(
                torch.autograd.grad(kl, parameters, create_graph=True, allow_unused=True),
                parameters,
            )
            total += _flat(
                torch.autograd.grad(slope @ vector, parameters, allow_unused=True), parameters
            ).detach()
        self.process_group.all_reduce(total)
        return total

    def _losses(self) -> Iterator[Tensor]:
        """Yield the actor's loss of each micro-batch."""
        for rows in self.rows:
            part = self.experience.rows(rows)
            forward = next(self.learner.forward_passes(part, self.algorithm))  # the actor's
            part = part.to(self.learner.device)
            terms = self.algorithm.loss(part, forward, self.denominators)
            yield sum(
                (term for name, term in terms.items() if name != "value"),
                torch.zeros((), device=self.learner.device),
            )

    def _kls(self) -> Iterator[Tensor]:
        """Yield the share of each micro-batch in the mean KL."""
        for rows, old in zip(self.rows, self.old, strict=True):
            yield exact_kl(old, self._vocabulary_logprobs(rows)).sum() / self.num_tokens

    def _vocabulary_logprobs(self, rows: Sequence[int]) -> Float[Tensor, "n V"]:
        """Return the log-probs over the whole vocabulary before each of the rows' n response
        tokens."""
        part = self.experience.rows(rows)
        actor = self.learner.models.actor
        logits = logits_of(actor, forward_positions(actor, part.tokens, part.response_mask))
        limit = filter_of(part.kept, part.response_mask, logits.device)
        logits = logits if limit is None else limit.applied_to(logits)
        return (at_least_float32(logits) / self.learner.sampling.temperature).log_softmax(-1)


def _sum_of_gradients(losses: Iterator[Tensor], parameters: Sequence[Tensor]) -> Vector:
    """Return the summed gradients of the losses as one vector."""
    total = _flat([None] * len(parameters), parameters)
    for loss in losses:
        total += _flat(
            torch.autograd.grad(loss, parameters, allow_unused=True), parameters
        ).detach()
    return total


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    """Return gradients as one vector; None, for a parameter without one, is zeros."""
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], vector: Vector) -> None:
    """Write a vector into the parameters."""
    offset = 0
    for p in parameters:
        p.copy_(vector[offset : offset + p.numel()].view_as(p))
        offset += p.numel()
