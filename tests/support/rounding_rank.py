"""One rank of a model in parts that computes in bfloat16: `python -m tests.support.rounding_rank RANK WORLD STORE OUT` writes its
gradients, and what the ranks sent each other."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quartet.distributed.process_group import TorchProcessGroup
from quartet.distributed.sharding import full_tensor, is_sharded
from quartet.models.forward import masked_logprobs
from quartet.models.precision import compute_in
from quartet.training.parallelize import mesh_of, parallelize
from tests.support.gloo import join, leave
from tests.support.world import model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows, and the mask of the tokens that are learnt."""
    tokens = torch.randint(4, 20, (8, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(14) >= torch.arange(8)[:, None] % 5 + 1
    return tokens, mask


def loss(policy: Any, mine: slice) -> torch.Tensor:
    """The share of these rows in the mean negative log-probability of all."""
    tokens, mask = rows()
    return -masked_logprobs(policy, tokens[mine], mask[mine]).sum() / mask.sum()


class Sent(TorchDispatchMode):
    """Counts the collectives, and their bytes, by name and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if "c10d" in str(func) and ("gather" in name or "reduce" in name):
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
            key = f"{name.strip('_')} {str(tensors[0].dtype).removeprefix('torch.')}"
            self.calls[key] += 1
            self.order.append(key)
            self.bytes[key] += max(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, store)
    group = TorchProcessGroup(rank, world)
    policy = compute_in(model(), torch.bfloat16)
    policy = parallelize(policy, mesh_of("cpu", group, world))
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    loss(policy, mine).backward()  # the first pass also compares forwards with each other
    policy.zero_grad()
    with Sent() as sent:
        loss(policy, mine).backward()
    group.all_reduce_gradients(policy.parameters())
    assert any(map(is_sharded, policy.parameters()))
    gradients = {n: full_tensor(p.grad).contiguous() for n, p in policy.named_parameters()}
    save_file(gradients, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(
        json.dumps({"calls": sent.calls, "bytes": sent.bytes, "order": sent.order})
    )
    leave()


if __name__ == "__main__":
    main()
