"""Runs that are told to stop in a call that would last ten minutes: `python -m tests.support.stopping SCENARIO [PHASE …]`.

A run is forked with one function replaced by one that sleeps for ten minutes, before or after its work, as a single call into
native code. When it sleeps, the run gets SIGTERM. It is then resumed, without the sleep, and compared with one that was left
alone. Prints JSON: for each phase the seconds to the end, what differs, and what was said.
"""

import functools
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.killing import SCENARIOS, digest, ended, forked, run_in

MINUTES = 10
PHASES: dict[str, tuple[str, str, int, str]] = {
    "loading the policy": ("quartet.assembly.models:Models", "trainable_policy", 1, "before"),
    "a step of SFT": ("quartet.loops.sft", "optimizer_step", 4, "before"),
    "a step of SFT that has changed weights": ("quartet.loops.sft", "optimizer_step", 4, "after"),
    "held-out texts of SFT": ("quartet.stages.sft", "held_out_loss", 2, "before"),
    "a step of the reward model": ("quartet.loops.reward_model", "optimizer_step", 4, "after"),
    "centring": ("quartet.stages.reward_model:RewardModelStage", "_mean_score", 1, "before"),
    "sampling": ("quartet.loops.collect:Collector", "respond", 4, "before"),
    "rewards": ("quartet.loops.collect", "rewarded", 4, "before"),
    "scoring": ("quartet.training.learner:Learner", "score", 4, "before"),
    "the update": ("quartet.training.learner:Learner", "update", 4, "before"),
    "the update, weights changed": ("quartet.training.learner:Learner", "update", 4, "after"),
    "probes": ("quartet.stages.rl", "probe_table", 4, "before"),
    "the win rate": ("quartet.stages.rl:WinRateProbe", "win_rate", 4, "before"),
    "a checkpoint": ("quartet.runtime.worker", "save_tensors", 7, "before"),
    "writing the policy": ("quartet.stages.rl", "save", 1, "before"),
    "the evaluation": ("quartet.stages.evaluation", "compare", 1, "before"),
}
"""Where the sleep is: a module or class, the function's name, which of its calls sleeps, and whether before or after its work."""


def slowed(place: str, name: str, number: int, when: str, mark: Path) -> None:
    """Replace a function by one whose call of this number lasts ten minutes and writes a mark when that begins."""
    module, _, owner = place.partition(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    function, calls = getattr(holder, name), [0]

    @functools.wraps(function)
    def slow(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = function(*args, **kwargs) if when == "after" or calls[0] != number else None
        if calls[0] == number:
            mark.touch()
            time.sleep(60 * MINUTES)
        return result

    setattr(holder, name, slow)


def said_by(work: Callable[[], None], file: Path) -> Callable[[], None]:
    """The work, with what it prints in a file."""

    def written() -> None:
        with file.open("w") as out:
            os.dup2(out.fileno(), 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  of this process, to its end
            work()

    return written


def stop(root: Path, words: list[str], phase: str, number: int = signal.SIGTERM) -> dict[str, Any]:
    """Stop a run in a phase; return the exit code, the seconds to the end and what was said."""
    mark, said = root / "mark", root / "said"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        slowed(*PHASES[phase], mark)
        run_in(root, words)()

    child = forked(said_by(work, said))
    while not mark.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"{phase}: it was never there"
        time.sleep(0.02)
    began = time.monotonic()
    os.kill(child, number)
    code = ended(child)
    return {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "said": said.read_text().splitlines()[-1],
    }


def phases(scenario: str, names: list[str]) -> dict[str, Any]:
    """Stop and resume the scenario in each phase."""
    words, root = SCENARIOS[scenario], Path(tempfile.mkdtemp())
    alone = root / "alone"
    alone.mkdir()
    assert ended(forked(run_in(alone, words))) == 0
    expected, found = digest(alone), {}
    for name in names or list(PHASES):
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        outcome = stop(folder, words, name)
        resumed = ended(forked(run_in(folder, [*words, "--resume"])))
        again = digest(folder)
        different = [k for k in expected.keys() | again.keys() if expected.get(k) != again.get(k)]
        found[name] = outcome | {"resumed": resumed, "different": sorted(different)}
        shutil.rmtree(folder)
    shutil.rmtree(root)
    return found


if __name__ == "__main__":
    print(json.dumps(phases(sys.argv[1], sys.argv[2:]), indent=1))
