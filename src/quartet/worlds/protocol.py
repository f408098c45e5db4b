"""What a world offers. Everything is made on the spot from a seed; the same seed gives the same
rows."""

from typing import Any, Protocol, runtime_checkable

from quartet.data.examples import Example


@runtime_checkable
class World(Protocol):
    name: str
    typical_tokens: tuple[int, int]
    """Mean length of a prompt and of an answer, for planning."""

    @property
    def vocabulary(self) -> int:
        """How many ids the tokenizer knows."""
        ...

    def demonstrations(self, count: int, held_out: bool = False) -> list[Example]:
        """Prompts with completions for supervised fine-tuning."""
        ...

    def comparisons(self, count: int, held_out: bool = False) -> list[Example]:
        """Pairs of completions, labelled by the gold reward with noise. Empty where the world needs
        no reward model."""
        ...

    def prompts(self, count: int, held_out: bool = False) -> list[Example]: ...

    def gold(self, prompt: str, response: str) -> float:
        """What a response is truly worth."""
        ...

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer for the world's words."""
        ...
