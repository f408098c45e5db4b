"""The protocol of embedded worlds. Rows are generated from a seed; the same seed gives the same
rows."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from quartet.data.examples import Example


@runtime_checkable
class World(Protocol):
    """A task with generated data and a known gold reward."""

    name: str
    typical_tokens: tuple[int, int]
    """Mean numbers of tokens of a prompt and of a response, for planning."""

    @property
    def vocabulary(self) -> int:
        """The number of token ids of the tokenizer."""
        ...

    def demonstrations(self, count: int, held_out: bool = False) -> list[Example]:
        """Return prompts with completions for supervised fine-tuning."""
        ...

    def comparisons(self, count: int, held_out: bool = False) -> list[Example]:
        """Return pairs of completions, labelled by the gold reward with noise. Empty where the
        world needs no reward model."""
        ...

    def prompts(self, count: int, held_out: bool = False) -> list[Example]:
        """Return prompts for RL and evaluation."""
        ...

    def gold(self, prompt: str, response: str) -> float:
        """Return the gold reward of a response."""
        ...

    def tokenizer(self) -> Any:
        """Return a Hugging Face tokenizer for the world's texts."""
        ...


def gold_accuracy(world: World, comparisons: Sequence[Example]) -> float:
    """Return how often the gold reward agrees with the labels of these comparisons."""
    gold = world.gold
    agreements = [
        gold(str(c.prompt), str(c.chosen)) > gold(str(c.prompt), str(c.rejected))
        for c in comparisons
    ]
    return sum(agreements) / len(agreements)
