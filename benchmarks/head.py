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
import math
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from torch.nn import functional

from quartet.io.heap import keep_freed_memory
from quartet.models.logprobs import head_statistics


def whole(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def selective(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = hidden @ weight.t()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def chunked(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return head_statistics(hidden, weight, None, tokens, 1.0)[0]


def fused(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    loss: Tensor = functional.linear_cross_entropy(hidden, weight, tokens, reduction="none")
    return -loss


WAYS = {"torch's own log_softmax": whole, "selective": selective, "quartet": chunked}
if hasattr(functional, "linear_cross_entropy"):  # from torch 2.13 on
    WAYS["torch's linear_cross_entropy"] = fused


def measure(way: str, vocabulary: int, size: int, positions: int) -> dict[str, float]:
    """Return the seconds and the MB of a forward and backward pass in this process, and two sums by
    which the ways are compared."""
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
        "sum": float(logprobs.detach().sum()),
        "norm": float(hidden.grad.norm()),
    }


def compare(vocabulary: int, size: int, positions: int, repeats: int) -> list[str]:
    """Measure each way in processes of their own, in turn, so that what else the machine does
    meanwhile hits all of them, and return the lines of the table. Raises ValueError where the
    ways do not compute the same."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    sizes = ["--vocabulary", vocabulary, "--hidden", size, "--positions", positions]
    for _ in range(repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, *map(str, sizes)]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[way].append(json.loads(process.stdout))
    lines = ["| | seconds | MB above inputs and gradients |", "|---|---|---|"]
    expected = runs["selective"][0]
    for way, measured in runs.items():
        if not (
            math.isclose(measured[0]["sum"], expected["sum"], rel_tol=1e-5)
            and math.isclose(measured[0]["norm"], expected["norm"], rel_tol=1e-4)
        ):
            raise ValueError(f"{way} and selective do not compute the same")
        seconds, mb = (statistics.median(run[key] for run in measured) for key in ("seconds", "mb"))
        lines.append(f"| {way} | {seconds:.2f} | {mb:,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--positions", type=int, default=2_048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=sorted(WAYS), help="measure only this, in this process")
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way, a.vocabulary, a.hidden, a.positions)))
        return
    print(
        f"V = {a.vocabulary:,}, H = {a.hidden}, N = {a.positions:,}, fp32, "
        f"{torch.get_num_threads()} threads, {a.repeats} repeats"
    )
    print("\n".join(compare(a.vocabulary, a.hidden, a.positions, a.repeats)))


if __name__ == "__main__":
    main()
