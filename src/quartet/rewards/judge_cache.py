"""The answers that a judge has given, in a file that several runs may share."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from quartet import files
from quartet.io.texts import excerpt, well_formed
from quartet.rewards.protocol import RewardError

log = logging.getLogger(__name__)
LOCK_SECONDS = 30.0
"""Seconds to wait for another process that is writing the file."""


class JudgeCache:
    """Texts by key, in a file of JSON lines that is only appended to; without a path, in memory.

    Several processes and threads may write: each line is appended under a lock of the file. A line
    that a kill or a full disk cut short harms no other. Lines that are no answers are as if they
    were not there, and the log says how many there are.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._unsynced = path, False
        self._texts: dict[str, str] = {}
        if path is not None:
            self._load(path)

    def get(self, key: str) -> str | None:
        return self._texts.get(key)

    def put(self, key: str, text: str) -> None:
        """Keep a text that is not empty. It survives the death of this process at once, and that of
        the machine after `sync`."""
        if self.path is not None:
            self._write(self.path, key, text)
        self._texts[key] = text

    def _write(self, path: Path, key: str, text: str) -> None:
        line = json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n"
        try:
            is_new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b", buffering=0) as file, _locked(file, path):
                _append(file, well_formed(line).encode("utf-8"))
            if is_new:
                files.sync(path.parent)
        except OSError as error:
            raise RewardError(f"{path}: cannot be written ({error.strerror}).") from None
        self._unsynced = True

    def sync(self) -> None:
        """Sync the file: when this returns, all texts are on the disk."""
        if self._unsynced and self.path is not None:
            try:
                files.sync(self.path)
            except OSError as error:
                raise RewardError(f"{self.path}: cannot be written ({error.strerror}).") from None
        self._unsynced = False

    def _load(self, path: Path) -> None:
        try:
            with files.open_regular(path) as file, _locked(file, path):
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise RewardError(
                f"{path}: the judge's cache cannot be read ({error.strerror})."
            ) from None
        bad = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            entry = _entry(line)
            if entry is None:
                bad.append((number, line))
            else:
                self._texts[entry[0]] = entry[1]
        if bad:
            lines_are = "1 line is" if len(bad) == 1 else f"{len(bad)} lines are"
            log.warning(
                "%s: %s no answer of a judge and left out (line %d: %s); what they answered is "
                "asked again.",
                path,
                lines_are,
                bad[0][0],
                excerpt(bad[0][1], 80),
            )


def _entry(line: bytes) -> tuple[str, str] | None:
    """Return the key and text of a line; None where it is not a line that `put` writes."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    key, text = row.get("key"), row.get("text")
    if not isinstance(key, str) or not isinstance(text, str) or not text.strip():
        return None
    return key, well_formed(text)


def _append(file: IO[bytes], line: bytes) -> None:
    """Append a line, or raise OSError and append nothing."""
    size = file.seek(0, os.SEEK_END)
    if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
        line = b"\n" + line  # the last writer was killed in the middle of its line
    try:
        while line:
            line = line[file.write(line) or 0 :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


@contextlib.contextmanager
def _locked(file: IO[bytes], path: Path) -> Iterator[None]:
    """Hold the file's lock until the block ends, or the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise RewardError(
                    f"{path}: another process has kept the judge's cache locked for "
                    f"{LOCK_SECONDS:g} s. Stop it, or name another reward.cache."
                ) from None
            time.sleep(0.005)
        except (
            OSError
        ):  # a file system without locks: a line is one write, which most of them keep whole
            yield
            return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
