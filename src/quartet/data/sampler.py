"""Batches of records in shuffled order."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class Sampler(Generic[R]):
    """Endless batches of records. Each epoch has every record once, in an order that the seed and
    the number of the epoch decide.

    The state is two numbers: the epoch and the position in it.
    """

    def __init__(self, records: Sequence[R], batch_size: int, seed: int) -> None:
        if not records:
            raise ValueError("no records to sample from")
        self.records, self.batch_size, self.seed = records, batch_size, seed
        self.epoch, self.position = 0, 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def next(self) -> list[R]:
        """Return the next `batch_size` records; a batch may go on into the next epoch."""
        batch: list[R] = []
        while len(batch) < self.batch_size:
            index = self._order()[self.position]
            if self._is_drawn(index):
                batch.append(self.records[index])
            self.position += 1
            if self.position == len(self.records):
                self.epoch, self.position = self.epoch + 1, 0
        return batch

    def _is_drawn(self, index: int) -> bool:
        """Return whether this epoch has the record."""
        return True

    def observe(self, group: Sequence[Any]) -> None:
        """Take account of the rewarded responses to one record; here of none."""

    def metrics(self) -> dict[str, float]:
        """Return numbers about the draws, by metric name; here none."""
        return {}

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`. Raises ValueError for one of other records."""
        epoch, position = state["epoch"], state["position"]
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position < len(self.records)
        ):
            raise ValueError(f"row {position} of epoch {epoch} of {len(self.records):,} rows")
        self.epoch, self.position = epoch, position

    def _order(self) -> list[int]:
        if self._shuffled[0] != self.epoch:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]
