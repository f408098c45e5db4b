"""One model over many devices: every rank holds a part of each matrix, and the ranks gather the
matrix while it is used.

Blocks are sharded by FSDP2 (Zhao et al. 2023): torch gathers a block's weights before its forward
pass and frees them afterwards. Embeddings and heads are read in several places, and a head often is
the embedding: a property gathers them wherever they are read, and its backward pass scatters the
gradient (as in SimpleFSDP, Zhang et al. 2024). Norms and heads with one output are small, and every
rank holds them whole.

The forward pass is that of a single process. A fused forward pass of a block is registered with
FSDP as a method of the block, so that torch gathers around it too.
"""

import functools
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from quartet.distributed.process_group import TorchProcessGroup
from quartet.distributed.sharding import is_sharded
from quartet.models.architectures import why_not_fused
from quartet.models.fused import BLOCK_FORWARD, TRUNK_FORWARD, block_forward, trunk_forward
from quartet.models.precision import compute_dtype, read_as_held
from quartet.models.trunk import blocks_of


def mesh_of(device: str, process_group: TorchProcessGroup, parts: int) -> DeviceMesh:
    """Return the mesh of the ranks in rows of `parts`.

    The ranks of a row hold one model together. Several rows hold replicas of it (HSDP, Zhao et al.
    2023). Collectives on the mesh have the deadline of the process group.
    """
    # torch shares the communicators of meshes with equal ranks and names. The name of the group
    # keeps two threads of a rank from using the same one.
    names = (f"replicate{process_group.name}", f"shard{process_group.name}")
    if parts == process_group.world_size:
        group = process_group.group or dist.group.WORLD
        assert group is not None, "the process group has not joined"
        return DeviceMesh.from_group(group, device, mesh_dim_names=names[1:])
    rows = torch.arange(process_group.world_size).view(-1, parts)
    groups = [
        dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=process_group.deadline)[0]
        for ranks in (rows.T.contiguous(), rows)
    ]
    return DeviceMesh.from_group(groups, device, mesh=rows, mesh_dim_names=names)


def parallelize(model: Any, mesh: DeviceMesh) -> Any:
    """Shard a model over the mesh, in place, and return it.

    Gradients are summed over ranks, not averaged: the losses of one step share a denominator. A
    mesh of one rank works as well. Parameters without memory (`models/loading.py`) get memory for
    this rank's rows, which are read afterwards.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that could be sharded.")
    dtype = compute_dtype(model)
    # A block's weights are gathered rounded, and its gradients are summed over the ranks in
    # float32, as one device sums those of micro-batches.
    rounding = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        rounding = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    may_fuse = why_not_fused(model.base_model.config) is None
    for block in blocks:
        read_as_held(block)
        _shard(block, mesh, rounding)
        if may_fuse:
            if not hasattr(block, BLOCK_FORWARD):
                setattr(block, BLOCK_FORWARD, types.MethodType(block_forward, block))
            register_fsdp_forward_method(block, BLOCK_FORWARD)
    in_blocks = {id(m) for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if id(m) not in in_blocks]
    _divide([m for m in outside if isinstance(m, nn.Embedding | nn.Linear)], mesh)
    for parameter in model.parameters():
        if not is_sharded(parameter) and not parameter.is_meta:
            # One that was read from a file is a view that keeps the file mapped as a whole.
            parameter.data = parameter.data.clone()
    for block in blocks:
        block._apply(partial(_with_memory, device=mesh.device_type))
    # The trunk is the root of its blocks, so that they share streams: a block's weights are
    # gathered while the block before it computes.
    trunk, held = model.base_model, {p for m in outside for p in m.parameters(recurse=False)}
    _shard(trunk, mesh, rounding, held)
    if may_fuse:
        setattr(trunk, TRUNK_FORWARD, types.MethodType(trunk_forward, trunk))
        register_fsdp_forward_method(trunk, TRUNK_FORWARD)
        setattr(trunk, TRUNK_FORWARD, _forgetting(trunk, getattr(trunk, TRUNK_FORWARD)))
    trunk.register_forward_hook(lambda trunk, *_: _forget_passes(trunk))
    return model


def _forgetting(trunk: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_and_forget(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        _forget_passes(trunk)
        return outputs

    return forward_and_forget


def _forget_passes(trunk: Any) -> None:
    """Have FSDP forget the forward passes of a frozen model.

    FSDP notes the order of the blocks of each forward pass, and forgets it after a backward pass. A
    reference or a reward model has none, so the notes would grow for as long as the run lasts. A
    model that is trained keeps them: its backward pass gathers weights ahead by them.
    """
    if any(parameter.requires_grad for parameter in trunk.parameters()):
        return
    if hasattr(trunk, "reset_iter_state"):
        trunk.reset_iter_state()
        return
    root = trunk._get_fsdp_state()  # torch before 2.13 has no public way
    root._comm_ctx.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        one = getattr(state, "_fsdp_param_group", None)
        for group in getattr(state, "_fsdp_param_groups", [one] if one is not None else []):
            group._post_forward_indices.clear()


def _shard(
    module: Any,
    mesh: DeviceMesh,
    rounding: MixedPrecisionPolicy,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """Have FSDP gather the parameters of a module around its forward pass, but for the `ignored`
    ones and those of modules inside it that were sharded before."""
    sharded = fully_shard(
        module, mesh=mesh, reshard_after_forward=True, mp_policy=rounding, ignored_params=ignored
    )
    assert isinstance(sharded, FSDPModule)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _with_memory(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor


def _divide(modules: list[Any], mesh: DeviceMesh) -> None:
    """Shard the weight of each module that has more rows than one; a weight that modules share
    stays one parameter."""
    sharded: dict[int, nn.Parameter] = {}
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for module in modules:
        matrix = module._parameters["weight"]  # as it is held, and not as it is read
        if len(matrix) == 1:
            continue
        if id(matrix) not in sharded:
            # Every rank has the whole matrix, or none has it: nothing is sent.
            placed: torch.Tensor = distribute_tensor(
                matrix.detach(), mesh, placements, src_data_rank=None
            )
            placed = _with_memory(placed, mesh.device_type)
            sharded[id(matrix)] = nn.Parameter(placed, requires_grad=matrix.requires_grad)
        module.weight = sharded[id(matrix)]
        # A class of its own for each module, since properties belong to classes: reading `weight`
        # gathers the matrix.
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"weight": property(_gathered_weight)})


def _gathered_weight(module: Any) -> torch.Tensor:
    """Return the whole weight of a module, in the dtype that the module computes in. Every rank
    must read it; the gradients that the ranks compute for it are summed, in float32 at least."""
    matrix: DTensor = module._parameters["weight"]
    dimensions = matrix.device_mesh.ndim
    whole = matrix.redistribute(
        placements=[Replicate()] * dimensions,
        forward_dtype=getattr(module, "_compute_dtype", None),
        backward_dtype=torch.promote_types(matrix.dtype, torch.float32),
    )
    weight: torch.Tensor = whole.to_local(grad_placements=[Partial()] * dimensions)
    return weight
