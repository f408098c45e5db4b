"""The run folder: everything a run leaves behind, in formats that anybody reads."""

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from quartet import __version__, files
from quartet.errors import QuartetError
from quartet.io.texts import well_formed_json
from quartet.recording.tokens import TokenTexts, rollout_table, write_tokens
from quartet.runs.records import parse_event, read_lines
from quartet.runs.untrusted import Folder, Unreadable

if TYPE_CHECKING:
    from quartet.loops.rl import Step

RECORD, ENVIRONMENT = "events.jsonl", "env.json"
STRAY = re.compile(r"\.\d{4}-\d{4}-.+\.\d+\.tmp")
"""The name of a run folder that is being made."""
STRAY_SECONDS = 60.0
"""After so long such a folder without a record is nobody's."""
EXTREMES = ("reward", "kl", "ratio/max", "response/tokens", "policy/clip_fraction")
"""Metrics whose highest and lowest steps are kept as well."""
BEYOND = 0.1
"""By how much of the range so far an extreme must exceed it: a metric that only grows is not
extreme at every step."""


class Keeping:
    """Which steps' rollouts are written: every so many, and those at which something was far higher
    or lower than before."""

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


class InUse(QuartetError, OSError):
    """A run folder that another process is writing."""


class RunFolder:
    """One folder under `runs/`. events.jsonl has one writer, this; every line is complete when it
    is written. The file is locked while it is open: a second process that wants to write it raises
    `InUse`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = (path / RECORD).open("ab", buffering=0)
        lock(self._events, path)
        self._digest = hashlib.sha256()
        self._hashed = 0
        """How many bytes of events.jsonl are in the digest."""
        self._written: list[Path] = []
        """What is not yet known to be on the disk."""

    @classmethod
    def create(
        cls,
        root: Path,
        name: str,
        contents: Mapping[str, str],
        links: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> "RunFolder":
        """Make a new folder named after the minute and the run, with a file for each of `contents`
        (its name and its text).

        The folder gets its name when all files are on the disk. Until then its name begins with a
        dot, and the next run deletes it if this process dies. `links` holds the config's paths that
        led over links, as they were written and where they led.
        """
        root.mkdir(parents=True, exist_ok=True)
        sweep_strays(root)
        stamp = f"{time.strftime('%m%d-%H%M')}-{name}"
        beside = root / f".{stamp}.{os.getpid()}{files.UNFINISHED}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        around = environment() | {"folder": str(Path.cwd()), "links": dict(links.values())}
        try:
            folder = cls(beside)
            for file, text in {
                **contents,
                ENVIRONMENT: json.dumps(around, indent=2) + "\n",
            }.items():
                files.write(beside / file, text)
            files.sync(beside)
            folder.path = _named(beside, root, stamp)
            files.sync(root)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return folder

    @classmethod
    def create_at(cls, path: Path, contents: Mapping[str, str]) -> "RunFolder":
        """Make a new folder at `path`, with a file for each of `contents` (its name and its text).
        Raises FileExistsError if there is something at `path`."""
        path.mkdir(parents=True)
        around = environment() | {"folder": str(Path.cwd()), "links": {}}
        for file, text in {**contents, ENVIRONMENT: json.dumps(around, indent=2) + "\n"}.items():
            files.write(path / file, text)
        return cls(path)

    def become_latest(self) -> None:
        """Let `latest` point at this run."""
        point_latest(self.path.parent, self.path)

    def event(
        self, kind: str, stage: str | None = None, step: int | None = None, **fields: Any
    ) -> None:
        """Append one line to events.jsonl, or raise OSError and append nothing. Times are apart
        from metrics, so that the metrics of two runs can be compared."""
        line = {
            "time": round(time.time(), 3),
            "event": kind,
            "stage": stage,
            "step": step,
            **fields,
        }
        self._append(
            json.dumps(
                well_formed_json({k: v for k, v in line.items() if v is not None}),
                ensure_ascii=False,
            )
            + "\n"
        )

    def _append(self, text: str) -> None:
        data, before = text.encode(), os.fstat(self._events.fileno()).st_size
        try:
            while data:
                data = data[self._events.write(data) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._events.fileno(), before)
            raise

    def write_rollouts(self, step: "Step", texts: TokenTexts) -> Path:
        """`rollouts/000031.parquet`: a row per token of every prompt and response of the step."""
        path = write_tokens(
            rollout_table(step, texts), self.path / "rollouts" / f"{step.number:06d}.parquet"
        )
        self._written.append(path)
        return path

    def sync(self) -> dict[str, Any]:
        """All of the record is on the disk; size and SHA-256 of events.jsonl as it is now."""
        os.fsync(self._events.fileno())
        for path in (*self._written, *{p.parent for p in self._written}, self.path):
            files.sync(path)
        self._written = []
        with (self.path / RECORD).open("rb") as file:
            file.seek(self._hashed)
            new = file.read()
        self._digest.update(new)
        self._hashed += len(new)
        return {"size": self._hashed, "sha256": self._digest.hexdigest()}

    def sweep(self) -> None:
        """Delete what a killed process left half written."""
        for name in ("", "rollouts", "probes", "evaluation", "judge", "checkpoints"):
            files.sweep(self.path / name)
        sweep_strays(self.path.parent)

    def cut_back(self, size: int, last_rollouts: int | None) -> None:
        """To what there was when a checkpoint was written: so many bytes of events.jsonl, and no
        rollouts or probes of later steps than this one (None: all stay)."""
        os.ftruncate(self._events.fileno(), min(size, os.fstat(self._events.fileno()).st_size))
        self._digest, self._hashed = hashlib.sha256(), 0
        with (self.path / RECORD).open("rb") as file:
            if (
                file.seek(0, os.SEEK_END)
                and file.seek(-1, os.SEEK_END) + 1
                and file.read(1) != b"\n"
            ):
                self._append("\n")  # the file was cut short within a line
        for kind in ("rollouts", "probes"):
            for path in (self.path / kind).glob("*.parquet"):
                if (
                    last_rollouts is not None
                    and path.stem.isdecimal()
                    and int(path.stem) > last_rollouts
                ):
                    path.unlink()

    def record(self) -> "Record":
        return read_record(self.path)

    def metrics_of(self, stage: str) -> list[dict[str, Any]]:
        """The events with metrics of a stage, as far as the record goes."""
        return [
            event
            for event in self.record().events
            if event["event"] == "metrics" and event["stage"] == stage
        ]

    def close(self) -> None:
        self._events.close()


@dataclass(frozen=True)
class Record:
    """What events.jsonl says."""

    events: list[dict[str, Any]]
    damaged: int
    """Lines that are no events, or not whole ones: torn by a crash, or changed by somebody."""

    @property
    def is_done(self) -> bool:
        last = next((e["event"] for e in reversed(self.events) if e["event"] != "metrics"), None)
        return bool(last == "done")


def read_record(folder: Path) -> Record:
    """Read events.jsonl. A line that is no event is passed over and counted, and so is one of which
    a part had to be left out. Raises Unreadable where it is no ordinary file."""
    events, damaged = [], 0
    for line in read_lines(Folder(folder), RECORD):
        try:
            event, faults = parse_event(line)
        except Unreadable:
            damaged += 1
            continue
        events.append(event)
        damaged += bool(faults)
    return Record(events, damaged)


def _named(beside: Path, root: Path, stamp: str) -> Path:
    """Give a folder the first name that is free: the stamp, or the stamp and a number."""
    for number in range(1, 1000):
        path = root / (stamp if number == 1 else f"{stamp}-{number}")
        if path.exists() or path.is_symlink():
            continue
        try:
            return beside.rename(path)
        except OSError as error:  # another process took the name in between
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
    raise FileExistsError(
        errno.EEXIST, "a thousand runs of this name and minute exist", str(root / stamp)
    )


def sweep_strays(root: Path) -> None:
    """Delete the hidden folders of runs whose process died before they had begun. One that is being
    made is locked."""
    for path in root.glob(f".*{files.UNFINISHED}"):
        if not STRAY.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        try:
            with (path / RECORD).open("rb") as file:
                lock(file, path)
                shutil.rmtree(path, ignore_errors=True)
        except InUse:
            continue
        except OSError:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STRAY_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Beginning:
    """Where a run was started."""

    folder: Path | None
    """The working directory; None where it is not known, or is no more."""
    links: Mapping[str, str]
    """Where the config's paths that lead over links led then."""


def beginning_of(folder: Path) -> Beginning:
    """Read from env.json where a run was started, as far as it says."""
    try:
        table = files.read_json(folder / ENVIRONMENT)
        started, links = Path(table["folder"]), table["links"]
        known = {k: v for k, v in links.items() if isinstance(k, str) and isinstance(v, str)}
        return Beginning(started if started.is_absolute() and started.is_dir() else None, known)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Beginning(None, {})


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
        raise InUse(
            f"{path}: another process is writing this run. Wait for it, or stop it."
        ) from None


def point_latest(root: Path, path: Path) -> None:
    """`latest` points at the newest run; where the file system has no links, it is simply not
    there."""
    link, beside = root / "latest", root / f".latest{files.UNFINISHED}"
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.name)
        beside.replace(link)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the code: what a later reader needs to know where the
    numbers came from."""
    packages = (
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "pydantic",
        "pyarrow",
    )
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
