"""How near is `quartet plan` to a run? Each case runs a few steps in a process of its own; its peak
memory is compared with the plan's, and the time of its steps with that of `--measure`.

    python benchmarks/plan.py [--cases 1m-sft-full …] [--model FOLDER --texts FILE] [--no-time]

Prints the table of docs/performance.md and writes benchmarks/results/plan.json. One thread; seconds
are of processor time, which other programs change less than the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
STEPS = [
    "sft.steps=4",
    "reward_model.steps=4",
    "run.steps=4",
    "evaluation.best_of=0",
    "evaluation.prompts=16",
    "data.rows=128",
]
WIDE = [f"policy.create.{key}" for key in ("hidden_size=512", "num_layers=8", "num_heads=8")]
LORA = 'policy.adapter={type = "lora", rank = 16}'
GOLD = 'reward=[{type = "gold"}]'
METHODS: dict[str, list[str]] = {
    "sft": ['recipe="sft"'],
    "grpo": [
        'recipe="grpo"',
        'algorithm={preset = "grpo"}',
        GOLD,
        "rollout.samples_per_prompt=8",
        "rollout.prompts_per_step=8",
    ],
    "ppo": ["rollout.prompts_per_step=32"],
}
"""What is run by method. PPO is the whole pipeline, with its reward model."""
PRETRAINED: dict[str, list[str]] = {
    "sft": ['recipe="sft"'],
    "grpo": [*METHODS["grpo"][:-1], "rollout.prompts_per_step=2", "optim.minibatches=1"],
    "ppo": [
        'recipe="ppo"',
        GOLD,
        'critic={type = "separate", init = "policy"}',
        "rollout.prompts_per_step=16",
        "optim.minibatches=1",
    ],
}
"""The same for a pretrained model, with a gold reward in the place of a reward model."""
SIZES = ("1m", "30m", "pretrained")
CASES = [f"{s}-{m}-{t}" for s in SIZES for m in METHODS for t in ("full", "lora")]


def words(case: str, model: str = "", texts: str = "") -> list[str]:
    """Return what follows `quartet run` in a case, which is named size-method-training."""
    size, method, training = case.split("-")
    adapter = [LORA] if training == "lora" else []
    # No stage of SFT alone reads how many RL steps there are.
    steps = [word for word in STEPS if method != "sft" or not word.startswith("run.")]
    if size != "pretrained":
        wide = WIDE if size == "30m" else []
        return ["reviews", *steps, *wide, *METHODS[method], *adapter]
    recipe = "film-reviews.toml"  # a copy without the recipe's adapter
    few = [*steps, "sft.batch_size=8", *([] if method == "sft" else ["run.steps=3"])]
    named = [f"policy.model={json.dumps(model)}", f"data.texts={texts}"]
    return [recipe, *named, *few, *PRETRAINED[method], *adapter]


def without_adapter(folder: Path) -> None:
    """Write the recipe film-reviews without its adapter into a folder."""
    from quartet.recipes import recipe_path

    recipe = recipe_path("film-reviews")
    assert recipe is not None
    lines = recipe.read_text(encoding="utf-8").splitlines()
    kept = (line for line in lines if not line.startswith("adapter"))
    (folder / "film-reviews.toml").write_text("\n".join(kept), encoding="utf-8")


def run(case: list[str]) -> dict[str, Any]:
    """Run a case, and return its peak and the plan's in bytes, and the seconds of a step and the
    tokens of a response of its last stage that has steps."""
    with tempfile.TemporaryDirectory() as place:
        _child(place, "--run", json.dumps(case))
        [file] = Path(place).glob("runs/*[!t]/events.jsonl")
        events = [json.loads(line) for line in file.read_text().splitlines()]
    return _facts(events)


def _facts(events: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [e for e in events if e["event"] == "metrics" and e["stage"] != "evaluation"]
    last = [e for e in steps if e["stage"] == steps[-1]["stage"]][1:]
    seconds = [sum((e.get("phases") or {"": e["seconds"]}).values()) for e in last]
    tokens = [e["metrics"].get("response/tokens", 0.0) for e in last]
    done = events[-1]
    return {
        "stage": steps[-1]["stage"],
        "peak": done["peak_bytes"],
        "planned": done["planned_peak_bytes"],
        "seconds": statistics.median(seconds),
        "tokens": statistics.fmean(tokens),
    }


def measured_seconds(case: list[str], stage: str, tokens: float) -> float:
    """Return the seconds of a stage's step by `quartet plan --measure`, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        arguments = ["--steps-of", json.dumps(case), "--stage", stage, "--tokens", str(tokens)]
        return float(_child(place, *arguments).splitlines()[-1])


def _child(place: str, *arguments: str) -> str:
    """Return what this file prints with these arguments in a process of its own, in a folder with
    the recipe of a pretrained model."""
    without_adapter(Path(place))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(
        command, check=False, cwd=place, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def count_processor_time() -> None:
    """Have this process measure its steps in processor time. It has one thread that computes."""
    for clock in ("monotonic", "perf_counter"):
        setattr(time, clock, time.process_time)


def run_here(case: list[str]) -> None:
    """Run a case in this process, as the command does."""
    from quartet.cli import main

    sys.argv = ["quartet", "run", *case]
    main()


def print_seconds(case: list[str], stage: str, tokens: float) -> None:
    """Measure in this process, and print the seconds of one step."""
    from quartet.assembly import build
    from quartet.planning.measure import measure
    from quartet.runtime.requests import settings_of

    config = settings_of(case[0], case[1:]).config
    times = measure(config, build)
    per_step = times.steps[stage] if times.rl is None else times.rl.at(tokens)
    print(per_step)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the cases with what was planned and measured, in MB and seconds of processor time;
    empty where that was not measured."""
    lines = [
        "| case | planned | measured | planned / measured | `--measure`, a step | a step | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, facts in results.items():
        planned, peak = (facts[key] / 1e6 for key in ("planned", "peak"))
        cells = [case, f"{planned:,.0f} MB", f"{peak:,.0f} MB", f"{planned / peak:.2f}"]
        expected, seconds = facts.get("expected"), facts.get("seconds")
        cells += ["" if value is None else f"{value:.2f} s" for value in (expected, seconds)]
        cells.append(f"{expected / seconds:.2f}" if expected and seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[c for c in CASES if c[0] != "p"])
    parser.add_argument("--model", default="")
    parser.add_argument("--texts", default="")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--run", type=json.loads)
    parser.add_argument("--steps-of", type=json.loads)
    parser.add_argument("--stage")
    parser.add_argument("--tokens", type=float)
    arguments = parser.parse_args()
    if arguments.run or arguments.steps_of:
        count_processor_time()
    if arguments.run:
        run_here(arguments.run)
        return
    if arguments.steps_of:
        print_seconds(arguments.steps_of, arguments.stage, arguments.tokens)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in arguments.cases:
        given = words(case, arguments.model, arguments.texts)
        facts = run(given)
        if not arguments.no_time:
            facts["expected"] = measured_seconds(given, facts["stage"], facts["tokens"])
        results[case] = facts
        print(table({case: facts}).splitlines()[-1], flush=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
