"""Does the doctor report planted faults of SFT, reward models and preferences, and nothing else?

    python benchmarks/doctor_stages.py [--folder runs-doctor-stages] [--seeds 12] [--fault-seeds 3]

Prints the tables of docs/doctor.md and writes benchmarks/results/doctor_stages.json.
"""

import argparse
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quartet
from quartet.runs.doctor import Diagnosis, diagnose
from quartet.runs.reader import Run
from quartet.worlds.reviews import Reviews

HELD_OUT_ROWS = 200
"""Held-out rows of each run, instead of 1000, for the time that they take."""
RESULTS = Path(__file__).parent / "results" / "doctor_stages.json"
SHAPE = {
    "type": "llama",
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "max_length": 128,
}
SETTINGS: dict[str, Any] = {
    "data": {
        "world": "reviews",
        "rows": 1280,
        "max_prompt_tokens": 32,
        "max_response_tokens": 64,
    },
    "policy": {"create": SHAPE},
    "sft": {"steps": 40, "batch_size": 32, "lr": 1e-2, "warmup_steps": 6},
    "reward_model": {"steps": 40, "batch_size": 32, "lr": 5e-3, "warmup_steps": 6},
    "preference": {"steps": 25, "batch_size": 32, "lr": 1e-3, "warmup_steps": 4},
    "run": {"max_minutes": 10},
}


def train(folder: Path, name: str, recipe: list[str], seed: int, **settings: Any) -> Diagnosis:
    """Make a run, or take the finished one of this name, and return what the doctor says of it."""
    finished = [path for path in folder.glob(f"*-{name}") if Run(path).status == "done"]
    if not finished:
        tables: dict[str, Any] = {key: dict(value) for key, value in SETTINGS.items()}
        tables = {k: v for k, v in tables.items() if k in {*recipe, "data", "policy", "run"}}
        if {"dpo", "kto", "simpo", "ipo", "orpo"} & set(recipe):
            tables["preference"] = dict(SETTINGS["preference"])
        tables["data"]["held_out_rows"] = HELD_OUT_ROWS
        for key, value in settings.items():
            table, _, entry = key.partition(".")
            tables[table] = tables[table] | {entry: value} if entry else value
        run = quartet.train(recipe, seed=seed, folder=folder, name=name, **tables)
        with contextlib.suppress(quartet.QuartetError):  # a run that a fault ends is examined, too
            run.finish(progress=False)
        finished = list(folder.glob(f"*-{name}"))
    return diagnose(Run(max(finished, key=lambda path: path.stat().st_mtime)))


def rows_of(path: Path, seed: int, count: int, label: "Label", eval_: bool) -> str:
    """Write comparisons of the world `reviews`, of which `label` says whether the chosen side
    stays the chosen one. Return the path."""
    rng = random.Random(seed)
    lines = []
    for example in Reviews(seed).comparisons(count, eval_):
        sides = [str(example.chosen), str(example.rejected)]
        if not label(rng, *sides):
            sides.reverse()
        lines.append(
            json.dumps({"prompt": example.prompt, "chosen": sides[0], "rejected": sides[1]})
        )
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def as_labelled(*_: Any) -> bool:
    return True


def swapped(*_: Any) -> bool:
    return False


def at_random(rng: random.Random, *_: Any) -> bool:
    return rng.random() < 0.5


def longer(_: random.Random, chosen: str, rejected: str) -> bool:
    return len(chosen.split()) >= len(rejected.split())


def desirable_only(path: Path, seed: int) -> str:
    """Write unpaired preferences that are all desirable. Return the path."""
    rows = [
        json.dumps({"prompt": e.prompt, "completion": e.chosen, "label": True})
        for e in Reviews(seed).comparisons(800)
    ]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def trained(folder: Path, seed: int) -> dict[str, str]:
    """Return the [policy] table of a model that healthy SFT has trained."""
    train(folder, f"base-{seed}", ["sft"], seed)
    return {"model": str(max(folder.glob(f"*-base-{seed}")) / "sft")}


Label = Callable[[random.Random, str, str], bool]


def labelled(table: str, label: Label, count: int = 1280, held_out: Label = as_labelled) -> Any:
    """Return a function of a folder and a seed: the settings of a stage, whose table is named,
    that trains on `count` pairs labelled so and is tested on pairs labelled as `held_out` says."""

    def settings(folder: Path, seed: int) -> dict[str, Any]:
        name = f"{label.__name__}-{count}-{held_out.__name__}-{seed}"
        other = seed + (held_out is at_random)  # or the same coins would be tossed for both files
        return {
            f"{table}.data": rows_of(folder / f"{name}.jsonl", seed, count, label, False),
            "data.eval": rows_of(
                folder / f"{name}-held-out.jsonl", other, HELD_OUT_ROWS, held_out, True
            ),
        }

    return settings


def after_sft(settings_of: Any) -> Any:
    """Return a function like `settings_of` whose policy is one that healthy SFT has trained."""
    return lambda folder, seed: {"policy": trained(folder, seed), **settings_of(folder, seed)}


FAULTS: dict[str, tuple[str, list[str], Callable[[Path, int], dict[str, Any]]]] = {
    "sft, rate": (
        "SFT of a trained model with `lr = 1`",
        ["sft"],
        after_sft(lambda *_: {"sft.lr": 1.0}),
    ),
    "reward model, rate": (
        "A reward model with `lr = 1`",
        ["reward_model"],
        lambda *_: {"reward_model.lr": 1.0},
    ),
    "reward model, swapped": (
        "Chosen and rejected are swapped in the file to train on",
        ["reward_model"],
        labelled("reward_model", swapped),
    ),
    "reward model, random": (
        "Labels are tossed coins, also those held out",
        ["reward_model"],
        labelled("reward_model", at_random, held_out=at_random),
    ),
    "reward model, few": (
        "64 pairs, 20 times each",
        ["reward_model"],
        labelled("reward_model", as_labelled, 64),
    ),
    "reward model, length": (
        "In the file to train on, the longer side is the chosen one",
        ["reward_model"],
        labelled("reward_model", longer),
    ),
    "dpo, rate": (
        "DPO with `lr = 0.3`",
        ["dpo"],
        after_sft(lambda *_: {"preference.lr": 0.3}),
    ),
    "dpo, swapped": (
        "Chosen and rejected are swapped in the file to train on",
        ["dpo"],
        after_sft(labelled("preference", swapped)),
    ),
    "dpo, few": (
        "32 pairs, 25 times each",
        ["dpo"],
        after_sft(labelled("preference", as_labelled, 32)),
    ),
    "kto, one label": (
        "All labels say desirable",
        ["kto"],
        after_sft(
            lambda folder, seed: {
                "preference.data": desirable_only(folder / f"k{seed}.jsonl", seed)
            }
        ),
    ),
}
"""The planted faults: what each is, the recipe, and the settings for a folder and a seed."""
HEALTHY: dict[str, list[str]] = {
    "reviews": ["sft", "reward_model", "dpo"],
    "kto": ["sft", "kto"],
    "ipo": ["sft", "ipo"],
    "simpo": ["sft", "simpo"],
    "orpo": ["sft", "orpo"],
}
"""The recipes without a fault. The first one is run for all seeds, the others for a quarter."""


def found(diagnosis: Diagnosis) -> dict[str, int]:
    return {f"{f.stage}: {f.rule}": f.step for f in diagnosis.findings}


def looked_at(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the number that each rule judged, by stage and rule."""
    return {
        f"{stage}: {check.rule}: {check.metric}": check.value
        for stage, checks in diagnosis.checks.items()
        for check in checks
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs-doctor-stages"))
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--fault-seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for fault, (what, recipe, settings_of) in FAULTS.items():
        if arguments.only not in fault:
            continue
        reported: dict[str, list[Any]] = defaultdict(list)
        for seed in range(arguments.fault_seeds):
            name = f"{fault.replace(', ', '-').replace(' ', '_')}-{seed}"
            diagnosis = train(folder, name, recipe, seed, **settings_of(folder, seed))
            rows.append({"fault": fault, "seed": seed, "found": found(diagnosis)})
            for rule, step in found(diagnosis).items():
                reported[rule].append(step)
        print(f"| {fault} | {what} | {dict(reported)} |", flush=True)
    healthy: list[dict[str, Any]] = []
    for name, recipe in HEALTHY.items():
        if arguments.only not in name:
            continue
        for seed in range(arguments.seeds if name == "reviews" else arguments.seeds // 4):
            diagnosis = train(folder, f"{name}-{seed}", recipe, seed)
            numbers = looked_at(diagnosis)
            healthy.append({"recipe": recipe, "seed": seed, "found": found(diagnosis), **numbers})
            print(name, seed, found(diagnosis) or "silent", flush=True)
    RESULTS.write_text(json.dumps({"faults": rows, "healthy": healthy}, indent=2) + "\n")


if __name__ == "__main__":
    main()
