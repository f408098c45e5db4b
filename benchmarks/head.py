"""Log-probs through the output head, forward and backward: ours in chunks against the whole [N, V]
tensor.

    python benchmarks/head.py [--vocabulary 50257] [--hidden 768] [--positions 2048] [--repeats 5]

Each way runs in a process of its own, in turn, so that its peak of memory is its own. Prints
seconds (median) and the memory above what hidden states and weights take. `torch's own log_softmax`
is what a library does that takes the logits of the whole batch; `selective` gathers first and keeps
log-sum-exp only, as TRL does; `linear_cross_entropy` is torch's own fused loss. Quartet's is the
only one that gives the entropies as well.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from quartet.models.logprobs import head_statistics
from quartet.runtime.machine import keep_freed_memory


def whole(hidden, weight, tokens):
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def selective(hidden, weight, tokens):
    logits = hidden @ weight.t()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def chunked(hidden, weight, tokens):
    return head_statistics(hidden, weight, None, tokens, 1.0)[0]


def fused(hidden, weight, tokens):
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, tokens, reduction="none")


WAYS = {"torch's own log_softmax": whole, "selective": selective, "quartet": chunked}
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from torch 2.13 on
    WAYS["torch's linear_cross_entropy"] = fused


def measure(way: str, vocabulary: int, size: int, positions: int) -> dict[str, float]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, size, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, size)).requires_grad_()
    tokens = torch.randint(vocabulary, (positions,))
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    logprobs = WAYS[way](hidden, weight, tokens)
    (-logprobs.mean()).backward()
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "seconds": seconds,
        "mb": peak,
        "sum": float(logprobs.sum()),
        "norm": float(hidden.grad.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--positions", type=int, default=2_048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=sorted(WAYS))
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way, a.vocabulary, a.hidden, a.positions)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    sizes = [
        "--vocabulary",
        str(a.vocabulary),
        "--hidden",
        str(a.hidden),
        "--positions",
        str(a.positions),
    ]
    for _ in range(a.repeats):
        for way in WAYS:  # in turn: what the machine does meanwhile hits all of them
            command = [sys.executable, __file__, "--way", way, *sizes]
            found[way].append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    print(
        f"V = {a.vocabulary:,}, H = {a.hidden}, N = {a.positions:,}, fp32, "
        f"{torch.get_num_threads()} threads, "
        f"{a.repeats} repeats"
    )
    print("| | seconds | MB above inputs and gradients |\n|---|---|---|")
    for way, runs in found.items():
        same = abs(runs[0]["sum"] / found["selective"][0]["sum"] - 1) < 1e-5
        assert same and abs(runs[0]["norm"] / found["selective"][0]["norm"] - 1) < 1e-4, (
            "not the same work"
        )
        median = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "mb")}
        print(f"| {way} | {median['seconds']:.2f} | {median['mb']:,.0f} |")


if __name__ == "__main__":
    main()
