"""Who labels which pair next, for one file of pairs and any number of labellers and tabs."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quartet.errors import QuartetError
from quartet.labels.log import Label, LabelLog, Order, Verdict
from quartet.labels.pairs import Pair, digest, share

LEASE_SECONDS = 900.0
"""How long a pair that is open in a tab is kept from the other tabs."""
REPEAT_GAP = 10
"""How many other labels stand at least between a pair and its repetition, while there are others
to be labelled."""
NAME_CHARACTERS, COMMENT_CHARACTERS = 40, 2000
CHOICES = ("first", "second", "tie", "both_bad", "skip")
"""What a labeller can say of the two answers in the order in which they are shown."""


class BadLabel(QuartetError, ValueError):
    """A request of a page has a wrong form."""


class AlreadyLabelled(QuartetError, RuntimeError):
    """The pair was labelled in another tab, or by the one labeller that it needs."""


@dataclass(frozen=True)
class Task:
    """A pair as one labeller sees it."""

    id: str
    pair: Pair
    repeat: bool
    order: Order

    @property
    def shown(self) -> tuple[object, object]:
        """The two answers in the order in which they are shown."""
        a, b = self.pair.answer_a, self.pair.answer_b
        return (a, b) if self.order == "ab" else (b, a)

    def verdict(self, choice: str) -> Verdict:
        """Return what a choice on the screen says of the pair's own order."""
        if choice in ("first", "second"):
            return "a" if (choice == "first") == (self.order == "ab") else "b"
        if choice == "tie":
            return "tie"
        return "both_bad" if choice == "both_bad" else "skip"


@dataclass(frozen=True)
class LabelProgress:
    """How far a labeller is."""

    done: int
    total: int


class LabelSession:
    """Hands out pairs and takes labels. All methods can be called from several threads."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        log: LabelLog,
        seed: int = 0,
        repeat: float = 0.1,
        overlap: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pairs` are in the order in which they are labelled. `repeat` is the share that each
        labeller is shown twice; `overlap` the share that every labeller labels, the others are
        labelled by one."""
        self.pairs = {pair.id: pair for pair in pairs}
        self.log, self.seed, self.clock = log, seed, clock
        self.repeated = {i for i in self.pairs if share("repeat", seed, i) < repeat}
        self.common = {i for i in self.pairs if share("overlap", seed, i) < overlap}
        self.labels: dict[str, Label] = {label.id: label for _, label in log.labels.labels}
        """The labels that count, by id, in the order in which they were given."""
        self._undone: dict[str, Label] = {label.id: label for label in log.labels.undone}
        self._leases: dict[str, tuple[str, Task, float]] = {}
        """By tab: the labeller, what they see there, and since when."""
        self._loads: dict[str, str] = {}
        """By tab: which loading of the page asked last."""
        self._lock = threading.Lock()

    def task(self, labeller: str, tab: str, load: str = "") -> Task | None:
        """Return what a tab shows next: what it shows already, where it has not answered and the
        pair is still its labeller's. None where all is labelled or open in other tabs. `load` is
        different each time that the page is loaded."""
        with self._lock:
            self._loads[tab] = load
            lease = self._leases.pop(tab, None)
            done, mine = self._done(labeller), self._mine(labeller)
            kept = lease[1] if lease is not None and lease[0] == labeller else None
            is_open = kept is not None and self._key(kept) not in done
            if kept is not None and is_open and (kept.repeat or kept.pair.id in mine):
                return self._lease(labeller, tab, kept)
            elsewhere = self._open_elsewhere(labeller)
            due = self._due(labeller, done, REPEAT_GAP)
            fresh = (self._task(labeller, pair, False) for pair in mine)
            late = self._due(labeller, done, 0)
            for task in (*due, *fresh, *late):
                key = self._key(task)
                if key not in done and key not in elsewhere:
                    return self._lease(labeller, tab, task)
            return None

    def take(
        self, labeller: str, tab: str, number: str, task: str, choice: str, comment: str = ""
    ) -> Label:
        """Write a label and return it. `number` is the label's own id, chosen by the page: a label
        that is sent twice is written once. Raises `BadLabel` and `AlreadyLabelled`."""
        name = checked_name(labeller)
        if choice not in CHOICES:
            raise BadLabel(f"choice is {choice!r}; it must be one of {', '.join(CHOICES)}.")
        if not number or len(number) > NAME_CHARACTERS or len(tab) > NAME_CHARACTERS:
            raise BadLabel(f"id and tab must have 1 to {NAME_CHARACTERS} characters.")
        if len(comment) > COMMENT_CHARACTERS:
            raise BadLabel(f"The comment is longer than {COMMENT_CHARACTERS:,} characters.")
        with self._lock:
            if number in self.labels:
                return self.labels[number]
            lease = self._leases.get(tab)
            is_open = lease is not None and lease[0] == name and lease[1].id == task
            asked = lease[1] if lease is not None and is_open else self._task_of(name, task)
            if self._key(asked) in self._done(name):
                raise AlreadyLabelled("This pair was labelled in another tab.")
            if not asked.repeat and self._is_others(asked.pair, name):
                raise AlreadyLabelled("This pair was labelled by someone else meanwhile.")
            verdict, order = asked.verdict(choice), asked.order
            label = Label(
                number, name, asked.pair, verdict, order, asked.repeat, comment.strip(), tab
            )
            self.log.add(label)
            self.labels[number] = label
            self._leases.pop(tab, None)
            return label

    def undo(self, labeller: str, tab: str, number: str) -> Task | None:
        """Take back the label with the id `number`, which a labeller gave in a tab, and return its
        task; None where there is no such label. A label that is undone already gives its task
        again: the page asks until it is answered."""
        with self._lock:
            label = self.labels.get(number) or self._undone.get(number)
            if label is None or not self._is_of(label, labeller, tab):
                return None
            if number in self.labels:
                self.log.undo(label)
                self._undone[number] = self.labels.pop(number)
            return self._lease(labeller, tab, self._task(labeller, label.pair, label.repeat))

    def last(self, labeller: str, tab: str) -> str:
        """Return the id of the last label that a labeller gave in a tab; "" where there is none."""
        with self._lock:
            own = (x.id for x in reversed(self.labels.values()) if self._is_of(x, labeller, tab))
            return next(own, "")

    def release(self, tab: str, load: str = "") -> None:
        """Give back what a closed page was showing. A page that is loaded again may have asked
        before the message of its predecessor comes, which is of no effect then."""
        with self._lock:
            if self._loads.get(tab) == load:
                self._leases.pop(tab, None)

    def progress(self, labeller: str) -> LabelProgress:
        """Return how many labels a labeller gave and how many there are to give."""
        with self._lock:
            done = [key for key in self._done(labeller) if key[0] in self.pairs]
            mine = set(self._mine(labeller))
            skipped = {x.pair.id for x in self._own(labeller) if x.verdict == "skip"}
            again = len((mine & self.repeated) - skipped)
            return LabelProgress(len(done), len(mine) + again)

    def _is_of(self, label: Label, labeller: str, tab: str) -> bool:
        return (label.labeller, label.tab) == (labeller, tab) and label.pair.id in self.pairs

    def _is_others(self, pair: Pair, labeller: str) -> bool:
        """Return whether another labeller has given the one label that a pair needs."""
        labels = (x for x in self.labels.values() if x.pair.id == pair.id)
        return pair.id not in self.common and any(x.labeller != labeller for x in labels)

    def _own(self, labeller: str) -> list[Label]:
        return [label for label in self.labels.values() if label.labeller == labeller]

    def _done(self, labeller: str) -> set[tuple[str, bool]]:
        return {(label.pair.id, label.repeat) for label in self._own(labeller)}

    def _mine(self, labeller: str) -> list[str]:
        """Return the ids of the pairs that a labeller labels: the common ones, and those that no
        other labeller has labelled or sees now."""
        taken = {x.pair.id for x in self.labels.values() if x.labeller != labeller}
        taken |= {task.pair.id for name, task in self._live() if name != labeller}
        return [i for i in self.pairs if i in self.common or i not in taken]

    def _due(self, labeller: str, done: set[tuple[str, bool]], gap: int) -> list[Task]:
        """Return the repetitions of pairs that at least `gap` other labels were given after."""
        own = self._own(labeller)
        before = own[: max(0, len(own) - gap)]
        return [
            self._task(labeller, label.pair.id, True)
            for label in before
            if label.pair.id in self.repeated and not label.repeat and label.verdict != "skip"
        ]

    def _live(self) -> list[tuple[str, Task]]:
        oldest = self.clock() - LEASE_SECONDS
        return [(name, task) for name, task, since in self._leases.values() if since > oldest]

    def _open_elsewhere(self, labeller: str) -> set[tuple[str, bool]]:
        return {self._key(task) for name, task in self._live() if name == labeller}

    def _lease(self, labeller: str, tab: str, task: Task) -> Task:
        self._leases[tab] = labeller, task, self.clock()
        return task

    def _task(self, labeller: str, pair: Pair | str, repeat: bool) -> Task:
        pair = self.pairs[pair] if isinstance(pair, str) else pair
        words = (self.seed, labeller, pair.id, repeat)
        order: Order = "ab" if share("shown", *words) < 0.5 else "ba"
        return Task(digest("task", *words), pair, repeat, order)

    def _task_of(self, labeller: str, number: str) -> Task:
        """Return a task by its id, which a page sends back; a server that was started again has no
        leases."""
        for pair in self.pairs.values():
            for repeat in (False, True):
                task = self._task(labeller, pair, repeat)
                if task.id == number:
                    return task
        raise BadLabel("These pairs are no longer labelled here. Load the page again.")

    @staticmethod
    def _key(task: Task) -> tuple[str, bool]:
        return task.pair.id, task.repeat


def checked_name(name: str) -> str:
    """Return a labeller's name without spaces around it. Raises `BadLabel`."""
    name = name.strip()
    if not name or len(name) > NAME_CHARACTERS or not name.isprintable():
        raise BadLabel(f"A labeller's name has 1 to {NAME_CHARACTERS} printable characters.")
    return name
