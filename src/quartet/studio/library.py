"""The runs of some folders. Each is opened once and refreshed as it grows."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from quartet.runs.folders import sweep_folders
from quartet.runs.reader import NoRun, Run, find_runs
from quartet.runs.sweeps import Sweep
from quartet.runs.untrusted import printable

KEPT_OPEN = 200
"""The most runs whose metrics stay in memory."""


class Library:
    """Finds runs by name. A name is looked up in a listing and never joined to a path."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = roots
        self._open: OrderedDict[str, Run] = OrderedDict()

    def paths(self, trials: bool = True) -> dict[str, Path]:
        """Return the run folders by name, the newest of each root first. Where two roots have the
        same name, the second is listed with its root's name before it. With `trials`, the runs of
        sweeps are among them, each with the name of its sweep before it."""
        paths: dict[str, Path] = {}
        for root in self.roots:
            for path in find_runs(root):
                name = printable(path.name)
                paths[name if name not in paths else f"{printable(path.parent.name)} {name}"] = path
        known = set(paths.values())
        for sweep in self.sweep_paths().values() if trials else ():
            runs = [path for path in find_runs(sweep) if path not in known]
            paths |= {f"{printable(sweep.name)} {printable(path.name)}": path for path in runs}
        return paths

    def sweep_paths(self) -> dict[str, Path]:
        """Return the folders of sweeps by name, the newest of each root first."""
        paths: dict[str, Path] = {}
        for root in self.roots:
            for path in sweep_folders(root):
                paths.setdefault(printable(path.name), path)
        return paths

    def sweep(self, name: str) -> Sweep:
        """Return a sweep. Raises NoRun where it does not exist or cannot be read."""
        path = self.sweep_paths().get(name)
        if path is None:
            raise NoRun(f"there is no sweep called {printable(name)}.")
        return Sweep(path)

    def sweeps(self) -> list[tuple[str, Sweep | NoRun]]:
        """Return all sweeps with their names; the error in place of one that cannot be read."""
        sweeps: list[tuple[str, Sweep | NoRun]] = []
        for name, path in self.sweep_paths().items():
            try:
                sweeps.append((name, Sweep(path)))
            except NoRun as error:
                sweeps.append((name, error))
        return sweeps

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
        """Return all runs but those of sweeps, with their names; the error in place of a run that
        cannot be read."""
        runs: list[tuple[str, Run | NoRun]] = []
        for name, path in self.paths(trials=False).items():
            try:
                runs.append((name, self._run(name, path)))
            except NoRun as error:
                runs.append((name, error))
        return runs
