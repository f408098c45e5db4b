"""The forward passes of actor and critic. The critic has its own trunk, shares the actor's, or is
absent."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from quartet.algorithms.algorithm import Forward
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.experience import KeptIds
from quartet.models.adapters import LanguageModel
from quartet.models.forward import (
    exact_kl_to,
    forward_positions,
    statistics,
)
from quartet.models.heads import ScalarModel, ValueHead
from quartet.models.logprobs import scatter_to_tokens
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.models.routing import recorded_routing
from quartet.tensors import Bool, Float, Int, Tensor, torch


@dataclass(frozen=True)
class ForwardRequest:
    """What actor and critic are asked for."""

    tokens: Int[Tensor, "B T"]
    """Right-padded rows."""
    mask: Bool[Tensor, "B T"]
    """The tokens whose outputs are wanted."""
    temperature: float
    """That of the sampler: logits are divided by it."""
    entropy_gradient: bool = False
    reference: LanguageModel | None = None
    """The model whose exact KL from the actor is wanted."""
    kept: KeptIds | None = None
    """The ids that the sampler's filter left, to which the actor, and not the reference, is
    limited."""
    trains_actor: bool = True
    """Whether the pass of an actor with a trunk of its own has a gradient."""


@runtime_checkable
class ActorCritic(Protocol):
    """The actor and, where the algorithm has one, the critic: what the learner trains."""

    actor: CausalModel

    def forward_passes(self, request: ForwardRequest) -> Iterator[Forward]:
        """Yield log-probs, entropy and values of the masked tokens and, given a reference, the
        exact KL to it. Entries outside the mask mean nothing.

        Actor and critic have a pass each where they have a trunk each, the actor first. If one is
        differentiated before the next is asked for, only one keeps its activations at a time.
        """
        ...

    def values(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"] | None:
        """Return the values of the masked tokens, from the critic's forward pass alone; None
        without a critic."""
        ...

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the actor's optimizer trains."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return those that the critic's optimizer trains; none without a critic."""
        ...

    def save_critic(
        self, folder: Path, tokenizer: Tokenizer, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Every rank must call it; rank 0 writes."""
        ...


class Separate:
    """An actor and a critic with a trunk of its own, or no critic (critic-free algorithms)."""

    def __init__(self, actor: CausalModel, critic: ScalarModel | None) -> None:
        self.actor, self.critic = actor, critic

    def forward_passes(self, request: ForwardRequest) -> Iterator[Forward]:
        yield _actor_outputs(self.actor, request, gradient=request.trains_actor)
        if self.critic is not None:
            with recorded_routing(self.critic.trunk) as routers:
                values = self.values(request.tokens, request.mask)
            yield Forward(values=values, critic_routing=routers.routing)

    def values(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"] | None:
        return None if self.critic is None else self.critic.values(tokens, mask)

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the actor, without those of a critic that is an
        adapter on the actor's trunk."""
        critic = {id(p) for p in self.critic_parameters()}
        return [p for p in trainable(self.actor) if id(p) not in critic]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else list(trainable(self.critic))

    def save_critic(
        self, folder: Path, tokenizer: Tokenizer, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        if self.critic is not None:
            self.critic.save_per_token(folder, tokenizer, process_group)


class Shared:
    """A critic that is a scalar head on the actor's last hidden states (Ziegler et al. 2019): one
    trunk and one forward pass for both. The trunk belongs to the actor's optimizer, the head to the
    critic's."""

    def __init__(self, actor: CausalModel, head: ValueHead) -> None:
        self.actor, self.head = actor, head

    def forward_passes(self, request: ForwardRequest) -> Iterator[Forward]:
        yield _actor_outputs(self.actor, request, self.head)

    def values(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"] | None:
        return scatter_to_tokens(
            self.head(forward_positions(self.actor, tokens, mask).hidden), mask
        )

    def actor_parameters(self) -> list[nn.Parameter]:
        return list(trainable(self.actor))

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(trainable(self.head))

    def save_critic(
        self, folder: Path, tokenizer: Tokenizer, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Save trunk and head as one folder, so that the critic can be loaded without the actor."""
        trunk = full_state_dict(self.actor.base_model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return
        critic = ScalarModel.assembled(
            self.actor,
            trunk,
            self.head.linear.weight,
            -self.head.linear.bias.item(),
            pad_token_id(tokenizer),
        )
        critic.save_per_token(folder, tokenizer)


def _actor_outputs(
    actor: CausalModel,
    request: ForwardRequest,
    head: ValueHead | None = None,
    gradient: bool = True,
) -> Forward:
    """Return the outputs of one pass of the actor, with the values of a head on its last hidden
    states. In an update its routers are recorded without a `gradient`, too."""
    tokens, mask, temperature = request.tokens, request.mask, request.temperature
    gradient = gradient and torch.is_grad_enabled()
    with recorded_routing(actor.base_model) as routers, torch.set_grad_enabled(gradient):
        outputs = forward_positions(actor, tokens, mask)
    with torch.set_grad_enabled(gradient):  # a reference on the same trunk is not recorded
        logprobs, entropy = statistics(
            actor, outputs, tokens, mask, temperature, request.entropy_gradient, request.kept
        )
        exact_kl = exact_kl_to(
            request.reference, actor, outputs, tokens, mask, temperature, request.kept
        )
        values = None if head is None else scatter_to_tokens(head(outputs.hidden), mask)
    return Forward(logprobs, entropy, values, exact_kl, routers.routing)


def trainable(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that require gradients."""
    return (p for p in module.parameters() if p.requires_grad)


def freeze(module: Any) -> Any:
    """Freeze the parameters of a module and return it, in evaluation mode."""
    return module.requires_grad_(False).eval()


def pad_token_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that a saved reward model may treat as padding, or None if the tokenizer pads
    with its end of sequence: the last real token could not be told from padding by its id."""
    return None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
