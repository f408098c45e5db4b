"""One rank that steps a matrix by Muon: `python -m tests.support.muon_rank RANK WORLD STORE OUT` writes it, whole."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from quartet.training.optim import Optimizer, OptimizerConfig
from tests.support.gloo import join, leave

SHAPES = ((24, 40), (41, 24))
CONFIG = OptimizerConfig(optimizer="muon", lr=0.01, schedule="constant")


def steps(place=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    """Two matrices before and after three steps; `place` makes of a tensor what the ranks hold."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in SHAPES]
    weights = [torch.nn.Parameter(place(start.clone())) for start in starts]
    optimizer = Optimizer(weights, CONFIG, 3, weights)
    for _ in range(3):
        for weight, shape in zip(weights, SHAPES, strict=True):
            weight.grad = place(torch.randn(shape, generator=generator))
        optimizer.clip()
        optimizer.step()
    moved = [w.detach().full_tensor() if hasattr(w, "full_tensor") else w.detach() for w in weights]
    return {f"start/{i}": start for i, start in enumerate(starts)} | {
        f"end/{i}": end for i, end in enumerate(moved)
    }


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    join(rank, world, store)
    mesh = init_device_mesh("cpu", (world,))
    found = steps(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))
    save_file(found, out / f"{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main()
