"""One model over many devices: each block's weights in parts, one per rank, put together while the block works (FSDP2, Zhao et
al. 2023).

What is not a block (embeddings, norms, heads) is held whole by every rank, and its gradient is added up by the team. The
forward pass is the one of a single process: written-out blocks are methods of their own, around which torch gathers and frees.
"""

import types
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from quartet.models.llama import READ_ON, read_on, written_out
from quartet.team import Together


def mesh_of(device: str, team: Together) -> DeviceMesh:
    """All ranks in a row; they speak among themselves as the team does."""
    if team.group is not None:
        return DeviceMesh.from_group(team.group, device, mesh_dim_names=("shard",))
    return init_device_mesh(device, (team.world,), mesh_dim_names=("shard",))


def parallelize(model: Any, mesh: DeviceMesh) -> Any:
    """The model, its blocks in parts over the mesh. Gradients of several ranks are added, not averaged: the losses of one step
    share a denominator. Works on a mesh of one rank as on many."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that could be sharded.")
    by_hand = written_out(model.base_model, 1) if hasattr(model, "base_model") else False
    for block in blocks:
        sharded = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        if by_hand:
            setattr(block, READ_ON, types.MethodType(read_on, block))
            register_fsdp_forward_method(block, READ_ON)
    return model
