"""Files that a crash leaves whole or does not leave at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def sync(path: Path) -> None:
    """What is written in a file, or listed in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, text: str) -> None:
    """A new file, on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def move(path: Path, to: Path) -> None:
    """Under its new name, at once and for good. Both in the same folder."""
    path.rename(to)
    sync(to.parent)


def replace(path: Path, text: str) -> None:
    """The text instead of what the file held: a reader finds the one or the other."""
    beside = path.with_name(path.name + ".tmp")
    write(beside, text)
    beside.replace(path)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Renamed first, so that nobody takes half of it for the whole."""
    doomed = path.with_name(f".{path.name}.gone")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


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
    for name, known in expected.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != known["size"]:
            return f"{name} has {size:,} bytes instead of {known['size']:,}"
        if fingerprint(path)["sha256"] != known["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
