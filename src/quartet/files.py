"""Files that a crash leaves whole or not at all, and reading of files that may be hostile."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

CHUNK = 1 << 20
WINDOWS = sys.platform == "win32"
LONG_NAME = 200
"""Characters of a file's name that a message shows."""
UNFINISHED, DOOMED = ".tmp", ".gone"
"""How the names of files and folders end that are being written, and of folders that are being
deleted."""


def exists(path: str | Path) -> bool:
    """Return whether there is a file or folder of this name; False also for a text that is too long
    for a name, or no name at all."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """What is written in a file, or listed in a folder, is on the disk when this returns. Windows
    cannot open folders, and flushes only files that are open for writing."""
    if WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_lock(file: IO[bytes] | int) -> bool:
    """Lock an open file against other processes until it is closed or this process ends. Return
    whether that was possible; True on Windows, which has no such lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write(path: Path, text: str) -> None:
    """Write a new file that is on the disk when this returns. A lone surrogate, which UTF-8 cannot
    hold, becomes its escape."""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def readable_weights(*paths: Path) -> None:
    """Give files of weights the permissions that files in their folder have.

    safetensors lets only their owner read them, whatever the umask is: a server or a colleague with
    another account could not load the model.
    """
    for path in paths:
        path.chmod(path.parent.stat().st_mode & 0o666)


def move(path: Path, to: Path) -> None:
    """Under its new name, at once and for good. Both in the same folder."""
    path.rename(to)
    sync(to.parent)


def replace(path: Path, text: str) -> None:
    """Write the text in place of what the file held, if there was one: a reader finds the one or
    the other, whole. Where it cannot be written, nothing is left of the attempt."""
    beside = path.with_name(path.name + UNFINISHED)
    try:
        beside.unlink(missing_ok=True)
        write(beside, text)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that half of it is never taken for the whole. Of a
    link, only the link is deleted."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}{DOOMED}")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> list[Path]:
    """Delete what a killed process left half written or half deleted in a folder, and return it:
    files that end in `.tmp`, folders that begin with a dot and end in `.tmp` or `.gone`. Only the
    one process that writes into the folder may call it."""
    left = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            if path.name.startswith(".") and path.name.endswith((UNFINISHED, DOOMED)):
                shutil.rmtree(path, ignore_errors=True)
                left.append(path)
        elif path.name.endswith(UNFINISHED):
            with contextlib.suppress(OSError):
                path.unlink()
                left.append(path)
    return left


def fingerprint(path: Path, first: int | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file, or of its first bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK if first is None else min(CHUNK, first - size)):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def fingerprints(root: Path, folder: Path) -> dict[str, Any]:
    """Of every file below a folder, by its path from the root."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): fingerprint(p) for p in files}


def difference(root: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with the first file that is not as its fingerprint says; None where all are."""
    for path_name, known in expected.items():
        name = path_name if len(path_name) <= LONG_NAME else f"{path_name[:LONG_NAME]}…"
        if PurePosixPath(path_name).is_absolute() or ".." in PurePosixPath(path_name).parts:
            return f"{name} is named in it and lies outside of the folder"
        path = root / path_name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != known["size"]:
                return f"{name} has {size:,} bytes instead of {known['size']:,}"
            if fingerprint(path)["sha256"] != known["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError, also for a pipe or a device, which could be waited
    for without end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        folder = path.is_dir()
        raise OSError(
            errno.EISDIR if folder else errno.EINVAL,
            "Is a directory" if folder else "not a regular file",
            str(path),
        )
    return os.fdopen(handle, "rb")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises OSError, ValueError or RecursionError."""
    with open_regular(path) as file:
        return json.loads(file.read().decode("utf-8"))
