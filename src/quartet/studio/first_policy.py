"""What the policy that RL started from answers to a prompt.

It is asked in a process of its own, so that the studio imports no torch and its memory stays small.
"""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from quartet.observability.reader import NoRun, Run

PATIENCE = 300
"""Seconds in which a model must be loaded and have answered."""
KEPT = 500
"""Answers that are remembered."""


class NoAnswer(RuntimeError):
    """The model could not be asked; the message is a sentence for a person."""


def folder_of(run: Run) -> Path | None:
    """Where that policy is: the run's own SFT model, else the model it was given, where it is on this machine."""
    given = run.config.get("policy", {}).get("model")
    for folder in (run.path / "sft", *([Path(given)] if given else ())):
        if (folder / "config.json").is_file():
            return folder
    return None


class FirstPolicies:
    """One question at a time; an answer that was given once is remembered."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._said: OrderedDict[tuple[Path, tuple[int, ...]], str] = OrderedDict()

    def answer(self, run: Run, prompt_ids: Sequence[int]) -> str:
        """The likeliest answer: greedy, as long as the run's rollouts may be."""
        folder = folder_of(run)
        if folder is None:
            raise NoRun(f"{run.name}: the model that RL started from is not on this machine.")
        key = folder, tuple(prompt_ids)
        with self._asking:
            if key not in self._said:
                self._said[key] = _asked(folder, prompt_ids, run.config["rollout"]["max_new_tokens"])
            while len(self._said) > KEPT:
                self._said.popitem(last=False)
            return self._said[key]


def _asked(folder: Path, prompt_ids: Sequence[int], max_new_tokens: int) -> str:
    command = [sys.executable, "-m", "quartet.evaluation.likeliest", str(folder.resolve())]
    question = json.dumps({"prompt_ids": list(prompt_ids), "max_new_tokens": max_new_tokens})
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"the model in {folder} did not answer in {PATIENCE} s.") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise NoAnswer(f"the model in {folder} could not be asked ({why}).")
    answer: str = json.loads(done.stdout)
    return answer
