"""One model over many devices: its matrices in parts, one per rank, put together while they are
worked with.

Blocks by FSDP2 (Zhao et al. 2023), around whose forward pass torch gathers and frees. The matrices
beside them, embeddings and heads, are read in more than one place, and often one is the other: they
put themselves together for whoever asks, and the gradient goes back in parts (as in SimpleFSDP,
Zhang et al. 2024). What is small beside the blocks, norms and the head to one number, every rank
holds whole.

The forward pass is the one of a single process: written-out blocks are methods of their own, for
torch to gather around.
"""

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
    share_comm_ctx,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from quartet.distributed.process_group import TorchProcessGroup
from quartet.distributed.sharding import is_sharded
from quartet.models.llama import READ_ON, read_on, written_out
from quartet.models.trunk import blocks_of


def mesh_of(device: str, process_group: TorchProcessGroup, parts: int) -> DeviceMesh:
    """The ranks in rows of `parts`. Those of a row have a model together; every row has the same
    (HSDP, Zhao et al. 2023, where there are several). They give up waiting when the team does.
    Dimensions are called after the team: torch takes two meshes of the same ranks and names for
    one, and would let one thread speak through the other's group."""
    names = (f"replicate{process_group.name}", f"shard{process_group.name}")
    if parts == process_group.world_size:
        group = process_group.group or dist.group.WORLD
        assert group is not None, "the team has not joined"
        return DeviceMesh.from_group(group, device, mesh_dim_names=names[1:])
    rows = torch.arange(process_group.world_size).view(-1, parts)
    groups = [
        dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=process_group.deadline)[0]
        for ranks in (rows.T.contiguous(), rows)
    ]
    return DeviceMesh.from_group(groups, device, mesh=rows, mesh_dim_names=names)


def parallelize(model: Any, mesh: DeviceMesh) -> Any:
    """The model, in parts over the mesh. Gradients of several ranks are added, not averaged: the
    losses of one step share a denominator. Works on a mesh of one rank as on many."""
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that could be sharded.")
    by_hand = written_out(model.base_model, 1) if hasattr(model, "base_model") else False
    for block in blocks:
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if by_hand:
            if not hasattr(block, READ_ON):
                setattr(block, READ_ON, types.MethodType(read_on, block))
            register_fsdp_forward_method(block, READ_ON)
    share_comm_ctx(
        blocks
    )  # else each keeps its whole gradient until the backward pass of all is done
    inside = {id(m) for block in blocks for m in block.modules()}
    beside = [
        m
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.Linear) and id(m) not in inside
    ]
    _divide([m for m in beside if len(m.weight) > 1], mesh)
    for small in model.parameters():
        if not is_sharded(
            small
        ):  # read from a file, it is a view that would keep the file's whole map in memory
            small.data = small.data.clone()
    return model


def _divide(modules: list[Any], mesh: DeviceMesh) -> None:
    """The matrix of each in parts; one that several have stays one matrix."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        matrix = module.weight
        if id(matrix) not in made:
            placed = distribute_tensor(
                matrix.detach(), mesh, [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
            )
            made[id(matrix)] = nn.Parameter(placed, requires_grad=matrix.requires_grad)
        module.weight = made[id(matrix)]
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"weight": property(_put_together)})


def _put_together(module: Any) -> torch.Tensor:
    """The matrix of a module. Every rank must ask; what each makes of it adds to its gradient."""
    matrix: DTensor = module._parameters["weight"]
    whole: torch.Tensor = matrix.full_tensor(grad_placements=[Partial()] * matrix.device_mesh.ndim)
    return whole
