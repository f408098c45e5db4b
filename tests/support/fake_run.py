"""A stand-in for `quartet run CONFIG words --resume` that takes a fraction of a second and writes the record of a run.

Each of its steps costs 20 ms and is appended to `work` in the folder, so that a test can see what was computed twice. It is resumed
from its record. What it reaches is a formula of its settings:

    reward/gold at step t = (1 − (log10 coef + 1)²) · t / steps + seed / 100,    KL = 4 · t / steps · 0.1 / coef

`optim.lr` above 0.5 plants a warning of the doctor at step 3, above 0.9 the run fails there. FAKE_FAILS names a run that fails at its end.
"""

import json
import math
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

from quartet.io.leash import end_with_parent

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0.02"))


def reached(coef: float, seed: int, share: float) -> tuple[float, float]:
    """The gold reward and the KL after a share of the steps."""
    return (1 - (math.log10(coef) + 1) ** 2) * share + seed / 100, 0.4 * share / coef


def main(words: list[str]) -> None:
    assert words[0] == "run" and words[-1] == "--resume", words
    config = tomllib.loads(Path(words[1]).read_text())
    given = dict(word.partition("=")[::2] for word in words[2:-1])
    values = {key: tomllib.loads(f"v = {text}")["v"] for key, text in given.items()}
    folder = Path(values["run.folder"]) / f"0101-0000-{values['run.name']}"
    begin(folder)
    file = (folder / "events.jsonl").open("ab", buffering=0)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    if lines[-1]["event"] == "done":
        return

    def event(kind: str, **facts) -> None:
        file.write((json.dumps({"time": time.time(), "event": kind, **facts}) + "\n").encode())

    def stop(*_) -> None:
        event("interrupted", reason="SIGTERM")
        os._exit(75)

    signal.signal(signal.SIGTERM, stop)
    done = max((line.get("step", 0) for line in lines if line["event"] == "metrics"), default=0)
    steps = config["run"]["steps"]
    coef, seed = values.get("algorithm.kl.coef", 0.1), values.get("seed", 0)
    lr = values.get("optim.lr", 0.1)
    for step in range(done + 1, steps + 1):
        time.sleep(STEP_SECONDS)
        with (folder / "work").open("a") as work:
            work.write(f"{step}\n")
        gold, kl = reached(coef, seed, step / steps)
        metrics = {"reward": gold, "reward/gold": gold, "kl": kl, "policy/entropy": 1.0}
        event("metrics", stage="ppo", step=step, metrics=metrics)
        if lr > 0.5 and step == 3:
            event("warning", stage="ppo", step=3, rule="entropy_collapse", sentence="Too low.")
        if lr > 0.9 and step == 3:
            event("warning", stage="ppo", step=3, rule="reference_moved", sentence="It moved.")
            event("failed", error="ppo, step 3: It moved.")
            sys.exit(1)
    if values["run.name"] == os.environ.get("FAKE_FAILS"):
        event("failed", error="ppo: out of luck")
        sys.exit(1)
    gold, kl = reached(coef, seed, 1.0)
    if "evaluation" in values.get("recipe", config["recipe"]):
        (folder / "evaluation").mkdir(exist_ok=True)
        summary = {"judge": "gold", "prompts": 8, "win_rate": {"mean": 0.5, "interval": 0.1}}
        summary |= {"kl": {"mean": kl, "interval": 0.1}, "before": {"gold": 0.0}}
        summary |= {"after": {"gold": gold, "reward": gold}}
        (folder / "evaluation" / "final.json").write_text(json.dumps(summary))
    event("done")


def begin(folder: Path) -> None:
    """The folder has its name when it is whole."""
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    (temporary / "config.resolved.toml").write_text('recipe = ["ppo", "evaluation"]\n')
    (temporary / "events.jsonl").write_text(
        json.dumps({"time": time.time(), "event": "started", "stage": "ppo"}) + "\n"
    )
    temporary.rename(folder)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1:])
