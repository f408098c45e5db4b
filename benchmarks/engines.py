"""What each engine costs per step on the tiny world: the same run in one process, in two, sharded,
on Ray, and asynchronous.

    python benchmarks/engines.py [--repeats 3]

Prints the table of docs/scaling.md and writes benchmarks/results/engines.json. One thread per
process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "engines.json"
SIZE = [
    "policy.create.hidden_size=16",
    "policy.create.num_layers=1",
    "policy.create.num_heads=2",
    "data.rows=64",
]
STAGES = [
    "sft.steps=3",
    "sft.batch_size=8",
    "reward_model.steps=3",
    "reward_model.batch_size=8",
    "evaluation.prompts=8",
]
STEPS = [
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=8",
    "run.steps=40",
    "run.checkpoint_every=1000",
]
ENGINES: dict[str, list[str]] = {
    "Local": [],
    "sharded (FSDP2), 1 process": ["launch.shard=true"],
    "2 processes": ["launch.processes=2"],
    "sharded, 2 processes": ["launch.processes=2", "launch.shard=true"],
    "Ray, 1 actor": ["launch.type=ray"],
    "Ray, 2 actors": ["launch.type=ray", "launch.processes=2"],
    "staleness 1": ["rollout.staleness=1"],
}


def seconds_of_a_step(words: list[str]) -> float:
    """Return the median over the PPO steps without the first five, in a run with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).parent / "quartet"),
            "run",
            "reviews",
            *SIZE,
            *STAGES,
            *STEPS,
            *words,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            command,
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        [events] = Path(folder).glob("runs/*[!t]/events.jsonl")
        rows = [json.loads(line) for line in events.read_text().splitlines()]
    steps: list[float] = [
        row["seconds"] for row in rows if row["event"] == "metrics" and row["stage"] == "ppo"
    ]
    return statistics.median(steps[5:])


def table(measured: dict[str, list[float]]) -> str:
    """Return the engines' medians, and how much more than `Local` each takes."""
    local = statistics.median(measured["Local"])
    lines = ["| engine | a step | more than Local |", "|---|---|---|"]
    for name, seconds in measured.items():
        median = statistics.median(seconds)
        lines.append(f"| {name} | {1000 * median:.0f} ms | {1000 * (median - local):+.0f} ms |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    measured: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(repeats):
        for name, words in ENGINES.items():
            measured[name].append(seconds_of_a_step(words))
    print(table(measured))
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
