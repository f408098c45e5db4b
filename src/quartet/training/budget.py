"""How many tokens go through the models at once, and what happens when memory runs out."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.io.activity import activity

T = TypeVar("T")
MAX_HALVINGS = 4
"""Halvings after which out of memory is an error: the cause is then not the batch."""
NO_MEMORY = (
    *("can't allocate memory", "not enough memory"),  # of the CPU
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"),  # of a GPU
)
"""Texts of errors that have no class of their own. On a GPU they are those of libraries that
allocate beside torch's allocator, which has taken all there is and keeps what it does not use."""


class Budget:
    """The most tokens of one forward pass. It bounds memory and changes no result. A pass without a
    gradient keeps no activations, so it may take more.

    When memory runs out both are halved for the rest of the stage, and the work is repeated. With a
    process group it is not: other ranks would wait for collectives that this one has left, and
    FSDP, also that of one rank, would wait for no gradient any more (torch 2.13: the end of a
    backward pass that was interrupted still counts as queued).
    """

    def __init__(
        self,
        tokens: int,
        process_group: ProcessGroup = SINGLE_PROCESS,
        scoring_tokens: int | None = None,
    ) -> None:
        """`scoring_tokens`: those of a pass without a gradient; `tokens` if None."""
        self.tokens, self.process_group = tokens, process_group
        self.halvings = 0
        self._scoring_tokens = scoring_tokens or tokens
        self.notes: list[str] = []
        """Sentences about halvings; the stage reports and clears them."""

    @property
    def scoring_tokens(self) -> int:
        """The most tokens of a pass without a gradient."""
        return max(self._scoring_tokens >> self.halvings, self.tokens)

    def run_within(self, phase: str, work: Callable[[int], T], scoring: bool = False) -> T:
        """Return `work(tokens)`, repeated with half the tokens while memory does not suffice.

        `phase` names the work in the report; `scoring` says that it takes no gradients. Work that
        fails must leave nothing behind.
        """
        while True:
            tokens = self.scoring_tokens if scoring else self.tokens
            try:
                with activity(phase.removeprefix("the ")):
                    return work(tokens)
            except RuntimeError as error:
                if not out_of_memory(error) or self.halvings == MAX_HALVINGS or self.tokens < 2:
                    raise
                if self.process_group is not SINGLE_PROCESS:
                    reason = str(error).partition("\n")[0].rstrip(".")
                    raise torch.OutOfMemoryError(
                        f"out of memory in {phase} with {tokens:,} tokens at once ({reason}). With "
                        "several ranks or models in parts it is not tried again with fewer: set "
                        f"optim.micro_batch_tokens = {self.tokens // 2}, and resume the run."
                    ) from error
            self.halvings += 1
            self.tokens //= 2
            self.notes.append(
                f"out of memory in {phase} with {tokens:,} tokens at once; retried with "
                f"{self.scoring_tokens if scoring else self.tokens:,}. "
                f"optim.micro_batch_tokens = {self.tokens} would have avoided it."
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def state(self) -> dict[str, int]:
        return {"tokens": self.tokens, "halvings": self.halvings}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on with the tokens of a `state()`, or with fewer where the config says so now."""
        tokens, halvings = state["tokens"], state["halvings"]
        if (
            not isinstance(tokens, int)
            or not isinstance(halvings, int)
            or tokens < 1
            or halvings < 0
        ):
            raise ValueError(f"a budget of {tokens} tokens, halved {halvings} times")
        self.tokens, self.halvings = min(tokens, self.tokens), halvings


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether the error says that a device or the CPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in NO_MEMORY
    )
