"""ILQL against imitation on data whose most frequent answers are wrong.

A question is eight digits, and the right answer repeats them. The logged answers have each digit
right with a probability of 0.2, and else the next one (3 for 2, 0 for 9); the score of an answer is
how many digits are right. So the most likely answer has no digit right, hardly a row is right as a
whole, and of the best tenth of the rows more than half of the digits are wrong. What is to be
learnt is spread over the rows: which digit pays at each place.

Three ways learn from the same rows: imitation of all of them, imitation of those with the highest
scores, and ILQL. `python benchmarks/stitching.py` writes benchmarks/results/stitching.json.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "stitching.json"
DIGITS, RIGHT, ROWS, HELD_OUT = 8, 0.2, 4000, 300
TOP = (0.05, 0.1)
"""The shares of the rows that filtered imitation keeps."""
BETAS = (0, 2, 4, 8, 16)
TEMPERATURES = (1.0, 0.1)
FILE = """
recipe = ["{stage}"]
[data]
world = "sums"              # for its tokenizer of digits
[policy]
create = {{ type = "llama", hidden_size = 64, num_layers = 2, num_heads = 4, max_length = 32 }}
[{stage}]
data = "{rows}"
steps = 300
batch_size = 64
lr = 2e-3
warmup_steps = 20
"""
BEST = ("sft.eval_every=25", "sft.keep=best")
FEW = (*BEST, "sft.steps=150")
"""Imitation keeps the weights of the lowest held-out loss, as few rows are soon known by heart."""
LOSS = ("ilql.steps=1800", "ilql.loss={tau = 0.8, gamma = 1.0, cql = 0.01, polyak = 0.1}")
"""Values come from later tokens, one token in each round of the target network: that takes longer
than imitation does."""
MEASURE = """
def share(prompts, responses):
    return [sum(a == b for a, b in zip(p, r)) / 8 for p, r in zip(prompts, responses)]
"""


def logged(rng: random.Random) -> dict[str, Any]:
    """Return a row: a question, a logged answer and its score."""
    digits = [rng.randrange(10) for _ in range(DIGITS)]
    answer = [d if rng.random() < RIGHT else (d + 1) % 10 for d in digits]
    score = sum(a == b for a, b in zip(digits, answer, strict=True))
    text = "".join(map(str, digits))
    return {"prompt": f"{text}=", "completion": "".join(map(str, answer)), "score": score}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def quartet(folder: Path, *words: str) -> str:
    """Return what a command prints, run in a folder."""
    command = [sys.executable, "-m", "quartet", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def trained(folder: Path, stage: str, rows: list[dict[str, Any]], name: str, *words: str) -> Path:
    """Return the folder of a run that learns from rows."""
    write(folder / f"{name}.jsonl", rows)
    file = folder / f"{name}.toml"
    file.write_text(FILE.format(stage=stage, rows=f"{name}.jsonl"), encoding="utf-8")
    quartet(folder, "run", file.name, f"run.name={name}", *words)
    return next(folder.glob(f"runs/*-{name}"))


def measured(folder: Path, policies: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Return the mean share of right digits of each policy at each temperature."""
    found: dict[str, dict[str, float]] = {name: {} for name in policies}
    for temperature in TEMPERATURES:
        models = [f"{name}={path}" for name, path in policies.items()]
        words = ["--on", "held_out.jsonl", "--measure", "function:measure.py:share", "--json"]
        more = [f"--temperature={temperature}", "--max-new-tokens=12", "--to", "evaluation"]
        result = json.loads(quartet(folder, "eval", *models, *words, *more))
        for cell in result["cells"]:
            if cell["measure"] == "share":
                found[cell["policy"]][str(temperature)] = round(cell["value"], 3)
    return found


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Return the shares of right digits of all policies of a seed."""
    rng = random.Random(f"stitching/{seed}")
    rows = [logged(rng) for _ in range(ROWS)]
    write(folder / "held_out.jsonl", [{"prompt": logged(rng)["prompt"]} for _ in range(HELD_OUT)])
    (folder / "measure.py").write_text(MEASURE, encoding="utf-8")
    best = sorted(rows, key=lambda row: -row["score"])
    policies, kept = {}, {}
    word = f"seed={seed}"
    policies["imitation"] = trained(folder, "sft", rows, "all", *BEST, word) / "sft"
    for share in TOP:
        name = f"top{round(100 * share)}"
        chosen = best[: round(share * ROWS)]
        kept[name] = sum(row["score"] for row in chosen) / len(chosen) / DIGITS
        rng.shuffle(chosen)
        policies[name] = trained(folder, "sft", chosen, name, *FEW, word) / "sft"
    run = trained(folder, "ilql", rows, "ilql", *LOSS, word)
    for beta in BETAS:
        to = folder / f"beta-{beta}"
        quartet(folder, "export", str(run), "--to", str(to), "--beta", str(beta))
        policies[f"beta-{beta}"] = to
    logged_share = sum(row["score"] for row in rows) / ROWS / DIGITS
    return {"logged": logged_share, "kept": kept, "shares": measured(folder, policies)}


def table(results: list[dict[str, Any]]) -> str:
    """Return the table of docs/learning.md: the shares of all seeds, the mean first."""
    lines = ["| | temperature 1 | temperature 0.1 |", "|---|---|---|"]
    for name in results[0]["shares"]:
        cells = []
        for temperature in map(str, TEMPERATURES):
            shares = [result["shares"][name][temperature] for result in results]
            each = ", ".join(f"{share:.2f}" for share in shares)
            cells.append(f"**{statistics.fmean(shares):.2f}** ({each})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            results.append(one_seed(Path(folder), seed))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        about = {"date": datetime.now(UTC).date().isoformat(), "machine": platform.machine()}
        text = json.dumps(about | {"results": results}) + "\n"
        options.results.write_text(text, encoding="utf-8")
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
