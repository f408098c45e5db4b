"""The progress of a run: one live line per stage on a terminal, plain lines, ever rarer, in
a file or a pipe. What takes longer than `SHOWN_SECONDS` is named in it, with its rate."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quartet.io.activity import Activity, activities, activity
from quartet.runs.wording import EMPTY, MEASURES, steps_in_words
from quartet.runtime.interruption import GRACE_SECONDS
from quartet.stages.kinds import kind_of

if TYPE_CHECKING:
    from quartet.runtime.events import Event
    from quartet.stages.protocol import Stage

BAR_WIDTH = 10
PLAIN_SECONDS = 5.0
"""Seconds until a stage's first line in a file or a pipe."""
PLAIN_GROWTH, PLAIN_MOST = 3.0, 600.0
"""How much longer each next line of a stage is waited for, and the longest wait in seconds: three
minutes have 3 lines and the last, whatever the number of steps."""
SHOWN_SECONDS = 2.0
"""How long something is done before the line says what it is."""
SMOOTHING = 5
"""The number of steps whose mean is shown as the latest value, because single steps are noisy."""


class Screen:
    """Prints the events of a pipeline."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.line = _Line()
        self.printed_at = 0.0
        self.printed = ""
        """What was last printed of the stage in a file or a pipe, without its time."""
        self.wait = PLAIN_SECONDS
        self.warnings: dict[str, tuple[int, int]] = {}
        """The step of each kind of warning of the stage, and how often it came again."""
        self._printing = threading.Lock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def show(self, event: "Event") -> None:
        """Print an event with the method of its class: `_started` for `Started`, and so on."""
        getattr(self, f"_{type(event).__name__.lower()}")(event)

    def notice(self, reason: str) -> None:
        """Print that a signal arrived where weights have changed since the last whole step."""
        self.console.print(
            f"     {reason}: the step is finished and saved first, or given up after "
            f"{GRACE_SECONDS:g} s. Once more stops at once.",
            soft_wrap=True,
        )

    def close(self) -> None:
        """Stop the live line, and count the warnings of a stage that has not finished."""
        self._stop()
        self._count_warnings()

    def _stop(self) -> None:
        """Stop the live line, and leave the screen as it is."""
        if self._ticker is not None:
            self._closed.set()
            self._ticker.join()
            self._ticker = None
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _render(self) -> Text:
        """Return the stage's line, its metrics padded to the width of the screen."""
        return self.line.render(
            max(0, min(62, self.console.width - 48)) if self.console.is_terminal else 62
        )

    def _render_now(self) -> Group:
        """Return the stage's line, and below it what is being done."""
        words = now_in_words()
        below = [Text(f"     {words}", style="dim", no_wrap=True, overflow="ellipsis")]
        return Group(self._render(), *(below if words else []))

    def _tick(self) -> None:
        """Print the line whenever it is due."""
        while not self._closed.wait(max(self.printed_at + self.wait - time.monotonic(), 0.1)):
            try:
                self._print_if_due()
            except (OSError, ValueError):  # the reader of the pipe has gone
                return

    def _print_if_due(self) -> None:
        """Print the line, and in it what is being done, if that has changed and the last line was
        long enough ago. The line of the last step comes when the stage is finished."""
        with self._printing:  # the ticker prints, too
            if time.monotonic() - self.printed_at < self.wait:
                return
            self.printed_at = time.monotonic()
            work = now_in_words()
            words = f"{self.line.step} {work}"
            if words == self.printed or (self.line.is_last and not work):
                return
            self.printed = words
            self.wait = min(PLAIN_GROWTH * self.wait, PLAIN_MOST)
            width = 62 - len(work) - 2 if work else 62
            line = self.line.render(max(0, width))
            self.console.print(line.append(f"  {work}" if work else "", "dim"), soft_wrap=True)

    def _started(self, event: Any) -> None:
        self.line = _Line(
            f"{event.number}/{event.of} {event.stage.title}", event.stage, time.monotonic()
        )
        for metrics in event.earlier:  # a resumed run still shows where its numbers began
            self.line.add(event.done, metrics)
        self.line.step = event.done
        self.printed_at, self.printed, self.wait = time.monotonic(), "0 ", PLAIN_SECONDS
        self.warnings = {}
        if self.console.is_terminal:
            self.live = Live(
                console=self.console,
                refresh_per_second=8,
                transient=True,
                get_renderable=self._render_now,
            )
            self.live.start()
        else:
            self._closed.clear()
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()

    def _advanced(self, event: Any) -> None:
        self.line.add(event.progress.number, event.progress.metrics)
        if self.live is None:
            self._print_if_due()

    def _warned(self, event: Any) -> None:
        """Print a warning; count it if the stage has had it before, with whatever numbers."""
        kind = re.sub(r"\d+([.,]\d+)*", "#", event.sentence)
        if kind in self.warnings:
            step, more = self.warnings[kind]
            self.warnings[kind] = step, more + 1
            return
        self.warnings[kind] = event.step, 0
        place = steps_in_words(event.stage.name, event.step)
        words = f"{place}: {event.sentence}" if place else event.sentence
        self.console.print(Text(f"     ▲ {words}", style="yellow"), soft_wrap=True)

    def _finished(self, event: Any) -> None:
        kind = kind_of(event.stage.name)
        self.line.closing = "" if kind is None else kind.closing(event.summary)
        self._stop()
        self.console.print(self._render(), soft_wrap=True)
        self._count_warnings()
        if event.stage.name == "evaluation":
            self.console.print(evaluation_table(event.summary))

    def _count_warnings(self) -> None:
        """Print how often each warning of the stage came again."""
        for step, more in self.warnings.values():
            if more:
                words = f"     ▲ the warning of step {step} came {more} more time{'s' * (more > 1)}"
                self.console.print(Text(words, style="yellow"), soft_wrap=True)
        self.warnings = {}


@contextlib.contextmanager
def shown_work(console: Console) -> Iterator[None]:
    """Within this context, which is of no stage, show what takes longer than `SHOWN_SECONDS`: in a
    live line on a terminal, in ever rarer lines in a file or a pipe."""
    closed = threading.Event()

    def line() -> Text:
        return Text(f"     {now_in_words()}", style="dim", no_wrap=True, overflow="ellipsis")

    def tick() -> None:
        wait = PLAIN_SECONDS
        while not closed.wait(wait):
            wait = min(wait * PLAIN_GROWTH, PLAIN_MOST)
            with contextlib.suppress(OSError, ValueError):  # the reader of the pipe has gone
                if now_in_words():
                    console.print(line(), soft_wrap=True)

    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True, get_renderable=line):
            yield
        return
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        closed.set()
        ticker.join()


@contextlib.contextmanager
def working(console: Console, what: str) -> Iterator[Activity]:
    """Show within this context that a command is doing this, as `shown_work` does."""
    with shown_work(console), activity(what) as entry:
        yield entry


def now_in_words() -> str:
    """Return what this process has been doing for longer than `SHOWN_SECONDS`, such as "centring:
    sampling 3,480 tokens, 120/s"; empty if there is no such thing."""
    shown = []
    for stack in activities():
        if stack[0].seconds > SHOWN_SECONDS:
            names = [entry.what for entry in stack[:-1]]
            shown.append(": ".join([*names, stack[-1].in_words()]))
    return " · ".join(shown)


@dataclass
class _Line:
    """The line of one stage: its progress, metrics and time."""

    label: str = ""
    stage: "Stage | None" = None
    started: float = 0.0
    step: int = 0
    closing: str = ""
    history: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether the stage has taken all its steps."""
        return self.stage is not None and self.step >= self.stage.num_steps

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        self.step = step
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)

    def render(self, width: int) -> Text:
        """Return the line, its metrics padded to `width` columns."""
        assert self.stage is not None
        total = self.stage.num_steps
        full = BAR_WIDTH * self.step // total
        seconds = int(time.monotonic() - self.started)
        count = f"{self.step}/{total}"
        words = "  ".join([*self._words(), *([self.closing] if self.closing else [])])
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{self.label:<18} ", style="bold")
        line.append("█" * full, style="cyan").append("░" * (BAR_WIDTH - full), style="dim")
        line.append(f" {count:>7}  {words:<{width}} ").append(
            f"{seconds // 60}:{seconds % 60:02}", style="dim"
        )
        return line

    def _words(self) -> list[str]:
        """Return the stage's headline metrics, such as "reward 0.12 → 0.80"."""
        assert self.stage is not None
        words = []
        kind = kind_of(self.stage.name)
        for headline in () if kind is None else kind.headlines:
            values = self.history.get(headline.metric)
            if not values:
                continue
            recent = values[-SMOOTHING:]
            latest = headline.format.format(sum(recent) / len(recent)).replace("-", "−")
            first = headline.format.format(values[0]).replace("-", "−")
            value = f"{first} → {latest}" if headline.change else latest
            words.append(f"{headline.label} {value}")
        return words


def evaluation_table(summary: Mapping[str, Any]) -> Table:
    """Return the measures of an evaluation, before and after, side by side."""
    table = Table(
        title=f"{summary['prompts']} held-out prompts",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for header in ("", "before", "after"):
        table.add_column(header, justify="left" if not header else "right", overflow="fold")
    for name, label in MEASURES.items():
        if name in summary["before"]:
            row = [f"{summary[side][name]:z.2f}".replace("-", "−") for side in ("before", "after")]
            table.add_row(label, *row)
    return table


def sample_lines(samples: Sequence[Mapping[str, str]], count: int = 3) -> list[Text]:
    """Return lines with a few prompts and their answers, before and after."""
    lines = []
    for sample in samples[:count]:
        lines.append(Text(_one_line(sample["prompt"]), style="bold"))
        lines.append(
            Text("  before ", style="dim").append(_one_line(sample["before"]), style="default")
        )
        lines.append(
            Text("  after  ", style="green").append(_one_line(sample["after"]), style="default")
        )
    return lines


def _one_line(text: str, limit: int = 200) -> str:
    """Return a model's text on one line of at most `limit` characters, all of them printable."""
    clean = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    if not clean.strip():
        return EMPTY
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
