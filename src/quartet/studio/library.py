"""The runs of some folders. Each is opened once and refreshed as it grows."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from quartet.runs.reader import NoRun, Run, find_runs
from quartet.runs.untrusted import printable

KEPT_OPEN = 200
"""The most runs whose metrics stay in memory."""


class Library:
    """Finds runs by name. A name is looked up in a listing and never joined to a path."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = roots
        self._open: OrderedDict[str, Run] = OrderedDict()

    def paths(self) -> dict[str, Path]:
        """Return the run folders by name, the newest of each root first. Where two roots have the
        same name, the second is listed with its root's name before it."""
        paths: dict[str, Path] = {}
        for root in self.roots:
            for path in find_runs(root):
                name = printable(path.name)
                paths[name if name not in paths else f"{printable(path.parent.name)} {name}"] = path
        return paths

    def run(self, name: str) -> Run:
        """Return a run, refreshed. Raises NoRun where it does not exist or cannot be read."""
        path = self.paths().get(name)
        if path is None:
            self._open.pop(name, None)
            raise NoRun(f"there is no run called {printable(name)}.")
        return self._run(name, path)

    def _run(self, name: str, path: Path) -> Run:
        try:
            if name not in self._open:
                self._open[name] = Run(path)
                self._open[name].name = name
            self._open[name].refresh()
        except NoRun:
            self._open.pop(name, None)
            raise
        self._open.move_to_end(name)
        while len(self._open) > KEPT_OPEN:
            self._open.popitem(last=False)
        return self._open[name]

    def runs(self) -> list[tuple[str, Run | NoRun]]:
        """Return all runs with their names; the error in place of a run that cannot be read."""
        runs: list[tuple[str, Run | NoRun]] = []
        for name, path in self.paths().items():
            try:
                runs.append((name, self._run(name, path)))
            except NoRun as error:
                runs.append((name, error))
        return runs
