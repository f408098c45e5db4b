"""Where runs and sweeps are: folders by name, found without opening what is in them."""

import errno
import re
from pathlib import Path

from quartet.errors import QuartetError
from quartet.runs.untrusted import printable

RECORD, SWEEP = "events.jsonl", "sweep.jsonl"
"""The record of a run and of a sweep: what their folders are known by."""


class NoRun(QuartetError, ValueError):
    """A folder is no run folder, or a run does not have what was requested. The message is a
    sentence for the user."""


def find_run(root: Path, name: str) -> Path | None:
    """Return the newest run folder of this name below `root`; None if there is none."""
    return _newest(root, name, RECORD)


def find_sweep(root: Path, name: str) -> Path | None:
    """Return the newest sweep of this name below `root`; None if there is none."""
    return _newest(root, name, SWEEP)


def _newest(root: Path, name: str, record: str) -> Path | None:
    pattern = re.compile(rf"\d{{4}}-\d{{4}}-{re.escape(name)}(-\d+)?")
    folders = [
        path
        for path in root.glob("*")
        if not path.is_symlink() and pattern.fullmatch(path.name) and (path / record).is_file()
    ]
    return max(folders, key=lambda path: (path / record).stat().st_mtime, default=None)


def label_folder(run: Path) -> Path | None:
    """Return the folder of the newest stage `label` of a run: of its last round, or of the one that
    it has come to; None where no such stage has begun."""
    if (run / "label").is_dir():
        return run / "label"
    rounds = [path for path in run.glob("round-[0-9]*/label") if path.is_dir()]
    return max(rounds, key=lambda path: int(path.parent.name.partition("-")[2]), default=None)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is that of a sweep. A link is none."""
    return not folder.is_symlink() and (folder / SWEEP).is_file()


def sweep_folders(root: Path) -> list[Path]:
    """Return the sweeps in a folder, the newest first, or the folder itself where it is one; none
    where it cannot be listed."""
    if is_sweep(root):
        return [root.resolve()]
    try:
        found = [path for path in root.iterdir() if is_sweep(path)]
    except OSError:
        return []
    return sorted(found, key=lambda path: (path / SWEEP).lstat().st_mtime, reverse=True)


def find_runs(root: Path) -> list[Path]:
    """Return the run folders in a folder, the newest first, or the folder itself where it is one.
    Links such as `latest` are skipped."""
    if _written(root) is not None:
        return [root.resolve()]
    try:
        entries = list(root.iterdir())
    except OSError as error:
        reasons = {errno.ENOENT: "no such folder", errno.ENOTDIR: "is a file, not a folder"}
        reason = reasons.get(error.errno or 0, error.strerror)
        raise NoRun(f"{printable(str(root))}: {reason}.") from None
    modified = {
        path: when
        for path in entries
        if not path.is_symlink() and (when := _written(path)) is not None
    }
    return sorted(modified, key=modified.__getitem__, reverse=True)


def _written(folder: Path) -> float | None:
    """Return when events.jsonl of a folder was last written; None where there is none."""
    try:
        return (folder / RECORD).lstat().st_mtime
    except (OSError, ValueError):
        return None
