"""Does it learn? The embedded worlds over several seeds, each run as a person would start it.

    python benchmarks/learning.py [--folder runs-learning] [--only reviews|hacking|sums] [--at-once
    2]

Prints the tables of docs/learning.md and writes benchmarks/results/learning.json. Takes about 40
minutes on two cores. Runs that go at once share the cores: their times say nothing about one run
alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "learning.json"
JOBS: dict[str, tuple[str, range, list[str]]] = {
    "reviews": ("reviews", range(5), []),
    "sums": ("sums", range(3), []),
    "hacking": (
        "reviews",
        range(3),
        ["algorithm.kl.coef=0", "run.steps=48", 'recipe=["ppo", "evaluation"]'],
    ),
}
"""`hacking` starts from the SFT and reward models of `reviews`: only PPO differs."""


def run(
    recipe: str, seed: int, words: Sequence[str], folder: Path, name: str, threads: int
) -> dict[str, Any]:
    """Make one run and return the results of its stages."""
    quartet = str(Path(sys.executable).parent / "quartet")
    command = [
        quartet,
        "run",
        recipe,
        f"seed={seed}",
        f'run.folder="{folder}"',
        f'run.name="{name}-{seed}"',
        *words,
    ]
    if name == "hacking":
        models = max(folder.glob(f"*-reviews-{seed}"), key=lambda p: p.stat().st_mtime)
        command += [
            f'policy={{ model = "{models / "sft"}" }}',
            f'reward.0.model="{models / "reward_model"}"',
        ]
    started = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds = time.monotonic() - started
    path = max(folder.glob(f"*-{name}-{seed}*"), key=lambda p: p.stat().st_mtime)
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    summaries = {e["stage"]: e["summary"] for e in events if e["event"] == "finished"}
    evaluation = summaries["evaluation"]
    return {
        "seed": seed,
        "threads": threads,
        "seconds": round(seconds),
        "stage_seconds": {
            e["stage"]: round(e["seconds"]) for e in events if e["event"] == "finished"
        },
        "peak_mb": round(events[-1]["peak_bytes"] / 1e6),
        "reward_model": summaries.get("reward_model"),
        "win_rate": evaluation["win_rate"],
        "kl": evaluation["kl"],
        "before": evaluation["before"],
        "after": evaluation["after"],
        "sample": evaluation["samples"][0],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the runs of one job as Markdown."""
    lines = [
        "| seed | held-out pair accuracy (possible) | reward | gold | repetition | win rate by "
        "gold | KL | time | peak |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        reward_model, before, after = r["reward_model"], r["before"], r["after"]
        accuracy = "–"
        if reward_model:
            accuracy = f"{reward_model['held_out_accuracy']:.3f} ({reward_model['ceiling']:.3f})"
        changes = [
            f"{before[k]:.2f} → {after[k]:.2f}" for k in ("reward", "gold", "response/repetition")
        ]
        won = f"{r['win_rate']['mean']:.3f} ± {r['win_rate']['interval']:.3f}"
        minutes = f"{r['seconds'] // 60}:{r['seconds'] % 60:02}"
        cells = [
            r["seed"],
            accuracy,
            *changes,
            won,
            f"{r['kl']['mean']:.1f}",
            minutes,
            f"{r['peak_mb']:,} MB",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines.append(
        f"\nmedian time {statistics.median(r['seconds'] for r in rows):.0f} s on "
        f"{rows[0]['threads']} threads"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs-learning"))
    parser.add_argument("--only", choices=sorted(JOBS))
    parser.add_argument("--at-once", type=int, default=1)
    arguments = parser.parse_args()
    threads = max((os.cpu_count() or 1) // arguments.at_once, 1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (recipe, seeds, words) in JOBS.items():
        if arguments.only in {None, name}:
            with ThreadPoolExecutor(arguments.at_once) as pool:
                started = partial(
                    run,
                    recipe,
                    words=words,
                    folder=arguments.folder.resolve(),
                    name=name,
                    threads=threads,
                )
                results[name] = list(pool.map(started, seeds))
            print(
                f"\n{name}: quartet run {recipe} {' '.join(words)}\n\n{table(results[name])}",
                flush=True,
            )
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
