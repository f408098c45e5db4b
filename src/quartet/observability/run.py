"""The run folder: everything a run leaves behind, in formats that anybody reads."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet import __version__
from quartet.observability.tokens import TokenTexts, rollout_table, write_tokens

if TYPE_CHECKING:
    from quartet.loops.rl import Step


EXTREMES = ("reward", "kl", "ratio/max", "response/tokens", "policy/clip_fraction")
"""Metrics whose highest and lowest steps are kept as well."""
BEYOND = 0.1
"""By how much of the range so far an extreme must exceed it: a metric that only grows is not extreme at every step."""


class Keeping:
    """Which steps' rollouts are written: every so many, and those at which something was far higher or lower than before."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: dict[str, tuple[float, float]] = {}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        extreme = False
        for name in EXTREMES:
            if name in metrics:
                value = metrics[name]
                low, high = self.seen.get(name, (value, value))
                margin = BEYOND * (high - low)
                extreme |= value < low - margin or value > high + margin
                self.seen[name] = min(low, value), max(high, value)
        settled = step > 2 * self.every  # at first every step is an extreme
        return (step - 1) % self.every == 0 or (settled and extreme)


class RunFolder:
    """One folder under `runs/`. events.jsonl has one writer, this; every line is complete when it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = (path / "events.jsonl").open("a", encoding="utf-8")

    @classmethod
    def create(cls, root: Path, name: str, files: Mapping[str, str]) -> "RunFolder":
        """A new folder named after the minute and the run, with these files in it; `latest` points at it."""
        stamp = f"{time.strftime('%m%d-%H%M')}-{name}"
        for number in range(1, 1000):
            path = root / (stamp if number == 1 else f"{stamp}-{number}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        for file, text in files.items():
            (path / file).write_text(text, encoding="utf-8")
        (path / "env.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        point_latest(root, path)
        return cls(path)

    def event(self, kind: str, stage: str | None = None, step: int | None = None, **fields: Any) -> None:
        """Append one line to events.jsonl. Times are apart from metrics, so that the metrics of two runs can be compared."""
        line = {"time": round(time.time(), 3), "event": kind, "stage": stage, "step": step, **fields}
        self._events.write(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n")
        self._events.flush()

    def write_rollouts(self, step: "Step", texts: TokenTexts) -> Path:
        """`rollouts/000031.parquet`: a row per token of every prompt and response of the step."""
        return write_tokens(rollout_table(step, texts), self.path / "rollouts" / f"{step.number:06d}.parquet")

    def close(self) -> None:
        self._events.close()


def point_latest(root: Path, path: Path) -> None:
    """`latest` points at the newest run; where the file system has no links, it is simply not there."""
    link, beside = root / "latest", root / f".latest-{os.getpid()}"
    try:
        beside.symlink_to(path.name)
        beside.replace(link)
    except OSError:
        beside.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the code: what a later reader needs to know where the numbers came from."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "pyarrow")
    return {
        "quartet": __version__,
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in packages},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in, where that is a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
