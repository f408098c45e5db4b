"""How many tokens go through the models at once, and what happens when they are too many."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup

T = TypeVar("T")
MAX_HALVINGS = 4
"""A stage that has no memory after so many halvings will not have it after more."""
CPU_WORDS = ("can't allocate memory", "not enough memory")
"""What torch's allocator on the CPU says; it has no error of its own."""


class Budget:
    """A bound on the tokens of a forward pass: it changes memory and no result. Where memory does
    not suffice it is halved, for good, and what was asked is done again. Not in a team: the others
    could not know."""

    def __init__(self, tokens: int, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.tokens, self.process_group = tokens, process_group
        self.halvings = 0
        self.notes: list[str] = []
        """What there was to say of it since somebody looked."""

    def run_within(self, phase: str, work: Callable[[int], T]) -> T:
        """What `work` returns for so many tokens. It must leave nothing behind when it fails."""
        while True:
            try:
                return work(self.tokens)
            except RuntimeError as error:
                if (
                    not out_of_memory(error)
                    or self.halvings == MAX_HALVINGS
                    or self.tokens < 2
                    or self.process_group.world_size > 1
                ):
                    raise
            self.halvings += 1
            self.tokens //= 2
            self.notes.append(
                f"out of memory in {phase} with {2 * self.tokens:,} tokens at once; retried with "
                f"{self.tokens:,}. "
                f"optim.micro_batch_tokens = {self.tokens} would have avoided it."
            )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def state(self) -> dict[str, int]:
        return {"tokens": self.tokens, "halvings": self.halvings}

    def load_state(self, state: dict[str, int]) -> None:
        tokens, halvings = state["tokens"], state["halvings"]
        if (
            not isinstance(tokens, int)
            or not isinstance(halvings, int)
            or tokens < 1
            or halvings < 0
        ):
            raise ValueError(f"a budget of {tokens} tokens, halved {halvings} times")
        self.tokens, self.halvings = tokens, halvings


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in CPU_WORDS
    )
