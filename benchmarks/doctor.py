"""Does the doctor report each planted fault, and nothing in runs without one?

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
"""PPO steps of a run with a fault; what is reported later counts as not reported."""


def run(folder: Path, name: str, *words: str) -> Run:
    """Make a run with `quartet run`, or take the finished one of this name, and return it."""
    finished = [path for path in folder.glob(f"*-{name}") if Run(path).status == "done"]
    if not finished:
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
        finished = list(folder.glob(f"*-{name}"))
    return Run(max(finished, key=lambda path: path.stat().st_mtime))


def faulty(folder: Path, fault: str, seed: int, *settings: str) -> dict[str, Any]:
    """Run PPO with a fault, on the SFT and reward models of the healthy run of the seed, and return
    the step at which each rule first spoke. `settings` come on top of the benchmark's own."""
    models = run(folder, f"reviews-{seed}").path
    words = [
        "reviews",
        'recipe=["ppo"]',
        f'policy={{ model = "{models / "sft"}" }}',
        f'reward.0.model="{models / "reward_model"}"',
    ]
    words += [f"seed={seed}", f"run.steps={STEPS}", *settings, "--break", fault]
    findings = examine(run(folder, f"{fault}-{seed}", *words))
    return {
        "fault": fault,
        "seed": seed,
        "found": {f.rule: f.step for f in findings if f.stage == "ppo"},
    }


def healthy(folder: Path, recipe: str, seed: int, *settings: str) -> dict[str, Any]:
    """Run a recipe without a fault and return the step at which each rule first spoke."""
    findings = examine(run(folder, f"{recipe}-{seed}", recipe, f"seed={seed}", *settings))
    return {
        "recipe": recipe,
        "seed": seed,
        "found": {f"{f.stage}: {f.rule}": f.step for f in findings},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the faults and the rules that reported them as Markdown."""
    lines = ["| planted | what it is | the doctor reports (at step, by seed) |", "|---|---|---|"]
    for fault, plant in FAULTS.items():
        mine = [row for row in rows if row["fault"] == fault]
        rules = sorted(
            {rule for row in mine for rule in row["found"]},
            key=lambda r: min(x["found"].get(r, 99) for x in mine),
        )
        reported = [
            f"`{rule}` ({', '.join(str(row['found'].get(rule, '–')) for row in mine)})"
            for rule in rules
        ]
        what = (plant.__doc__ or "").strip().splitlines()[0]
        lines.append(f"| `{fault}` | {what} | {', '.join(reported) or '**nothing**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs-doctor"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        without_fault = list(pool.map(lambda job: healthy(folder, *job), HEALTHY))
        jobs = [(fault, seed) for seed in range(arguments.seeds) for fault in FAULTS]
        with_fault = list(pool.map(lambda job: faulty(folder, *job), jobs))
    print(table(with_fault))
    for row in without_fault:
        print(f"{row['recipe']} {row['seed']}: {row['found'] or 'silent'}")
    RESULTS.write_text(
        json.dumps({"steps": STEPS, "broken": with_fault, "healthy": without_fault}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()
