"""Where responses end by a string of their text (`rollout.stop`).

A response ends with the token that completes the first stop string in its text. That token was
sampled and is learned from as any other; the text that rewards and readers get is what stands
before the string.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quartet.models.protocols import Tokenizer
from quartet.models.text import decoded_response
from quartet.tensors import Bool, Int, Tensor, torch

LOOK_EVERY = 8
"""After how many tokens the texts of responses that are being sampled are looked at."""


@dataclass(frozen=True)
class StopStrings:
    """The strings that end a response; there may be none."""

    tokenizer: Tokenizer
    strings: tuple[str, ...]

    def are_in(self, text: str) -> bool:
        """Return whether a text contains one of them."""
        return any(string in text for string in self.strings)

    def text_before(self, text: str) -> str:
        """Return a text up to the first of them in it; the whole text where there is none."""
        return text[: min((text.index(s) for s in self.strings if s in text), default=len(text))]

    def length(
        self, prompt_ids: Sequence[int], ids: Sequence[int], prompt: str | None = None
    ) -> int | None:
        """Return the number of tokens of a response up to the one that completes the first stop
        string, that one included; None if its text has none. `prompt` is the prompt decoded, where
        that is known."""

        def stops_within(length: int) -> bool:
            part = ids[:length]
            return self.are_in(decoded_response(self.tokenizer, prompt_ids, part, prompt))

        if not self.strings:
            return None
        if getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            # Later tokens change the text of earlier ones: " n" and "'t" may become "n't".
            return next((n for n in range(1, len(ids) + 1) if stops_within(n)), None)
        if not stops_within(len(ids)):
            return None
        # The text of more tokens begins with the text of fewer, so the place can be halved.
        low, high = 0, len(ids)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if stops_within(middle) else (middle, high)
        return high


@dataclass
class StopWatch:
    """Finds responses that a stop string has ended while others are still sampled, so that their
    rows become free. It looks every `LOOK_EVERY` tokens, so that the host seldom waits for the
    device; what was sampled after the string is cut off in the end (`StopStrings.length`)."""

    stops: StopStrings
    prompts: Sequence[Sequence[int]]
    """The prompt of each response."""
    ids: dict[int, list[int]] = field(default_factory=dict)
    """The tokens of each response that has been looked at."""
    unseen: list[tuple[Int[Tensor, "B"], Int[Tensor, "B"]]] = field(default_factory=list)
    """The responses and tokens of the steps since the last look."""

    def unfinished(
        self, rows: Int[Tensor, "B"], tokens: Int[Tensor, "B"], alive: Bool[Tensor, "B"]
    ) -> Bool[Tensor, "B"]:
        """Add a step: token i belongs to response `rows[i]`. Return which rows go on, of those that
        were to go on (`alive`)."""
        self.unseen.append((rows, tokens))
        if len(self.unseen) < LOOK_EVERY:
            return alive
        steps = torch.stack([torch.cat(part) for part in zip(*self.unseen, strict=True)]).cpu()
        self.unseen.clear()
        for row, token in steps.t().tolist():
            self.ids.setdefault(row, []).append(token)
        now = steps[0, -len(rows) :].tolist()  # this step's, which the host has already
        goes_on = [not self._has_stopped(row) for row in now]
        return alive & torch.tensor(goes_on, device=alive.device)

    def _has_stopped(self, row: int) -> bool:
        """Return whether a stop string is in the text of a response. Its last tokens are decoded
        first: a string of n bytes has at most n tokens, and began at most so many before."""
        ids = self.ids.get(row, [])
        longest = max(len(string.encode()) for string in self.stops.strings)
        tail = self.stops.tokenizer.decode(ids[-longest - LOOK_EVERY :], skip_special_tokens=True)
        if not self.stops.are_in(tail):
            return False
        return self.stops.length(self.prompts[row], ids) is not None
