"""How far each phase is from the machine's limit, and how time grows with rows, length and
parameters.

    python benchmarks/scaling.py [--repeats 3]

Operations counted: 2 per weight and token read, 6 per weight and token trained, and for the head 2
per weight and answer token sampled or scored, 8 trained (its logits are computed twice). Attention
is left out: the shares are a little low. Prints the tables of docs/performance.md.
"""

import argparse
import dataclasses
import statistics

import torch

import ours
import workload as w
from quartet.generation.sampling import Sampling
from quartet.io.heap import keep_freed_memory
from workload import Size


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a step: its median seconds, the operations counted, and its answer tokens."""

    seconds: float
    operations: int
    answer_tokens: int


def phases(size: Size, repeats: int) -> dict[str, Phase]:
    """Measure generating, scoring and training."""
    scoring = ours.Scoring.of(size, padded=False)
    generator, prompts = (
        ours.FixedLengthGenerator(scoring.model, size, size.rows),
        ours.prompts(size, size.rows),
    )
    trunk, head = 13 * size.layers * size.hidden**2, size.hidden * size.vocabulary
    tokens, answer_tokens = int(scoring.lengths.sum()), int(scoring.mask.sum())
    works = {
        "generate": (
            lambda: generator.generate(prompts, Sampling(max_new_tokens=size.limit)),
            2 * trunk * tokens + 2 * head * answer_tokens,
        ),
        "score": (scoring.score, 2 * trunk * tokens + 2 * head * answer_tokens),
        "train": (scoring.train, 6 * trunk * tokens + 8 * head * answer_tokens),
    }
    return {
        name: Phase(statistics.median(w.timed(work, repeats)), operations, answer_tokens)
        for name, (work, operations) in works.items()
    }


def row(name: str, measured: dict[str, Phase], gflops: float) -> str:
    """Return a line of the table; `gflops` is what a plain product reaches."""
    cells = []
    for phase in measured.values():
        tokens_per_second = phase.answer_tokens / phase.seconds
        cells += [
            f"{phase.seconds:.2f} s, {tokens_per_second:,.0f} tokens/s",
            f"{phase.operations / phase.seconds / 1e9 / gflops:.0%}",
        ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    base = w.SIZES["1m"]
    gflops = ours.machine(base, 2).other["gflops"]
    print(f"{torch.get_num_threads()} threads, {gflops:.0f} GFLOP/s in a plain product.\n")
    sizes = {"1m": base, "10m": w.SIZES["10m"]}
    for rows in (8, 16, 32, 128, 256):
        sizes[f"1m, {rows} rows"] = dataclasses.replace(base, rows=rows)
    for limit in (32, 64, 256, 512):
        sizes[f"1m, answers to {limit}"] = dataclasses.replace(base, limit=limit)
    print("| | generate | share | score | share | train | share |")
    print("|---|---|---|---|---|---|---|")
    for name, size in sizes.items():
        print(row(name, phases(size, arguments.repeats), gflops), flush=True)


if __name__ == "__main__":
    main()
