"""Responses of the policy that RL started from.

The model runs in a process of its own, so that the studio imports no torch and stays small.
"""

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from quartet.errors import QuartetError
from quartet.runs.reader import NoRun, Run
from quartet.runs.untrusted import Folder, printable

PATIENCE = 300
"""Seconds within which the model must be loaded and have answered."""
KEPT = 500
"""The number of cached answers."""
WAITING = 8
"""The most questions in flight, including the one being answered; a further one is refused."""


class NoAnswer(QuartetError, RuntimeError):
    """The model could not be asked. The message is a sentence for the user."""


class Busy(NoAnswer):
    """Too many questions are waiting."""


def folder_of(run: Run) -> Path | None:
    """Return the folder of the initial policy: the run's SFT model, else the model that it was
    given, if it is on this machine; None otherwise."""
    model = run.config.get("policy", {}).get("model")
    own: list[Path] = [run.path / "sft"] if Folder(run.path).is_plain("sft") else []
    folders: list[Path] = [*own, *([Path(model)] if model else [])]
    for folder in folders:
        try:
            if (folder / "config.json").is_file():
                return folder
        except (OSError, ValueError):  # a name that is too long, or none
            continue
    return None


class FirstPolicies:
    """Asks initial policies, one question at a time. Waiting questions have a thread limit of their
    own, so they do not block pages. Answers are cached."""

    def __init__(self) -> None:
        self._one = CapacityLimiter(1)
        self._waiting = 0
        self._said: OrderedDict[tuple[Path, tuple[int, ...]], str] = OrderedDict()

    async def answer(self, run: Run, prompt_ids: Sequence[int]) -> str:
        """Return the greedy response, as long as the run's rollouts may be. Busy where too many
        wait for theirs."""
        folder, length = folder_of(run), run.config.get("rollout", {}).get("max_new_tokens")
        if folder is None:
            raise NoRun(f"{run.name}: the model that RL started from is not on this machine.")
        if length is None:
            raise NoRun(
                f"{run.name}: its config does not say how long an answer may be "
                f"(rollout.max_new_tokens)."
            )
        key = folder, tuple(prompt_ids)
        if key not in self._said:
            with self._in_line():
                await to_thread.run_sync(self._ask, key, length, limiter=self._one)
        return self._said[key]

    @contextmanager
    def _in_line(self) -> Iterator[None]:
        if self._waiting >= WAITING:
            raise Busy(f"{WAITING} questions wait for the model already. Ask again in a minute.")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _ask(self, key: tuple[Path, tuple[int, ...]], length: int) -> None:
        if key not in self._said:
            while len(self._said) >= KEPT:
                self._said.popitem(last=False)
            self._said[key] = _asked(*key, length)


def _asked(folder: Path, prompt_ids: Sequence[int], max_new_tokens: int) -> str:
    command = [sys.executable, "-m", "quartet.evaluation.greedy", str(folder.resolve())]
    question = json.dumps({"prompt_ids": list(prompt_ids), "max_new_tokens": max_new_tokens})
    try:
        completed = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"the model in {folder} did not answer in {PATIENCE} s.") from None
    if completed.returncode:
        why = printable((completed.stderr.strip().splitlines() or ["it said nothing"])[-1])
        raise NoAnswer(f"the model in {folder} could not be asked ({why}).")
    answer: str = json.loads(completed.stdout)
    return answer
