"""The folder of a sweep, open for writing: its file, and the record that everything follows from.

runs/1121-0104-NAME/
  sweep.toml      the file as it was written
  config.toml     the run's file, without the [sweep] table
  sweep.jsonl     what was suggested, started and reached: one JSON line each, appended
  output/         what each run printed
  1121-0105-trial-000-seed-0/    a run folder like any other, for each trial and seed
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quartet import files
from quartet.errors import QuartetError
from quartet.io.texts import well_formed_json
from quartet.runs.folders import SWEEP

FILE, CONFIG, OUTPUT = "sweep.toml", "config.toml", "output"
PATIENCE = 30.0
"""Seconds that a resumed sweep waits for the runs of the one before it to end."""


class CannotSweep(QuartetError, ValueError):
    """A sweep that cannot begin or go on: one sentence."""


class SweepFolder:
    """The folder of a sweep. Its record is locked while it is open, by the sweep and by its runs:
    no second sweep can write it before all of them have ended."""

    def __init__(self, path: Path, waiting: Callable[[], None] = lambda: None) -> None:
        """Open the folder. `waiting` is called once if runs of a sweep before are still ending.
        Raises `CannotSweep` if they do not end, or the record cannot be written."""
        self.path = path
        try:
            self._record = (path / SWEEP).open("ab", buffering=0)
        except OSError as error:
            raise CannotSweep(f"{path}: cannot be written ({error.strerror}).") from error
        if not _locked(self._record, 0.0):
            waiting()
            if not _locked(self._record, PATIENCE):
                self._record.close()
                raise CannotSweep(
                    f"{path}: another process carries out this sweep, or a run of it is still "
                    "going. Wait for it, or stop it."
                )
        self._end_torn_line()

    @classmethod
    def create(
        cls, root: Path, name: str, texts: Mapping[str, str], facts: Mapping[str, Any]
    ) -> "SweepFolder":
        """Make a new folder named after the minute and the sweep, with a file for each of `texts`
        and `facts` as the first line of the record. It has its name when all is on the disk."""
        stamp = f"{time.strftime('%m%d-%H%M')}-{name}"
        temporary = root / f".{stamp}.{os.getpid()}{files.UNFINISHED}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / OUTPUT).mkdir(parents=True)
            for file, text in texts.items():
                files.write(temporary / file, text)
            files.write(temporary / SWEEP, _line("sweep", facts))
            files.sync(temporary)
            path = _named(temporary, root, stamp)
            files.sync(root)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CannotSweep(f"{root}: cannot be written ({error.strerror or error}).") from error
        return cls(path)

    @property
    def handle(self) -> int:
        """The open file that carries the lock; a run that inherits it keeps the sweep locked."""
        return self._record.fileno()

    def event(self, kind: str, **facts: Any) -> None:
        """Append a line to the record; it is on the disk when this returns."""
        data = _line(kind, facts).encode()
        while data:
            data = data[self._record.write(data) or 0 :]
        os.fsync(self._record.fileno())

    def close(self) -> None:
        self._record.close()

    def _end_torn_line(self) -> None:
        """End a last line that a kill left unfinished, so that the next one stands alone."""
        with (self.path / SWEEP).open("rb") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) + 1:
                torn = file.read(1) != b"\n"
            else:
                torn = False
        if torn:
            self._record.write(b"\n")


def _line(kind: str, facts: Mapping[str, Any]) -> str:
    event = {"time": round(time.time(), 3), "event": kind, **facts}
    present = {key: value for key, value in event.items() if value is not None}
    return json.dumps(well_formed_json(present), ensure_ascii=False) + "\n"


def _named(temporary: Path, root: Path, stamp: str) -> Path:
    """Rename a folder to the first free name, the stamp or the stamp with a number."""
    for number in range(1, 1000):
        path = root / (stamp if number == 1 else f"{stamp}-{number}")
        if not path.exists() and not path.is_symlink():
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                return temporary.rename(path)
    raise FileExistsError(f"a thousand sweeps of this name and minute exist: {root / stamp}")


def _locked(file: Any, patience: float) -> bool:
    """Lock a file, waiting for up to `patience` seconds; return whether that was possible."""
    until = time.monotonic() + patience
    while not files.try_lock(file):
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
    return True
