"""Does the doctor find what is wrong, and nothing else? Every planted fault, and runs without one.

    python benchmarks/doctor.py [--folder runs-doctor] [--seeds 2] [--at-once 2]

Prints the table of docs/doctor.md and writes benchmarks/results/doctor.json. Takes about 20 minutes
on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quartet.runs.doctor import examine
from quartet.runs.reader import Run
from quartet.runtime.faults import FAULTS

RESULTS = Path(__file__).parent / "results" / "doctor.json"
HEALTHY = (
    *(("reviews", seed) for seed in range(5)),
    ("sums", 0),
    ("sums", 1),
    ("guess", 0),
    ("guess", 1),
)
STEPS = 24
"""PPO steps of a run with a fault: what is not found in these is found late."""


def run(folder: Path, name: str, *words: str) -> Run:
    """One run as a person would start it; one that is there already is not made again."""
    there = [path for path in folder.glob(f"*-{name}") if Run(path).status == "done"]
    if not there:
        command = [
            str(Path(sys.executable).parent / "quartet"),
            "run",
            *words,
            f'run.folder="{folder}"',
            f'run.name="{name}"',
        ]
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        there = list(folder.glob(f"*-{name}"))
    return Run(max(there, key=lambda path: path.stat().st_mtime))


def broken(folder: Path, fault: str, seed: int) -> dict[str, Any]:
    """PPO with a fault, on the SFT and reward models of the healthy run of the seed."""
    models = run(folder, f"reviews-{seed}").path
    words = [
        "reviews",
        'recipe=["ppo"]',
        f'policy={{ model = "{models / "sft"}" }}',
        f'reward.0.model="{models / "reward_model"}"',
    ]
    made = run(
        folder, f"{fault}-{seed}", *words, f"seed={seed}", f"run.steps={STEPS}", "--break", fault
    )
    return {
        "fault": fault,
        "seed": seed,
        "found": {f.rule: f.step for f in examine(made) if f.stage == "ppo"},
    }


def healthy(folder: Path, recipe: str, seed: int) -> dict[str, Any]:
    made = run(folder, f"{recipe}-{seed}", recipe, f"seed={seed}")
    return {
        "recipe": recipe,
        "seed": seed,
        "found": {f"{f.stage}: {f.rule}": f.step for f in examine(made)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| planted | what it is | the doctor says (at step, by seed) |", "|---|---|---|"]
    for fault, plant in FAULTS.items():
        mine = [row for row in rows if row["fault"] == fault]
        rules = sorted(
            {rule for row in mine for rule in row["found"]},
            key=lambda r: min(x["found"].get(r, 99) for x in mine),
        )
        said = [
            f"`{rule}` ({', '.join(str(row['found'].get(rule, '–')) for row in mine)})"
            for rule in rules
        ]
        what = (plant.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{fault}` | {what} | {', '.join(said) or '**nothing**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs-doctor"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=2)
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(chosen.at_once) as pool:
        well = list(pool.map(lambda job: healthy(folder, *job), HEALTHY))
        jobs = [(fault, seed) for seed in range(chosen.seeds) for fault in FAULTS]
        ill = list(pool.map(lambda job: broken(folder, *job), jobs))
    print(table(ill))
    for row in well:
        print(f"{row['recipe']} {row['seed']}: {row['found'] or 'silent'}")
    RESULTS.write_text(
        json.dumps({"steps": STEPS, "broken": ill, "healthy": well}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
