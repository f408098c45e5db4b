"""Encoded rows: token ids."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate, end-of-sequence token included."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...] | None = None
    """Which of the response's tokens are to be imitated, in a conversation in which others speak as
    well; None: all."""
    score: float | None = None
    """The reward of the response, where the row has one."""


@dataclass(frozen=True)
class Comparison:
    """A prompt and two answers, of which a labeller preferred the first. Of an unpaired preference
    one side is empty."""

    id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    margin: float = 0.0
    """By how much the chosen side must win, where the row says it."""

    @property
    def num_tokens(self) -> int:
        """The tokens of both sides, each with the prompt."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)
