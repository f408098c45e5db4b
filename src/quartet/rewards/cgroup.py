"""A memory cgroup for one program: it bounds all memory that the program makes the kernel hold,
page tables included."""

import atexit
import contextlib
import itertools
import os
import time
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")
EMPTY_SECONDS = 2.0
"""How long, at the end of this process, the last groups are waited for."""
_numbers = itertools.count()
_left: list[Path] = []
_usable: set[Path] = set()
atexit.register(lambda: remove_left(EMPTY_SECONDS))


class MemoryCgroup:
    """A cgroup that is made when it is entered and removed when it is left."""

    def __init__(self, path: Path, limit_file: str, limit: int) -> None:
        self.path, self.limit_file, self.limit = path, limit_file, limit

    def __enter__(self) -> "MemoryCgroup":
        self.path.mkdir()
        try:
            (self.path / self.limit_file).write_text(str(self.limit))
            for file, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                with contextlib.suppress(OSError):  # version 2 only, where there is swap
                    if (self.path / file).exists():
                        (self.path / file).write_text(value)
            if not os.access(self.path / "cgroup.procs", os.W_OK):
                raise PermissionError(f"{self.path}/cgroup.procs cannot be written")
        except OSError:
            self.path.rmdir()
            raise
        return self

    def enter_command(self) -> list[str]:
        """Return what a command begins with so that it and all its children are in the group from
        their first byte."""
        return ["/bin/sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the group, or leave that to the next one: the last process takes some milliseconds
        to leave it."""
        _left.append(self.path)
        remove_left()


def remove_left(seconds: float = 0.0) -> None:
    """Remove the groups that no process is in any more; wait up to so many seconds for those that
    are left."""
    deadline = time.monotonic() + seconds
    while _left:
        for path in list(_left):
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()
                _left.remove(path)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.002)


def memory_cgroup(limit_mb: int) -> MemoryCgroup | None:
    """Return a memory cgroup below this process's own that can be made here; None where none
    can."""
    for parent, limit_file in _parents():
        group = MemoryCgroup(
            parent / f"quartet-{os.getpid()}-{next(_numbers)}", limit_file, limit_mb << 20
        )
        if parent in _usable:
            return group
        with contextlib.suppress(OSError), group:
            _usable.add(parent)
        if parent in _usable:
            return MemoryCgroup(
                parent / f"quartet-{os.getpid()}-{next(_numbers)}", limit_file, limit_mb << 20
            )
    return None


def _parents() -> list[tuple[Path, str]]:
    """Return the cgroups that this process is in and could have children with a memory limit, and
    the name of the limit."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = path.lstrip("/")
            if controllers == "":
                folder = ROOT / own
                with contextlib.suppress(OSError):
                    if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                        found.append((folder, "memory.max"))
            elif "memory" in controllers.split(","):
                found.append((ROOT / controllers / own, "memory.limit_in_bytes"))
    return found
