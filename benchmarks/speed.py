"""Quartet beside its peers: the same work, in turn, in one run.

    make bench          # makes the peers' environments, runs everything (about an hour), writes the results
    python benchmarks/speed.py --peers DIR [--only ppo,grpo] [--rounds 3] [--size 1m]

DIR holds two virtual environments: `new` with the newest TRL, `old` with the last one that has PPO.
Every measurement is a process of its own, so that its peak of memory is its own. Ours and theirs
take turns, round by round, so that what the machine does meanwhile hits both; what is reported is
the median over rounds of each process's median, and the ratio of the two. Counts of tokens and of
optimizer steps must agree, or it is no comparison.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "speed.json"
PAGE = HERE.parent / "docs" / "performance.md"
# work, size, peer's environment and work, steps measured in each process, what is asked at least,
# and aimed at
COMPARISONS = [
    ("generation", "1m", "new", "generation", 3, 3.0, 5.0),
    ("generation", "10m", "new", "generation", 2, 3.0, 5.0),
    ("generation", "gpt2", "new", "generation", 1, 2.0, 3.0),
    ("group", "1m", "new", "group", 3, 3.0, 5.0),
    ("group", "10m", "new", "group", 2, 3.0, 5.0),
    ("ppo", "1m", "old", "ppo", 3, 2.5, 4.0),
    ("ppo", "10m", "old", "ppo", 1, 2.5, 4.0),
    ("grpo", "1m", "new", "grpo", 3, 2.5, 4.0),
    ("grpo", "10m", "new", "grpo", 1, 2.5, 4.0),
    ("rloo", "1m", "new", "rloo", 3, 2.5, 4.0),
    ("sft", "1m", "new", "sft", 5, 1.3, 2.0),
    ("sft", "10m", "new", "sft", 3, 1.3, 2.0),
    ("reward_model", "1m", "new", "reward_model", 5, 1.3, 2.0),
    ("reward_model", "10m", "new", "reward_model", 3, 1.3, 2.0),
    ("scoring", "1m", "", "scoring_padded", 3, 1.7, 2.2),
    ("scoring", "10m", "", "scoring_padded", 3, 1.7, 2.2),
    ("training", "1m", "", "training_padded", 3, 1.7, 2.2),
    ("training", "10m", "", "training_padded", 3, 1.7, 2.2),
]
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
PEERS = {
    "generation": "transformers `generate`",
    "group": "transformers `generate`, as TRL calls it",
    "ppo": "TRL 1.10",
    "scoring_padded": "the same, padded, by transformers",
    "training_padded": "the same, padded, by transformers",
}


def measured(python: str, script: str, work: str, size: str, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(HERE / script), work, size, "--repeats", str(repeats)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise SystemExit(f"{' '.join(command)} gave no result:\n{done.stderr[-3000:]}")


def compare(
    peers: Path, work: str, size: str, environment: str, their_work: str, repeats: int, rounds: int
) -> dict:
    theirs_python = str(peers / environment / "bin" / "python") if environment else sys.executable
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(measured(sys.executable, "ours.py", work, size, repeats))
        theirs.append(
            measured(
                theirs_python, "peers.py" if environment else "ours.py", their_work, size, repeats
            )
        )
    for key in ("tokens", "optimizer_steps"):
        assert {run.get(key) for run in ours} == {run.get(key) for run in theirs}, (
            f"{work}: not the same {key}"
        )
    seconds = [[statistics.median(run["seconds"]) for run in runs] for runs in (ours, theirs)]
    return {
        "work": work,
        "size": size,
        "peer": PEERS.get(their_work, "TRL 1.16"),
        "tokens": ours[0]["tokens"],
        "threads": ours[0]["threads"],
        "rounds": rounds,
        "seconds": statistics.median(seconds[0]),
        "peer_seconds": statistics.median(seconds[1]),
        "ratio": statistics.median(seconds[1]) / statistics.median(seconds[0]),
        "ratios_by_round": [b / a for a, b in zip(*seconds, strict=True)],
        "peak_mb": statistics.median(run["peak_mb"] for run in ours),
        "peer_peak_mb": statistics.median(run["peak_mb"] for run in theirs),
    }


def start_up() -> list[dict]:
    """CPU seconds of the commands that a person waits for; the least of five, since caches start
    cold."""
    commands = {
        "quartet --help": [str(Path(sys.executable).parent / "quartet"), "--help"],
        "quartet plan reviews": [str(Path(sys.executable).parent / "quartet"), "plan", "reviews"],
    }
    found = []
    for name, command in commands.items():
        seconds = []
        for _ in range(5):
            before = os.times()
            subprocess.run(command, check=True, capture_output=True)
            after = os.times()
            seconds.append(
                after.children_user
                + after.children_system
                - before.children_user
                - before.children_system
            )
        found.append({"command": name, "cpu_seconds": min(seconds)})
    return found


def table(results: dict) -> str:
    """The comparisons as the page shows them."""
    lines = [
        "| work | model | Quartet | peer | | faster | by round | asked | memory of the peer's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["comparisons"]:
        asked = next(c[5] for c in COMPARISONS if (c[0], c[1]) == (row["work"], row["size"]))
        peer = f"{row['peer_seconds']:.2f} s, {row['peer_peak_mb']:,.0f} MB"
        rounds = " ".join(f"{x:.1f}" for x in row["ratios_by_round"])
        lines.append(
            f"| {WORDS[row['work']]} | {row['size']} | {row['seconds']:.2f} s, "
            f"{row['peak_mb']:,.0f} MB | "
            f"{peer} | {row['peer']} | **{row['ratio']:.1f} ×** | {rounds} | "
            f"{asked} × | {row['peak_mb'] / row['peer_peak_mb']:.0%} |"
        )
    return "\n".join(lines)


def write_page(results: dict) -> None:
    """The table between the page's markers."""
    text = PAGE.read_text(encoding="utf-8")
    made = f"<!-- comparisons -->\n{results['machine']}\n\n{table(results)}\n<!-- end -->"
    PAGE.write_text(
        re.sub(r"<!-- comparisons -->.*?<!-- end -->", lambda _: made, text, flags=re.DOTALL),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--only", default="", help="works, separated by commas")
    parser.add_argument("--size", default="", help="only this model")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    wanted = [
        c
        for c in COMPARISONS
        if (not a.only or c[0] in a.only.split(",")) and (not a.size or c[1] == a.size)
    ]
    old = (
        json.loads(RESULTS.read_text(encoding="utf-8"))
        if RESULTS.is_file()
        else {"comparisons": []}
    )
    reach = measured(sys.executable, "ours.py", "machine", "1m", 3)
    line = (
        f"{reach['threads']} threads of {platform.processor() or platform.machine()}; in the same "
        f"run a plain fp32 product "
        f"reaches {reach['gflops']:.0f} GFLOP/s, a plain copy {reach['copy_gb_s']:.0f} GB/s. "
        f"{time.strftime('%Y-%m-%d')}."
    )
    found = {(c["work"], c["size"]): c for c in old["comparisons"]}
    for work, size, environment, their_work, repeats, *_ in wanted:
        row = compare(a.peers, work, size, environment, their_work, repeats, a.rounds)
        found[work, size] = row
        print(
            f"{work:14} {size:5} {row['ratio']:.2f} × ({row['seconds']:.3f} s, {row['peer']} "
            f"{row['peer_seconds']:.3f} s)",
            flush=True,
        )
        order = [(c[0], c[1]) for c in COMPARISONS]
        rows = sorted(found.values(), key=lambda c: order.index((c["work"], c["size"])))
        results = {"machine": line, "reach": reach, "start_up": start_up(), "comparisons": rows}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if PAGE.is_file():
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
