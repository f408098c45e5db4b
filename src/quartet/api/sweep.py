"""`quartet.sweep`: a sweep, from Python."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.api.inputs import check_plain, inputs_of, plain
from quartet.config.errors import Table, toml_value
from quartet.config.toml import ConfigError, TomlFile, leaves, table_toml

if TYPE_CHECKING:
    from quartet.runs.sweeps import Sweep
    from quartet.sweeps.conduct import Change
    from quartet.sweeps.life import PreparedSweep

CALLER = "quartet.sweep"
NAMED = ("policy", "tokenizer", "data", "eval_data", "reward")
"""The arguments of `quartet.train` that may stand among the tables of a sweep."""


class SweepRun:
    """A sweep, checked and ready. It starts when it is iterated over, or by `finish()`.

    Iteration yields a `Change` whenever a run starts or ends. A sweep that is left, by `break` or
    Ctrl-C, stops its runs, which save what they have; `quartet.sweep(..., resume=True)` goes on.
    """

    def __init__(self, beginning: "PreparedSweep") -> None:
        self._beginning = beginning
        self.path: Path | None = beginning.path
        """The sweep's folder; None before it exists."""

    def __iter__(self) -> "Iterator[Change]":
        conductor = self._beginning.open()
        self.path = conductor.folder.path
        try:
            yield from conductor.changes(lambda: None)
        finally:
            conductor.close()

    def finish(self) -> "Sweep":
        """Carry out what is left and return the results. Raises `SweepFailed` where no trial can
        be run."""
        for _ in self:
            pass
        return self.results

    def __repr__(self) -> str:
        return "<quartet sweep, not begun>" if self.path is None else f"<quartet {self.results!r}>"

    @property
    def results(self) -> "Sweep":
        """The trials so far: `best`, `ranked()`, `importance()`."""
        from quartet.runs.reader import NoRun
        from quartet.runs.sweeps import Sweep

        if self.path is None:
            raise NoRun("the sweep has not begun. Iterate over it, or call finish().")
        return Sweep(self.path)


def sweep(
    what: str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    name: str = "sweep",
    **settings: Any,
) -> SweepRun:
    """Return a sweep, checked and ready. It is the one that `quartet sweep` carries out.

    Args:
        what: a TOML file with a [sweep] table, the name of a sweep that ships with Quartet, the
            same as nested dicts, or, with `resume`, a sweep's folder. In dicts, `policy`, `data`
            and `reward` may be what `quartet.train` takes, but for functions and other objects:
            runs are processes of their own.
        resume: go on with the newest sweep of this name, or with the folder.
        name: what a sweep that is given as dicts is called.
        **settings: any table or dotted key of the file: **{"sweep.parallel": 2, "run.steps": 50}.

    Raises:
        QuartetError: for a sweep that cannot work. Nothing has been written then.
    """
    from quartet.sweeps.life import beginning_of, file_beginning

    values = {key: plain(value) for key, value in settings.items()}
    check_plain(values)
    words = [f"{key}={toml_value(value)}" for key, value in values.items()]
    if not isinstance(what, Mapping):
        return SweepRun(beginning_of(str(what), words, resume))
    text = table_toml(_table_of(what))
    table = tomllib.loads(text)
    origins = dict.fromkeys((key for key, _ in leaves(table)), CALLER)
    return SweepRun(file_beginning(TomlFile(table, origins, name, text), words, resume))


def _table_of(what: Mapping[str, Any]) -> Table:
    """Return the tables of a sweep that is given as dicts, in which models, rows and rewards stand
    as `quartet.train` takes them. Raises `ConfigError` for a reward that only this process has."""
    if "recipe" not in what:
        raise ConfigError('recipe: name a stage, such as quartet.sweep({"recipe": "ppo", …}).')
    named = {key: what[key] for key in NAMED if key in what}
    others = {key: value for key, value in what.items() if key not in named and key != "recipe"}
    inputs = inputs_of(what["recipe"], named, others)
    if inputs.objects:
        name = next(iter(inputs.objects))
        raise ConfigError(
            "reward: the runs of a sweep are processes of their own, and have no Python objects of "
            f'this one. Put it into a file: reward="file.py:{name}".'
        )
    return {key: inputs.table[key] for key in (*what, *inputs.table) if key in inputs.table}
