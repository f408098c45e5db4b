"""A generator that only rank 0 calls, for all ranks of a process group."""

from collections.abc import Callable, Sequence
from typing import Any

from quartet.distributed.process_group import ProcessGroup
from quartet.distributed.sharding import GatheredWeights, gather_weights
from quartet.experience import Prompt, Rollout, rollout_from_row, rollout_to_row
from quartet.generation.protocol import Generator, Weights
from quartet.generation.sampling import Sampling


class RankZeroGenerator:
    """Calls another generator on rank 0 and gives its rollouts to every rank."""

    def __init__(
        self,
        generator: Generator,
        process_group: ProcessGroup,
        only: Callable[[str], bool] | None = None,
    ) -> None:
        """`only` says by name which weights the generator reads; None means all of them."""
        self.generator, self.process_group, self.only = generator, process_group, only

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples_per_prompt: int = 1
    ) -> list[Rollout]:
        def rows() -> list[dict[str, Any]]:
            rollouts = self.generator.generate(prompts, sampling, samples_per_prompt)
            return [rollout_to_row(rollout) for rollout in rollouts]

        return [rollout_from_row(row) for row in self.process_group.on_rank_zero(rows)]

    def load_weights(self, weights: Weights) -> None:
        tensors = weights.tensors
        if isinstance(tensors, GatheredWeights):  # sharded weights need all ranks to be read
            tensors = tensors if self.only is None else tensors.only(self.only)
            tensors = gather_weights(tensors, keep=self.process_group.is_rank_zero)
        self.process_group.on_rank_zero(
            lambda: self.generator.load_weights(Weights(weights.version, tensors))
        )

    def state(self) -> Any:
        return self.generator.state()

    def load_state(self, state: Any) -> None:
        self.generator.load_state(state)
