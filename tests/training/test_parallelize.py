"""What FSDP keeps of a model in parts from one forward pass to the next."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from quartet.models.actor_critic import freeze
from quartet.models.forward import masked_logprobs
from quartet.training.parallelize import parallelize
from tests.distributed.test_offload import two_ranks
from tests.support.world import model

TOKENS = torch.tensor([[5, 6, 7, 8]])
MASK = torch.tensor([[False, True, True, True]])


def groups_of(state):
    """The groups of parameters of a module: before torch 2.13 there was at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def kept(policy):
    """How many forward passes of blocks FSDP has noted: for all blocks together, and for each."""
    states = policy.base_model._get_fsdp_state()._state_ctx.all_states
    groups = [group for state in states for group in groups_of(state)]
    order = policy.base_model._get_fsdp_state()._comm_ctx.post_forward_order
    return len(order), {len(group._post_forward_indices) for group in groups}


def passes(policy, way, count):
    for _ in range(count):
        fused = way == "fused"
        outputs = masked_logprobs(policy, TOKENS, MASK) if fused else policy(TOKENS).logits
    return outputs


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("way", ["fused", "plain"])
def test_a_frozen_model_keeps_nothing_of_its_forward_passes(way, public, monkeypatch):
    if not public:  # as before torch 2.13
        monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    with two_ranks() as mesh:
        reference = parallelize(freeze(model()), mesh)
        with torch.no_grad():
            passes(reference, way, 3)
        assert kept(reference) == (0, {0})


def test_a_model_that_is_trained_keeps_the_order_until_its_backward_pass():
    with two_ranks() as mesh:
        policy = parallelize(model(), mesh)
        outputs = passes(policy, "plain", 2)
        assert kept(policy) == (4, {2})
        outputs.sum().backward()
        assert kept(policy) == (0, {0})
