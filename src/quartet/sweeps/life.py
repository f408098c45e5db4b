"""The life of a sweep: it begins, or a folder of one is opened to go on."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quartet.config.toml import ConfigError, TomlFile, assignment, read_toml
from quartet.io.install import install_command
from quartet.io.texts import excerpt, typed
from quartet.runs.folders import find_sweep, is_sweep
from quartet.runs.sweeps import Sweep
from quartet.sweeps.conduct import Conductor, facts_of
from quartet.sweeps.folder import CONFIG, FILE, CannotSweep, SweepFolder
from quartet.sweeps.processes import Processes
from quartet.sweeps.request import SweepRequest, request_in, request_of

if TYPE_CHECKING:
    from quartet.sweeps.on_ray import RayProcesses

CHANGEABLE = ("sweep.parallel", "sweep.trials", "sweep.ray")
"""What may differ when a sweep's folder is resumed."""


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that can be carried out: what was asked for, and the folder if there is one."""

    request: SweepRequest
    path: Path | None = None
    directory: Path | None = None
    """The folder that its runs were started in; None for a new one."""

    def open(self, waiting: Callable[[], None] = lambda: None) -> Conductor:
        """Create the folder, or open it; return what carries the sweep out. Raises
        `CannotSweep`, also on Windows, where a run cannot be handed open files and ended with its
        children."""
        if not hasattr(os, "killpg"):
            raise CannotSweep("quartet sweep needs Linux or macOS. On Windows, use WSL.")
        request, directory = self.request, self.directory or Path.cwd()
        if request.spec.ray is not None and importlib.util.find_spec("ray") is None:
            raise CannotSweep(f"sweep.ray needs the package ray: {install_command('ray')}.")
        if self.path is None:
            root = (directory / request.base.config.run.folder).resolve()
            texts = {FILE: request.text, CONFIG: request.config_text}
            folder = SweepFolder.create(root, request.name, texts, facts_of(request, directory))
        else:
            folder = SweepFolder(self.path.resolve(), waiting)
        try:
            return Conductor(request, folder, _processes(request, folder), directory)
        except BaseException:
            folder.close()
            raise


def _processes(request: SweepRequest, folder: SweepFolder) -> "Processes | RayProcesses":
    """Return what starts the runs of a sweep. Raises `CannotSweep` for a cluster that cannot be
    reached."""
    settings = request.spec.ray
    if settings is None:
        return Processes(request.spec.parallel, folder.handle)
    from quartet.sweeps.on_ray import RayProcesses

    try:
        return RayProcesses(settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f'address = "{settings.address}"' if settings.address else "no address"
        raise CannotSweep(
            f"sweep.ray: {where}: Ray cannot be reached ({excerpt(str(error), 200)})."
        ) from error


def beginning_of(what: str, words: Sequence[str] = (), resume: bool = False) -> PreparedSweep:
    """Return the sweep of a file, a sweep's name or, to go on, a sweep's folder.

    With `resume`, a file means its newest sweep; where there is none, a new one begins. Raises
    `ConfigError` if the sweep cannot work, and `CannotSweep` if it differs from the one that is to
    be resumed.
    """
    if is_sweep(Path(what)):
        if not resume:
            raise ConfigError(
                f"{what}: is a sweep's folder. To go on with it: quartet sweep {typed(what)} "
                "--resume"
            )
        return _folder_beginning(Path(what), words)
    return _newest(request_of(what, words), resume)


def file_beginning(
    file: TomlFile, words: Sequence[str] = (), resume: bool = False
) -> PreparedSweep:
    """Return the sweep of a file's content, as `beginning_of` does."""
    return _newest(request_in(file, words), resume)


def _newest(request: SweepRequest, resume: bool) -> PreparedSweep:
    path = None
    if resume:
        path = find_sweep(Path(request.base.config.run.folder), request.name)
    return PreparedSweep(request) if path is None else _resumed(request, path)


def _folder_beginning(path: Path, words: Sequence[str]) -> PreparedSweep:
    for word in words:
        key, _ = assignment(word)
        if key not in CHANGEABLE:
            raise ConfigError(
                f"{key}: cannot change in a sweep that goes on. Only {', '.join(CHANGEABLE)} "
                "can; start a new sweep for other settings."
            )
    sweep = Sweep(path)
    began = sweep.facts.get("words", ())
    earlier = [word for word in began if isinstance(word, str)]
    return _resumed(request_in(read_toml(path / FILE), [*earlier, *words]), path)


def _resumed(request: SweepRequest, path: Path) -> PreparedSweep:
    facts = Sweep(path).facts
    if facts.get("identity") != request.identity:
        raise CannotSweep(
            f"{path}: began with other settings, so its trials cannot be compared with new ones. "
            f"Go on with it as it was: quartet sweep {typed(path)} --resume; or leave --resume out."
        )
    directory = Path(str(facts.get("directory", "")))
    return PreparedSweep(request, path, directory if directory.is_dir() else Path.cwd())
