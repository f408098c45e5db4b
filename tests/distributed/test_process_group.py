"""Several processes train as one does: to rounding, whoever has the longer rows, with weights whole or in parts."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from quartet.distributed.balance import MicroBatch, micro_batches, shares
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from quartet.models.precision import compute_in
from tests.support import muon_rank, rounding_rank
from tests.support.rank import LENGTHS, run
from tests.support.world import model

LOOPBACK = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone():
    return run(SINGLE_PROCESS)


def ranks(folder, world, program, *words):
    """What each rank of a program of tests/support found."""
    where = [str(folder / "store"), str(folder), *words]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.support.{program}", str(rank), str(world), *where],
            env=LOOPBACK,
        )
        for rank in range(world)
    ]
    assert [process.wait(timeout=240) for process in started] == [0] * world
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        pytest.param("plain", 2, marks=pytest.mark.slow),
        pytest.param("sharded", 2, marks=pytest.mark.slow),
        pytest.param("rows", 4, marks=pytest.mark.slow),
        pytest.param("resting", 2, marks=pytest.mark.slow),
        pytest.param("plain", 4, marks=pytest.mark.long),
        pytest.param("sharded", 1, marks=pytest.mark.long),
        pytest.param("sharded", 4, marks=pytest.mark.long),
    ],
)
def test_losses_and_gradients_are_those_of_one_process(tmp_path, alone, kind, world):
    for found in ranks(tmp_path, world, "rank", kind):
        assert found.keys() == {
            name for name in alone if kind == "plain" or not name.startswith("trpo")
        }
        apart = {
            name: float((found[name].double() - alone[name].double()).abs().max()) for name in found
        }
        of_second_order = {name: apart.pop(name) for name in list(apart) if name.startswith("trpo")}
        assert max(apart.values()) < 1e-12, max(apart, key=apart.__getitem__)
        assert (
            max(of_second_order.values(), default=0) < 1e-9
        )  # conjugate gradients make more of the last digits


@pytest.mark.slow
def test_ranks_that_divide_by_what_they_have_themselves_are_found_out(tmp_path, alone):
    """The negative control: equal weights for ranks with unequal tokens."""
    found = ranks(tmp_path, 2, "rank", "selfish")[0]
    for stage in ("sft", "reward_model", "dpo", "ppo/actor", "ppo/critic", "grpo/actor"):
        apart = max(
            float((found[n] - alone[n]).abs().max())
            for n in alone
            if n.startswith(f"{stage}/0/") and alone[n].ndim
        )
        assert apart > 1e-3


def test_shares_are_balanced_whole_and_reckoned_alike_by_all():
    generator = torch.Generator().manual_seed(0)
    for world in (1, 2, 3, 8):
        lengths = torch.randint(1, 500, (37,), generator=generator).tolist()
        made = shares(lengths, world)
        assert sorted(row for rows in made for row in rows) == list(range(37))
        tokens = [sum(lengths[i] for i in rows) for rows in made]
        assert max(tokens) <= 4 / 3 * max(sum(lengths) / world, *lengths)
    assert shares([5, 3, 3, 1], 2) == [[0, 3], [1, 2]]


class Rank(ProcessGroup):
    def __init__(self, rank, world):
        self.rank, self.world_size = rank, world


def test_every_rank_goes_through_as_many_pieces():
    for world in (2, 3, 16):
        pieces = [list(Rank(rank, world).micro_batches(LENGTHS, 32)) for rank in range(world)]
        assert len({len(mine) for mine in pieces}) == 1
        counted = sorted(
            row for mine in pieces for piece in mine if piece.counts for row in piece.rows
        )
        assert counted == list(range(len(LENGTHS)))
    assert pieces[15] == [MicroBatch([1], counts=False)]  # the shortest row, to keep pace


def test_alone_the_pieces_are_the_micro_batches():
    assert [piece.rows for piece in SINGLE_PROCESS.micro_batches(LENGTHS, 32)] == micro_batches(
        LENGTHS, 32
    )
    assert all(piece.counts for piece in SINGLE_PROCESS.micro_batches(LENGTHS, 32))


def test_a_rank_whose_rows_did_not_use_a_parameter_adds_nothing_to_its_gradient(monkeypatch):
    """As with an expert that no token of a rank is sent to. A parameter that no rank used stays without a gradient."""
    used = [{0, 1}, {1, 2}]
    ranks = [[torch.nn.Parameter(torch.zeros(n)) for n in (2, 3, 2, 4)] for _ in used]
    for rank, parameters in enumerate(ranks):
        for number in used[rank]:
            parameters[number].grad = torch.full_like(parameters[number], rank + 1.0)
    barrier, sent = threading.Barrier(2, timeout=10), {}

    def all_reduce(tensor, group):
        sent[group] = tensor.clone()
        barrier.wait()
        assert sent[0].shape == sent[1].shape
        barrier.wait()
        tensor.copy_(sent[0] + sent[1])
        barrier.wait()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def reduce(rank):
        group = TorchProcessGroup(rank, 2)
        group.group = rank
        group.all_reduce_gradients(ranks[rank])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(reduce, range(2)))
    for parameters in ranks:
        first, second, third, fourth = (p.grad for p in parameters)
        assert first.tolist() == [1, 1] and second.tolist() == [3, 3, 3]
        assert third.tolist() == [2, 2] and fourth is None


@pytest.mark.slow
def test_a_model_in_parts_is_gathered_in_bfloat16_and_its_gradients_are_summed_in_float32(tmp_path):
    """Half of the bytes of float32 travel forwards, and no gradient is rounded before it is summed."""
    alone = compute_in(model(), torch.bfloat16)
    rounding_rank.loss(alone, slice(8)).backward()
    found, _ = ranks(tmp_path, 2, "rounding_rank")
    for name, p in alone.named_parameters():
        assert found[name].dtype == torch.float32, name
        error = (found[name] - p.grad).norm() / p.grad.norm().clamp(min=1e-3)
        assert error < 0.02, name
    told = json.loads((tmp_path / "0.json").read_text())
    sent = told["calls"]
    # Each of two blocks is gathered for its forward and for its backward pass and its gradient
    # summed once; the matrix of embedding and head is gathered where it is read. The first block
    # is gathered for the backward pass before the second block's gradient is on its way.
    assert sent == {
        "allgather_base bfloat16": 4,
        "reduce_scatter_base float32": 2,
        "all_gather_into_tensor bfloat16": 2,
        "reduce_scatter_tensor float32": 2,
    }
    backward = [key.split()[0] for key in told["order"] if "_base" in key][2:]
    assert backward == ["allgather_base"] * 2 + ["reduce_scatter_base"] * 2
    blocks = sum(p.numel() for n, p in alone.named_parameters() if ".layers." in n)
    assert told["bytes"]["allgather_base bfloat16"] >= 2 * 2 * blocks
    assert told["bytes"]["reduce_scatter_base float32"] >= 4 * blocks
    assert {key.split()[1] for key in sent if "allgather" in key or "all_gather" in key} == {
        "bfloat16"
    }
    assert {key.split()[1] for key in sent if "reduce_scatter" in key} == {"float32"}


@pytest.mark.slow
def test_muon_steps_matrices_in_parts_as_it_does_whole(tmp_path):
    """To the rounding of its products in bfloat16."""
    parts = ranks(tmp_path, 2, "muon_rank")
    whole = muon_rank.steps()
    for found in parts:
        for i in range(len(muon_rank.SHAPES)):
            moved = (whole[f"end/{i}"] - whole[f"start/{i}"]).norm()
            assert float((found[f"end/{i}"] - whole[f"end/{i}"]).norm() / moved) < 0.02
