"""What the loops ask of anything that generates."""

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
    """By their names in the model. Where it is in parts, every rank asks for the same ones in the
    same order."""


@runtime_checkable
class Generator(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, those of one prompt next to each other and
        in one group."""
        ...

    def load_weights(self, weights: Weights) -> None:
        """Sample from these weights from now on."""
        ...

    def state(self) -> Any:
        """What a later generator must know to sample what this one would: random numbers, and how
        often weights came. The weights are not part of it."""
        ...

    def load_state(self, state: Any) -> None: ...
