"""The run folder: everything that a run writes, in common formats (JSON, TOML, Parquet)."""

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
    from quartet.loops.progress import Sampled

RECORD, ENVIRONMENT = "events.jsonl", "env.json"
STRAY = re.compile(r"\.\d{4}-\d{4}-.+\.\d+\.tmp")
"""The name of a run folder that is being created."""
STRAY_SECONDS = 60.0
"""A folder of such a name without a record is deleted when it is older than this."""
EXTREMES = ("reward", "kl", "ratio/max", "response/tokens", "policy/clip_fraction")
"""Metrics at whose new extremes the rollouts are written, too."""
BEYOND = 0.1
"""A value is a new extreme if it exceeds the range so far by this share of the range. Without the
margin, a metric that only grows would be extreme at every step."""


class Keeping:
    """Decides of which steps the rollouts are written: every `every` steps, and steps at which a
    metric of EXTREMES is far above or below its range so far."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.ranges: dict[str, tuple[float, float]] = {}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        extreme = False
        for name in EXTREMES:
            if name in metrics:
                value = metrics[name]
                low, high = self.ranges.get(name, (value, value))
                margin = BEYOND * (high - low)
                extreme |= value < low - margin or value > high + margin
                self.ranges[name] = min(low, value), max(high, value)
        settled = step > 2 * self.every  # at first every step is an extreme
        return (step - 1) % self.every == 0 or (settled and extreme)


class InUse(QuartetError, OSError):
    """Another process is writing this run folder."""


class RunFolder:
    """The folder of one run, open for writing. Each write to events.jsonl is a whole line. The file
    is locked while it is open: opening it in a second process raises `InUse`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events = (path / RECORD).open("ab", buffering=0)
        lock(self._events, path)
        self._digest = hashlib.sha256()
        self._hashed = 0
        """How many bytes of events.jsonl are in the digest."""
        self._written: list[Path] = []
        """Files that were written and not yet synced to the disk."""

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
        temporary = root / f".{stamp}.{os.getpid()}{files.UNFINISHED}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        surroundings = environment() | {"folder": str(Path.cwd()), "links": dict(links.values())}
        try:
            folder = cls(temporary)
            for file, text in {
                **contents,
                ENVIRONMENT: json.dumps(surroundings, indent=2) + "\n",
            }.items():
                files.write(temporary / file, text)
            files.sync(temporary)
            folder.path = _named(temporary, root, stamp)
            files.sync(root)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

    @classmethod
    def create_at(cls, path: Path, contents: Mapping[str, str]) -> "RunFolder":
        """Make a new folder at `path`, with a file for each of `contents` (its name and its text).
        Raises FileExistsError if there is something at `path`."""
        path.mkdir(parents=True)
        surroundings = environment() | {"folder": str(Path.cwd()), "links": {}}
        for file, text in {
            **contents,
            ENVIRONMENT: json.dumps(surroundings, indent=2) + "\n",
        }.items():
            files.write(path / file, text)
        return cls(path)

    def become_latest(self) -> None:
        """Let `latest` point at this run."""
        point_latest(self.path.parent, self.path)

    def event(
        self, kind: str, stage: str | None = None, step: int | None = None, **fields: Any
    ) -> None:
        """Append one line to events.jsonl; on OSError nothing is appended. Times are fields beside
        the metrics, not metrics, so that the metrics of two runs can be compared."""
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

    def write_rollouts(self, step: "Sampled", texts: TokenTexts) -> Path:
        """Write `rollouts/000031.parquet`, which has a row for each token of every prompt and
        response of the step, and return its path."""
        path = write_tokens(
            rollout_table(step, texts), self.path / "rollouts" / f"{step.number:06d}.parquet"
        )
        self._written.append(path)
        return path

    def sync(self) -> dict[str, Any]:
        """Sync all of the record to the disk and return the size and SHA-256 of events.jsonl."""
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
        """Delete unfinished files of a process that was killed."""
        for name in ("", "rollouts", "probes", "evaluation", "judge", "checkpoints"):
            files.sweep(self.path / name)
        sweep_strays(self.path.parent)

    def cut_back(self, size: int, last_rollouts: int | None) -> None:
        """Restore the record as of a checkpoint: keep `size` bytes of events.jsonl, and delete
        rollouts and probes of steps after `last_rollouts` (None keeps all)."""
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

    def record(self) -> "RunEvents":
        return read_record(self.path)

    def metrics_of(self, stage: str) -> list[dict[str, Any]]:
        """Return the metrics events of a stage."""
        return [
            event
            for event in self.record().events
            if event["event"] == "metrics" and event["stage"] == stage
        ]

    def close(self) -> None:
        self._events.close()


@dataclass(frozen=True)
class RunEvents:
    """The content of events.jsonl."""

    events: list[dict[str, Any]]
    damaged: int
    """The number of lines that are not whole events, from a crash or an edit."""

    @property
    def is_done(self) -> bool:
        last = next((e["event"] for e in reversed(self.events) if e["event"] != "metrics"), None)
        return bool(last == "done")


def read_record(folder: Path) -> RunEvents:
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
    return RunEvents(events, damaged)


def _named(temporary: Path, root: Path, stamp: str) -> Path:
    """Rename a folder to the first free name, the stamp or the stamp with a number, and return
    it."""
    for number in range(1, 1000):
        path = root / (stamp if number == 1 else f"{stamp}-{number}")
        if path.exists() or path.is_symlink():
            continue
        try:
            return temporary.rename(path)
        except OSError as error:  # another process took the name in between
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
    raise FileExistsError(
        errno.EEXIST, "a thousand runs of this name and minute exist", str(root / stamp)
    )


def sweep_strays(root: Path) -> None:
    """Delete the hidden folders of runs whose process died before the run began. A folder that is
    still being created is locked and stays."""
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
    """The working directory, links and version that a run was started with."""

    folder: Path | None
    """The working directory; None where it is unknown or no longer exists."""
    links: Mapping[str, str]
    """The targets that the links in the config's paths had then."""
    version: str | None = None
    """The version of Quartet; None where it is unknown."""


def beginning_of(folder: Path) -> Beginning:
    """Read from env.json where a run was started; unknown parts are None or empty."""
    try:
        table = files.read_json(folder / ENVIRONMENT)
        started, links = Path(table["folder"]), table["links"]
        known = {k: v for k, v in links.items() if isinstance(k, str) and isinstance(v, str)}
        version = table.get("quartet")
        return Beginning(
            started if started.is_absolute() and started.is_dir() else None,
            known,
            version if isinstance(version, str) else None,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Beginning(None, {})


def lock(file: IO[bytes], path: Path) -> None:
    """Lock a file until it is closed or the process ends. Raises `InUse` where it is locked."""
    if not files.try_lock(file):
        file.close()
        raise InUse(f"{path}: another process is writing this run. Wait for it, or stop it.")


def point_latest(root: Path, path: Path) -> None:
    """Make the link `latest` point at the newest run. A file system without links gets none."""
    link, temporary = root / "latest", root / f".latest{files.UNFINISHED}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        temporary.replace(link)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """Return versions, hardware and the git commit, to trace where a run's numbers came from."""
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
    """Return the commit of the working directory where it is a git checkout."""
    try:
        completed = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()
