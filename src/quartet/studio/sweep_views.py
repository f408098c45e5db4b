"""What the page of a sweep shows: from its record to plain values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.runs.reader import NoRun
from quartet.runs.sweep_figures import (
    in_words,
    measure_names,
    objective_text,
    sweep_figures,
    sweep_rows,
)
from quartet.runs.sweeps import Sweep, Trial

MEANINGS = {
    "Trials": "each line is a trial: where it crosses an axis is its value there. Orange lines "
    "reached the least, green ones the most; dashed lines were pruned, failed or are not done.",
    "Share of variance explained": "Σ n (mean of the runs with one value of the key − mean)² / "
    "Σ (run − mean)², over the runs that are done; more than six different numbers count as three "
    "groups. The mark is what a key without any effect reaches on average, (groups − 1) / "
    "(runs − 1): a bar that is not longer says nothing. What is left belongs to the keys together "
    "and to the seeds.",
    "Objective against KL": "a trial is better the higher (or lower, where less is better) and the "
    "further left it is. Bars are deviations over seeds; the dashed line is the bound.",
}
"""What stands below each chart, by its title."""


def sweep_row(name: str, sweep: Sweep | NoRun) -> dict[str, Any]:
    """Return the row of a sweep in the list of runs."""
    if isinstance(sweep, NoRun):
        return {"name": name, "status": "unreadable", "words": str(sweep), "best": "", "trials": ""}
    ended = sum(trial.state in {"done", "pruned", "failed"} for trial in sweep.trials.values())
    best = sweep.best
    return {
        "name": name,
        "status": sweep.status,
        "trials": f"{ended} of {max(sweep.facts['trials'], len(sweep.trials))}",
        "words": ", ".join(sweep.keys),
        "best": "" if best is None else f"{in_words(best)}: {objective_text(best)}",
    }


def sweep_page(sweep: Sweep, names: Mapping[Path, str]) -> dict[str, Any]:
    """Return the values of a sweep's page. `names` are the studio's names of run folders."""
    charts = []
    for figure in sweep_figures(sweep):
        title = figure["layout"]["title"]["text"]
        charts.append({"figure": figure, "meanings": [_meaning(title)]})
    return {
        "title": sweep.name,
        "sweep": sweep_row(sweep.name, sweep),
        "facts": sweep.facts,
        "columns": [*sweep.keys, sweep.objective, *measure_names(sweep)],
        "rows": [{**row, "runs": _runs(sweep, row["trial"], names)} for row in sweep_rows(sweep)],
        "best": sweep.best,
        "charts": charts,
        "unread": sweep.problems,
    }


def _meaning(title: str) -> dict[str, str]:
    return {"label": title, "text": f": {MEANINGS[title]}"}


def _runs(sweep: Sweep, trial: Trial, names: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Return the runs of a trial: their seed, state, and name in the studio, if they have one."""
    return [
        {
            "seed": run.seed,
            "state": run.state,
            "name": None if run.run is None else names.get(sweep.path / run.run),
        }
        for run in trial.runs.values()
    ]
