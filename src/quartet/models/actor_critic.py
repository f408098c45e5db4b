"""The two models that learn, as one forward pass: the actor, and a critic on its own trunk, on the
actor's, or none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from quartet.algorithms.algorithm import Forward
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import full_state_dict
from quartet.models.heads import ScalarModel, ValueHead
from quartet.models.language_model import PositionOutputs, forward_positions, logits_of, statistics
from quartet.models.logprobs import scatter_to_tokens, token_exact_kl
from quartet.tensors import Bool, Float, Int, Tensor


@runtime_checkable
class ActorCritic(Protocol):
    actor: Any

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        temperature: float,
        entropy_gradient: bool = False,
        reference: Any | None = None,
    ) -> Forward:
        """Log-probs, entropy and values of the masked tokens of right-padded rows; given a
        reference, the exact KL to it as well. What stands outside the mask means nothing."""
        ...

    def values(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"] | None:
        """What the critic alone says of the masked tokens; None where there is none."""
        ...

    def actor_parameters(self) -> list[nn.Parameter]: ...

    def critic_parameters(self) -> list[nn.Parameter]: ...

    def save_critic(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Every rank of the team calls it, one writes."""
        ...


class Separate:
    """A critic with a trunk of its own, or none at all (critic-free algorithms)."""

    def __init__(self, actor: Any, critic: ScalarModel | None) -> None:
        self.actor, self.critic = actor, critic

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        temperature: float,
        entropy_gradient: bool = False,
        reference: Any | None = None,
    ) -> Forward:
        outputs = forward_positions(self.actor, tokens, mask)
        logprobs, entropy = statistics(
            self.actor, outputs, tokens, mask, temperature, entropy_gradient
        )
        exact = exact_kl_to(reference, self.actor, outputs, tokens, mask, temperature)
        return Forward(logprobs, entropy, self.values(tokens, mask), exact)

    def values(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B T"] | None:
        return None if self.critic is None else self.critic.values(tokens, mask)

    def actor_parameters(self) -> list[nn.Parameter]:
        """Without the critic's, which may be an adapter on the actor's trunk."""
        critic = {id(p) for p in self.critic_parameters()}
        return [p for p in trainable(self.actor) if id(p) not in critic]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else list(trainable(self.critic))

    def save_critic(
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        if self.critic is not None:
            self.critic.save_per_token(folder, tokenizer, process_group)


class Shared:
    """A scalar head on the actor's last hidden states (Ziegler et al. 2019): one trunk, one pass,
    two answers. The trunk belongs to the actor's optimizer, the head to the critic's."""

    def __init__(self, actor: Any, head: ValueHead) -> None:
        self.actor, self.head = actor, head

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        temperature: float,
        entropy_gradient: bool = False,
        reference: Any | None = None,
    ) -> Forward:
        outputs = forward_positions(self.actor, tokens, mask)
        logprobs, entropy = statistics(
            self.actor, outputs, tokens, mask, temperature, entropy_gradient
        )
        values = scatter_to_tokens(self.head(outputs.hidden), mask)
        return Forward(
            logprobs,
            entropy,
            values,
            exact_kl_to(reference, self.actor, outputs, tokens, mask, temperature),
        )

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
        self, folder: Path, tokenizer: Any, process_group: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        """Trunk and head as one folder, so that the critic can be read without the actor."""
        trunk = full_state_dict(self.actor.base_model, keep=process_group.is_rank_zero)
        if not process_group.is_rank_zero:
            return
        critic = ScalarModel.from_trunk(self.actor, pad_token_id(tokenizer), seed=0, tensors=trunk)
        with torch.no_grad():
            critic.head.weight.copy_(self.head.linear.weight)
        critic.centre = -self.head.linear.bias.item()
        critic.save_per_token(folder, tokenizer)


def exact_kl_to(
    reference: Any | None,
    actor: Any,
    outputs: PositionOutputs,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    temperature: float,
) -> Float[Tensor, "B T"] | None:
    """KL(π ‖ π_ref) before each masked token; both distributions are whole for one micro-batch at a
    time."""
    if reference is None:
        return None
    with torch.no_grad():
        ref_logits = logits_of(reference, forward_positions(reference, tokens, mask))
    return scatter_to_tokens(
        token_exact_kl(logits_of(actor, outputs), ref_logits, temperature), mask
    )


def trainable(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def freeze(module: Any) -> Any:
    """The module, never to be trained again."""
    return module.requires_grad_(False).eval()


def pad_token_id(tokenizer: Any) -> int | None:
    """The id that a saved reward model may treat as padding: none where the tokenizer pads with its
    end of sequence, for then the last real token could not be told from padding by its id."""
    return None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
