"""Runs that are told to stop.

    phases SCENARIO PHASE …            in a call that would last ten minutes
    instants SCENARIO TRIALS SEED SECONDS
                                       at random instants of stretches in which a step lasts so many seconds

In `phases`, a run is forked with one function replaced by one that sleeps for ten minutes, before or after its work, as a single call into
native code. When it sleeps, the run gets SIGTERM. It is then resumed, without the sleep, and compared with one that was left
alone. In `instants`, every function of a stretch sleeps before and after its work, and the signal, one of
those that stop a run, comes at any time of it. Prints JSON: for each phase or trial the seconds to the end, what differs, and what was
said.
"""

import functools
import importlib
import json
import os
import random
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
    "a step of ILQL": ("quartet.loops.ilql", "optimizer_step", 4, "before"),
    "a step of ILQL that has changed weights": ("quartet.loops.ilql", "optimizer_step", 4, "after"),
    "sampling": ("quartet.loops.collect:Collector", "respond", 4, "before"),
    "rewards": ("quartet.loops.collect", "rewarded", 4, "before"),
    "scoring": ("quartet.training.learner:Learner", "score", 4, "before"),
    "the update": ("quartet.training.learner:Learner", "update", 4, "before"),
    "the update, weights changed": ("quartet.training.learner:Learner", "update", 4, "after"),
    "probes": ("quartet.stages.rl", "probe_table", 4, "before"),
    "the win rate": ("quartet.stages.probes:WinRateProbe", "win_rate", 4, "before"),
    "a checkpoint": ("quartet.runtime.worker", "save_tensors", 7, "before"),
    "writing the policy": ("quartet.stages.rl", "save", 1, "before"),
    "the evaluation": ("quartet.stages.evaluation", "compare", 1, "before"),
    "merging": ("quartet.models.language_model", "merged_state", 1, "before"),
    "between changes of weights": ("quartet.training.learner", "optimizer_step", 4, "before"),
}
"""Where the sleep is: a module or class, the function's name, which of its calls sleeps, and whether before or after its work."""


STRETCHES: dict[str, tuple[str, ...]] = {
    "SFT": ("loading the policy", "a step of SFT", "held-out texts of SFT"),
    "a step of PPO": (
        "sampling",
        "rewards",
        "scoring",
        "between changes of weights",
        "probes",
        "the win rate",
    ),
    "the reward model": ("a step of the reward model", "centring"),
    "a checkpoint": ("a checkpoint",),
    "the end": ("merging", "writing the policy", "the evaluation"),
}
"""The phases that are drawn out together."""
TIMES_IN_A_STEP = {"between changes of weights": 4}
"""How often a step calls a function, where it is not once."""
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
"""SIGALRM is what the time limit sends."""


def drawn_out(phase: str, number: int, seconds: float, mark: Path) -> None:
    """Let a function sleep before and after its work from its call of this number on, and write a mark when that begins."""
    holder, name = function_of(phase)
    function, calls = getattr(holder, name), [0]

    @functools.wraps(function)
    def slow(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] < number:
            return function(*args, **kwargs)
        mark.touch()
        time.sleep(seconds / 2)
        result = function(*args, **kwargs)
        time.sleep(seconds / 2)
        return result

    setattr(holder, name, slow)


def function_of(phase: str) -> tuple[Any, str]:
    """The module or class that holds the function of a phase, and its name."""
    place, name, *_ = PHASES[phase]
    module, _, owner = place.partition(":")
    holder: Any = importlib.import_module(module)
    return (getattr(holder, owner) if owner else holder), name


def slowed(phase: str, mark: Path) -> None:
    """Replace the function of a phase by one of whose calls one lasts ten minutes and writes a mark when that begins."""
    holder, name = function_of(phase)
    function, calls = getattr(holder, name), [0]
    _, _, number, when = PHASES[phase]

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


def stop(
    root: Path,
    words: list[str],
    slow: Callable[[Path], None],
    wait: float = 0.0,
    number: int = signal.SIGTERM,
) -> dict[str, Any]:
    """Stop a run so many seconds after its mark; return the exit code, the seconds to the end and what was said. `slow` makes
    functions of the run slow."""
    mark, said = root / "mark", root / "said"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        slow(mark)
        run_in(root, words)()

    child = forked(said_by(work, said))
    while not mark.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"{root.name}: it was never there"
        time.sleep(0.02)
    time.sleep(wait)
    began = time.monotonic()
    os.kill(child, number)
    code = ended(child)
    return {
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
        "said": said.read_text().splitlines()[-1],
    }


Stop = Callable[[Path], dict[str, Any]]
"""Stops a run in a folder and returns what `stop` does."""


def compared(words: list[str], stops: dict[str, Stop]) -> dict[str, Any]:
    """Stop and resume a run in each way, and compare it with one that was left alone."""
    root, found = Path(tempfile.mkdtemp()), {}
    alone = root / "alone"
    alone.mkdir()
    assert ended(forked(run_in(alone, words))) == 0
    expected = digest(alone)
    for name, stopping in stops.items():
        folder = root / name.replace(" ", "_")
        folder.mkdir()
        outcome = stopping(folder)
        resumed = ended(forked(run_in(folder, [*words, "--resume"])))
        again = digest(folder)
        different = [k for k in expected.keys() | again.keys() if expected.get(k) != again.get(k)]
        found[name] = outcome | {"resumed": resumed, "different": sorted(different)}
        shutil.rmtree(folder)
        print(name, found[name], file=sys.stderr, flush=True)
    shutil.rmtree(root)
    return found


def phases(scenario: str, names: list[str]) -> dict[str, Any]:
    """Stop and resume the scenario in each phase."""
    words = SCENARIOS[scenario]

    def stopped(phase: str) -> Stop:
        return lambda folder: stop(folder, words, lambda mark: slowed(phase, mark))

    return compared(words, {name: stopped(name) for name in names})


def instants(scenario: str, trials: int, seed: int, seconds: float) -> dict[str, Any]:
    """Stop and resume the scenario at random instants of the stretches, one after the other, in which a step lasts so many
    seconds."""
    words, chance = SCENARIOS[scenario], random.Random(seed)

    def trial(stretch: str) -> Stop:
        names = STRETCHES[stretch]
        first = chance.randint(1, 4)
        number, wait = chance.choice(STOPPING), chance.uniform(0, seconds)

        def slow(mark: Path) -> None:
            for name in names:
                call = 1 if PHASES[name][2] == 1 else TIMES_IN_A_STEP.get(name, 1) * (first - 1) + 1
                drawn_out(name, call, seconds / len(names), mark)

        about = {"signal": number.name, "after": round(wait, 1)}
        return lambda folder: about | stop(folder, words, slow, wait, number)

    chosen = [list(STRETCHES)[i % len(STRETCHES)] for i in range(trials)]
    return compared(words, {f"{i} {stretch}": trial(stretch) for i, stretch in enumerate(chosen)})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["instants", scenario, trials, seed, seconds]:
            found = instants(scenario, int(trials), int(seed), float(seconds))
            print(json.dumps(found, indent=1))
        case ["phases", scenario, *names]:
            print(json.dumps(phases(scenario, names), indent=1))
