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
from quartet.distributed.team import micro_batches
from quartet.generation.sampling import Sampling
from quartet.models.language_model import masked_logprobs
from quartet.models.padding import response_mask, right_pad
from quartet.runtime.machine import keep_freed_memory


def phases(size, repeats):
    """(seconds, operations, answer tokens) of generating, scoring and training."""
    model = w.language_model(size)
    made, asked = ours.generator(model, size, size.rows), ours.prompts(size, size.rows)
    answers = w.response_lengths(size.limit, size.rows)
    rows = [[*p.ids, *[2] * n] for p, n in zip(asked, answers, strict=True)]
    tokens, lengths = right_pad(rows)
    mask = response_mask(torch.tensor([len(p.ids) for p in asked]), lengths, tokens.shape[1])
    pieces = [
        torch.tensor(piece) for piece in micro_batches(lengths.tolist(), ours.MICRO_BATCH_TOKENS)
    ]

    def score():
        with torch.no_grad():
            for piece in pieces:
                width = int(lengths[piece].max())
                masked_logprobs(model, tokens[piece, :width], mask[piece, :width])

    def train():
        for piece in pieces:
            width = int(lengths[piece].max())
            masked_logprobs(model, tokens[piece, :width], mask[piece, :width]).sum().backward()
        model.zero_grad()

    trunk, head = 13 * size.layers * size.hidden**2, size.hidden * size.vocabulary
    total, written = int(lengths.sum()), sum(answers)
    works = {
        "generate": (
            lambda: made.generate(asked, Sampling(max_new_tokens=size.limit)),
            2 * trunk * total + 2 * head * written,
        ),
        "score": (score, 2 * trunk * total + 2 * head * written),
        "train": (train, 6 * trunk * total + 8 * head * written),
    }
    return {
        name: (statistics.median(w.timed(work, repeats)), operations, written)
        for name, (work, operations) in works.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    keep_freed_memory()
    x = torch.randn(2048, 2048)
    reach = 2 * 2048**3 / min(w.timed(lambda: torch.mm(x, x), 10)) / 1e9
    print(f"{torch.get_num_threads()} threads, {reach:.0f} GFLOP/s in a plain product.\n")
    base = w.SIZES["1m"]
    grid = {
        "1m": base,
        "10m": w.SIZES["10m"],
        **{
            f"1m, {rows} rows": dataclasses.replace(base, rows=rows)
            for rows in (8, 16, 32, 128, 256)
        },
        **{
            f"1m, answers to {limit}": dataclasses.replace(base, limit=limit)
            for limit in (32, 64, 256, 512)
        },
    }
    print("| | generate | of the product | score | of the product | train | of the product |")
    print("|---|---|---|---|---|---|---|")
    for name, size in grid.items():
        cells = []
        for seconds, operations, written in phases(size, a.repeats).values():
            cells += [
                f"{seconds:.2f} s, {written / seconds:,.0f} tokens/s",
                f"{operations / seconds / 1e9 / reach:.0%}",
            ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
