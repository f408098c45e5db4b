"""Quartet beside its peers: the same work, in turn, in one run.

    make bench          # installs the peers, runs everything (about an hour), writes the results
    python benchmarks/speed.py --peers DIR [--only ppo,grpo] [--rounds 3] [--size 1m]
    OMP_NUM_THREADS=1 python benchmarks/speed.py --peers DIR --model FOLDER

With --model it is a pretrained model that both sides train, with the same LoRA; the results are in
a file and a table of their own.

DIR holds two virtual environments: `new` with the newest TRL, `old` with the last one that has PPO.
Every measurement is a process of its own, so that its peak of memory is its own. Ours and theirs
take turns, round by round, so that what the machine does meanwhile hits both; what is reported is
the median over rounds of each process's median, and the ratio of the two. Counts of tokens and of
optimizer steps must agree. Comparisons whose peer is not installed are skipped and said so.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"
PRETRAINED_RESULTS = HERE / "results" / "pretrained.json"
PAGE = HERE.parent / "docs" / "performance.md"
Result = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A work of ours and the peer's work that computes the same."""

    work: str
    size: str
    environment: str
    """Where the peer is installed: a folder of the peers' environments, "" for ours."""
    peer_work: str
    repeats: int
    """Steps measured in each process."""
    asked: float
    """How many times faster than the peer Quartet has to be at least."""


COMPARISONS = [
    Comparison("generation", "1m", "new", "generation", 3, 3.0),
    Comparison("generation", "10m", "new", "generation", 2, 3.0),
    Comparison("generation", "gpt2", "new", "generation", 1, 2.0),
    Comparison("group", "1m", "new", "group", 3, 3.0),
    Comparison("group", "10m", "new", "group", 2, 3.0),
    Comparison("ppo", "1m", "old", "ppo", 3, 2.5),
    Comparison("ppo", "10m", "old", "ppo", 1, 2.5),
    Comparison("grpo", "1m", "new", "grpo", 3, 2.5),
    Comparison("grpo", "10m", "new", "grpo", 1, 2.5),
    Comparison("rloo", "1m", "new", "rloo", 3, 2.5),
    Comparison("sft", "1m", "new", "sft", 5, 1.3),
    Comparison("sft", "10m", "new", "sft", 3, 1.3),
    Comparison("reward_model", "1m", "new", "reward_model", 5, 1.3),
    Comparison("reward_model", "10m", "new", "reward_model", 3, 1.3),
    Comparison("scoring", "1m", "", "scoring_padded", 3, 1.7),
    Comparison("scoring", "10m", "", "scoring_padded", 3, 1.7),
    Comparison("training", "1m", "", "training_padded", 3, 1.7),
    Comparison("training", "10m", "", "training_padded", 3, 1.7),
]
PRETRAINED = [
    Comparison("grpo", "", "new", "grpo", 1, 2.5),
    Comparison("ppo", "", "old", "ppo", 1, 2.5),
    Comparison("generation", "", "new", "generation", 1, 2.0),
]
"""Of a pretrained model, whose folder takes the place of the size."""
WORDS = {
    "generation": "generation, 64 prompts",
    "group": "8 samples of each of 8 prompts",
    "ppo": "a PPO step",
    "grpo": "a GRPO step",
    "rloo": "an RLOO step",
    "sft": "an SFT step",
    "reward_model": "a reward-model step",
    "scoring": "scoring 64 answers",
    "training": "training on 64 answers",
}
PRETRAINED_WORDS = {
    "grpo": "a GRPO step, 4 prompts with 8 answers",
    "ppo": "a PPO step, 16 answers",
    "generation": "generation, 32 prompts",
}
PEERS = {
    "generation": "transformers `generate`",
    "group": "transformers `generate`, as TRL calls it",
    "ppo": "TRL 1.10",
    "scoring_padded": "the same, padded, by transformers",
    "training_padded": "the same, padded, by transformers",
}


class Skipped(Exception):
    """A comparison that cannot be made here; the message says why."""


def measured(python: str, script: str, work: str, size: str, repeats: int) -> Result:
    """Return what a worker prints, run in a process of its own. Raises `Skipped` where its
    environment or a package is missing, SystemExit where it fails."""
    if not Path(python).is_file():
        raise Skipped(f"{python} is not there")
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / script), work, size, "--repeats", str(repeats)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False
        )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            result: Result = json.loads(line[7:])
            if "skipped" in result:
                raise Skipped(result["skipped"])
            return result
    raise SystemExit(f"{' '.join(command)} gave no result:\n{process.stderr[-3000:]}")


def compare(comparison: Comparison, peers: Path, rounds: int) -> Result:
    """Measure both sides in turn, `rounds` times, and return the row of results."""
    c = comparison
    peer_python = str(peers / c.environment / "bin" / "python")
    peer = (peer_python, "peers.py") if c.environment else (sys.executable, "ours.py")
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(measured(*peer, c.peer_work, c.size, c.repeats))
        ours.append(measured(sys.executable, "ours.py", c.work, c.size, c.repeats))
    for key in ("tokens", "optimizer_steps"):
        if {run[key] for run in ours} != {run[key] for run in theirs}:
            raise SystemExit(f"{c.work}: the two sides do not count the same {key}")
    seconds, peer_seconds = (
        [statistics.median(run["seconds"]) for run in runs] for runs in (ours, theirs)
    )
    return {
        "work": c.work,
        "size": Path(c.size).name,
        "peer": PEERS.get(c.peer_work, "TRL 1.16"),
        "tokens": ours[0]["tokens"],
        "threads": ours[0]["threads"],
        "rounds": rounds,
        "seconds": statistics.median(seconds),
        "peer_seconds": statistics.median(peer_seconds),
        "ratio": statistics.median(peer_seconds) / statistics.median(seconds),
        "ratios_by_round": [b / a for a, b in zip(seconds, peer_seconds, strict=True)],
        "peak_mb": statistics.median(run["peak_mb"] for run in ours),
        "peer_peak_mb": statistics.median(run["peak_mb"] for run in theirs),
    }


def start_up() -> list[Result]:
    """Return the CPU seconds of the commands that a user waits for: the minimum of five, since
    caches start cold."""
    quartet = str(Path(sys.executable).parent / "quartet")
    rows = []
    for words in (["--help"], ["plan", "reviews"]):
        seconds = []
        for _ in range(5):
            before = os.times()
            subprocess.run([quartet, *words], check=True, capture_output=True)
            after = os.times()
            user = after.children_user - before.children_user
            seconds.append(user + after.children_system - before.children_system)
        rows.append({"command": " ".join(["quartet", *words]), "cpu_seconds": min(seconds)})
    return rows


def table(results: Result) -> str:
    """Return the comparisons as the page shows them."""
    lines = [
        "| work | model | Quartet | peer | | speed-up | by round | target | relative memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    asked = {(c.work, c.size): c.asked for c in COMPARISONS}
    of_pretrained = {c.work: c.asked for c in PRETRAINED}
    for row in results["comparisons"]:
        made_here = (row["work"], row["size"]) in asked
        cells = [
            (WORDS if made_here else PRETRAINED_WORDS)[row["work"]],
            row["size"],
            f"{row['seconds']:.2f} s, {row['peak_mb']:,.0f} MB",
            f"{row['peer_seconds']:.2f} s, {row['peer_peak_mb']:,.0f} MB",
            row["peer"],
            f"**{row['ratio']:.1f} ×**",
            " ".join(f"{ratio:.1f}" for ratio in row["ratios_by_round"]),
            f"{asked[row['work'], row['size']] if made_here else of_pretrained[row['work']]} ×",
            f"{row['peak_mb'] / row['peer_peak_mb']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, results: Result, marker: str = "comparisons") -> str:
    """Return the page with the table between its markers."""
    between = f"<!-- {marker} -->\n{results['machine']}\n\n{table(results)}\n<!-- end -->"
    pattern = rf"<!-- {marker} -->.*?<!-- end -->"
    return re.sub(pattern, lambda _: between, page, flags=re.DOTALL)


def describe_machine(reach: Result) -> str:
    """Return the sentence above the table."""
    threads = f"{reach['threads']} thread{'s' * (reach['threads'] != 1)}"
    if reach["threads"] == 1:
        threads += " (seconds of processor time)"
    return (
        f"{threads} of {platform.processor() or platform.machine()}; in the same "
        f"run a plain fp32 product reaches {reach['gflops']:.0f} GFLOP/s, a plain copy "
        f"{reach['copy_gb_s']:.0f} GB/s. {time.strftime('%Y-%m-%d')}."
    )


def merged(old: list[Result], row: Result) -> list[Result]:
    """Return the rows with this one in the place of the old one, in the order of `COMPARISONS`."""
    rows = {(r["work"], r["size"]): r for r in [*old, row]}
    order = [(c.work, c.size) for c in COMPARISONS]
    works = [c.work for c in PRETRAINED]

    def place(row: Result) -> int:
        key = (row["work"], row["size"])
        return order.index(key) if key in order else works.index(row["work"])

    return sorted(rows.values(), key=place)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--only", default="", help="works, separated by commas")
    parser.add_argument("--size", default="", help="only this model")
    parser.add_argument("--model", default="", help="the folder of a pretrained model")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    works, size = arguments.only.split(","), arguments.size
    available, file, marker = COMPARISONS, RESULTS, "comparisons"
    if arguments.model:
        available = [dataclasses.replace(c, size=arguments.model) for c in PRETRAINED]
        file, marker = PRETRAINED_RESULTS, "pretrained"
    wanted = [
        c
        for c in available
        if (not arguments.only or c.work in works) and (not size or c.size == size)
    ]
    rows: list[Result] = []
    if file.is_file():
        rows = json.loads(file.read_text(encoding="utf-8"))["comparisons"]
    reach = measured(sys.executable, "ours.py", "machine", "1m", 3)
    results = {"machine": describe_machine(reach), "reach": reach, "start_up": start_up()}
    for comparison in wanted:
        name = f"{comparison.work:14} {Path(comparison.size).name:5}"
        try:
            row = compare(comparison, arguments.peers, arguments.rounds)
        except Skipped as reason:
            print(f"{name} skipped: {reason}", flush=True)
            continue
        times = f"{row['seconds']:.3f} s, {row['peer']} {row['peer_seconds']:.3f} s"
        print(f"{name} {row['ratio']:.2f} × ({times})", flush=True)
        rows = merged(rows, row)
        text = json.dumps({**results, "comparisons": rows}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")
    if PAGE.is_file() and file.is_file():
        results = json.loads(file.read_text(encoding="utf-8"))
        page = with_table(PAGE.read_text(encoding="utf-8"), results, marker)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
