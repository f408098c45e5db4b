"""What stops a run where a number is not finite."""

from collections.abc import Sequence


class NonFinite(RuntimeError):
    """A number that is not finite, seen before it could change a weight. Names the sample it
    belongs to, and the sample's tokens, where it belongs to one."""

    def __init__(self, what: str, sample: str | None = None, tokens: Sequence[int] = ()) -> None:
        where = f" in sample {sample}" if sample else ""
        super().__init__(f"{what} is not finite{where}; no weight was changed by it")
        self.what, self.sample, self.tokens = what, sample, list(tokens)
