"""Records of sweeps, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = tuple[dict[str, Any], Sequence[float] | None, Sequence[float] | None]
"""The values of a trial, its objective and its KL with each seed; None for one that was pruned."""


def make_sweep(
    root: Path,
    rows: Sequence[Row],
    at_most: dict[str, float] | None = None,
    direction: str = "maximize",
) -> Path:
    """The folder of a sweep without runs."""
    folder = root / "1129-1000-search"
    folder.mkdir(parents=True)
    seeds = max(len(row[1] or [0]) for row in rows)
    facts = {"objective": "gold", "direction": direction, "method": "grid", "trials": len(rows)}
    facts |= {"keys": list(rows[0][0]), "seeds": list(range(seeds)), "at_most": at_most or {}}
    lines: list[dict[str, Any]] = [{"event": "sweep", **facts}]
    for number, (values, objectives, distances) in enumerate(rows):
        lines.append({"event": "suggested", "trial": number, "values": values})
        if objectives is None or distances is None:
            reason = {"by": "entropy_collapse", "reason": "ppo, step 3: <b>Too low.</b>"}
            lines.append(
                {"event": "ended", "trial": number, "seed": 0, "state": "pruned", **reason}
            )
            continue
        for seed, (objective, distance) in enumerate(zip(objectives, distances, strict=True)):
            name = f"1129-1000-trial-{number:03d}-seed-{seed}"
            run = {"trial": number, "seed": seed, "state": "done", "run": name}
            lines.append({"event": "started", "trial": number, "seed": seed})
            lines.append(
                {"event": "ended", **run, "objective": objective, "measures": {"kl": distance}}
            )
    lines.append({"event": "done"})
    text = "".join(json.dumps({"time": 1e9, **line}) + "\n" for line in lines)
    (folder / "sweep.jsonl").write_text(text)
    return folder
