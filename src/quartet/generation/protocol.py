"""The protocol of generators, and the weights that they are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from quartet.experience import Prompt, Rollout
from quartet.generation.sampling import Sampling
from quartet.tensors import Tensor


@dataclass(frozen=True)
class Weights:
    """The actor's weights after `version` updates."""

    version: int
    tensors: Mapping[str, Tensor]
    """The tensors by their names in the model. Where the model is sharded, reading a tensor is a
    collective operation: every rank must read the same tensors in the same order."""


@runtime_checkable
class Generator(Protocol):
    """Samples responses from the policy."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        """Return `samples_per_prompt` rollouts for each prompt. The rollouts of one prompt are next
        to each other and in one group."""
        ...

    def load_weights(self, weights: Weights) -> None:
        """Use these weights for every token that is sampled from now on."""
        ...

    def state(self) -> Any:
        """Return what another generator needs to continue as this one would: the random number
        generator and the version of the weights, without the weights."""
        ...

    def load_state(self, state: Any) -> None:
        """Continue from a `state()`."""
        ...
