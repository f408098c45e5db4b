"""The run folder: everything a run leaves behind, in formats that anybody reads."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quartet import __version__, durable
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


class InUse(OSError):
    """A run folder that another process is writing."""


class RunFolder:
    """One folder under `runs/`. events.jsonl has one writer, this; every line is complete when it is written. The file is
    locked while it is open: a second process that wants to write it raises `InUse`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = (path / "events.jsonl").open("ab")
        lock(self._events, path)
        self._digest = hashlib.sha256()
        self._hashed = 0
        """How many bytes of events.jsonl are in the digest."""
        self._written: list[Path] = []
        """What is not yet known to be on the disk."""

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
        text = json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False) + "\n"
        self._events.write(text.encode())
        self._events.flush()

    def write_rollouts(self, step: "Step", texts: TokenTexts) -> Path:
        """`rollouts/000031.parquet`: a row per token of every prompt and response of the step."""
        path = write_tokens(rollout_table(step, texts), self.path / "rollouts" / f"{step.number:06d}.parquet")
        self._written.append(path)
        return path

    def sync(self) -> dict[str, Any]:
        """All of the record is on the disk; size and SHA-256 of events.jsonl as it is now."""
        os.fsync(self._events.fileno())
        for path in (*self._written, *{p.parent for p in self._written}, self.path):
            durable.sync(path)
        self._written = []
        with (self.path / "events.jsonl").open("rb") as file:
            file.seek(self._hashed)
            new = file.read()
        self._digest.update(new)
        self._hashed += len(new)
        return {"size": self._hashed, "sha256": self._digest.hexdigest()}

    def cut_back(self, size: int, last_rollouts: int | None) -> None:
        """To what there was when a checkpoint was written: so many bytes of events.jsonl, and no rollouts or probes of later
        steps than this one (None: all stay)."""
        os.ftruncate(self._events.fileno(), min(size, os.fstat(self._events.fileno()).st_size))
        self._digest, self._hashed = hashlib.sha256(), 0
        for kind in ("rollouts", "probes"):
            for file in (self.path / kind).glob("*.parquet"):
                if last_rollouts is not None and file.stem.isdigit() and int(file.stem) > last_rollouts:
                    file.unlink()

    def metrics_of(self, stage: str) -> list[dict[str, Any]]:
        """The events with metrics of a stage, as far as the record goes."""
        with (self.path / "events.jsonl").open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if '"metrics"' in line]
        return [event for event in found if event["event"] == "metrics" and event["stage"] == stage]

    def close(self) -> None:
        self._events.close()


def lock(file: IO[bytes], path: Path) -> None:
    """Until the file is closed or the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InUse(f"{path}: another process is writing this run. Wait for it, or stop it.") from None


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
