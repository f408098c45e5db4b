"""What rests in main memory is back when it is worked with, and nothing else changes."""

import contextlib
import json
import logging
import threading
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import Assembler, build
from quartet.config.toml import read_settings
from quartet.data.prompt_sampling import EveryPrompt
from quartet.distributed.offload import NO_OFFLOAD, Offloading, Transfer
from quartet.distributed.sharding import local_tensor, with_local
from quartet.errors import NonFinite
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.language_model import stop_ids
from quartet.recipes import recipe_path
from quartet.rewards.protocol import Weighted
from quartet.runtime.worker import Worker
from quartet.stages.rl import RLComponents, RLStage
from quartet.training.checksum import ReferenceChecksum
from quartet.training.state_tree import TENSORS, split_tensors
from tests.support import resting
from tests.support.pretended_device import CUDA, Pretended, on_device, pretended
from tests.support.tiny_run import SMALL, make_run
from tests.support.world import prompts, tokenizer
from tests.training.test_learner import learner as make_learner
from tests.training.test_learner import rollouts, weights

KINDS = {
    "ppo": ("reviews",),
    "frozen layers": (
        "reviews",
        "policy.frozen_layers=1",
        "policy.create.num_layers=2",
        "optim.ema=0.9",
    ),
    "the exact KL": ("reviews", 'algorithm.kl={type="in_loss", estimator="exact"}'),
    "no critic": ("sums",),
}
LONG = {
    "natural steps": ("reviews", 'recipe=["sft", "reward_model", "trpo"]', "algorithm.preset=trpo"),
    "adapters": ("reviews", 'policy.adapter={type="lora", rank=2}'),
    "rollouts meanwhile": ("reviews", "rollout.staleness=1"),
}


def numbers(run):
    lines = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["event"] == "metrics"]


@pytest.mark.parametrize(
    "kind",
    [
        "no critic",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "no critic"),
        *(pytest.param(kind, marks=pytest.mark.long) for kind in LONG),
    ],
)
@pytest.mark.slow
def test_a_run_whose_models_rest_is_the_run(kind, tmp_path, monkeypatch):
    recipe, *words = (KINDS | LONG)[kind]
    stages = (
        'recipe=["sft", "reward_model", "ppo"]' if recipe == "reviews" else 'recipe=["sft", "grpo"]'
    )
    words = [stages, "run.steps=4", "run.checkpoint_every=2", *words]
    plain = numbers(make_run(tmp_path / "plain", recipe, *words))
    bed, rested = resting.made(monkeypatch.setattr), []
    generate = NativeGenerator.generate

    def generated(*args, **kwargs):
        rested.append(bed.bytes)
        return generate(*args, **kwargs)

    monkeypatch.setattr(NativeGenerator, "generate", generated)
    monkeypatch.setattr(Assembler, "placement", property(lambda self: Offloading(self.device)))
    assert numbers(make_run(tmp_path / "rests", recipe, *words)) == plain and plain
    assert max(rested) > 0, "while answers are sampled, something rests"


def test_moments_that_were_saved_rest_too(monkeypatch):
    algorithm, rows = ALGORITHMS["ppo"], rollouts()

    def learnt(placement, halfway=None):
        """Weights after two updates; between them, `halfway` makes another learner of the state."""
        made = make_learner(placement=placement)
        for step in range(2):
            made.update(algorithm.experience(made.score(rows, algorithm)), algorithm)
            if step == 0 and halfway is not None:
                made = halfway(made)
        return torch.cat([w.flatten() for w in weights(made)])

    def resumed(made):
        other = make_learner(placement=made.placement)
        other.load_state(made.state())
        moments = [o.moments(p)["exp_avg"] for o in other.optimizers.values() for p in o.parameters]
        assert moments and all((m >= resting.ABSURD).all() for m in moments)
        return other

    plain = learnt(NO_OFFLOAD)
    resting.made(monkeypatch.setattr)
    assert torch.equal(learnt(Offloading(torch.device("cpu")), resumed), plain)


def test_a_copy_is_there_once_it_is_waited_for(monkeypatch):
    resting.made(monkeypatch.setattr)
    made, weights = Offloading(torch.device("cpu")), torch.nn.Linear(2, 2)
    true = weights.weight.detach().clone()
    made.register(weights)
    for _ in range(2):
        assert (weights.weight >= resting.ABSURD).all(), "it rests"
        with made.on_device(weights, wait=False):
            assert (weights.weight >= resting.ABSURD).all(), "it is on its way"
            made.ready(weights)
            assert torch.equal(weights.weight, true)
        with made.on_device(weights):
            assert torch.equal(weights.weight, true)


def test_threads_take_turns_at_what_rests(monkeypatch):
    """One asks how much rests, and another puts something there meanwhile."""
    bed, threads = resting.Bed(), []
    for number in (1.0, 2.0):
        bed.store(torch.full((2,), number))

    def meanwhile(tensor):
        if not threads:
            threads.append(threading.Thread(target=bed.store, args=(torch.full((2,), 3.0),)))
            threads[0].start()
            threads[0].join(0.2)
        return tensor

    monkeypatch.setattr(resting, "local_tensor", meanwhile)
    assert bed.bytes == 2 * 8
    threads[0].join()
    assert bed.bytes == 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [torch.nn.Module, torch.optim.Optimizer])
def test_a_wait_that_is_forgotten_is_noticed(forgotten, monkeypatch):
    """The reference is awaited before it scores, moments before the first step."""
    resting.made(monkeypatch.setattr)
    ready = Offloading.ready

    def some(placement, *objects):
        ready(placement, *(each for each in objects if not isinstance(each, forgotten)))

    algorithm, rows = ALGORITHMS["ppo"], rollouts()
    found = []
    for waits in (True, False):
        if not waits:
            monkeypatch.setattr(Offloading, "ready", some)
        made = make_learner(placement=Offloading(torch.device("cpu")))
        with contextlib.suppress(NonFinite):  # which absurd moments lead to
            for _ in range(2):
                batch = made.score(rows, algorithm)
                made.update(algorithm.experience(batch), algorithm)
        found.append(
            torch.cat([w.flatten() for w in weights(made)] + [batch.ref_logprobs.flatten()])
        )
    assert not torch.equal(*found)


class Streams:
    """CUDA's streams, which write down what is asked of them. A copy beside the main stream is absurd until it is waited for."""

    def __init__(self, patch):
        self.events, self.current = [], "main"
        self.coming, self.arrived = [], 0
        empty = torch.empty

        def page_locked(*args, pin_memory=False, **kwargs):
            if pin_memory:
                self.events.append("page-locked")
            return empty(*args, **kwargs)

        patch(torch, "empty", page_locked)
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "Stream", lambda device: self)
        patch(torch.cuda, "current_stream", lambda device: self)
        patch(torch.cuda, "stream", self.beside)
        patch(torch.Tensor, "record_stream", lambda *_: None, raising=False)
        to, copy = torch.Tensor.to, torch.Tensor.copy_

        def way(target):
            return "in" if target.device.type == "cuda" else "out"

        patch(torch.Tensor, "to", lambda *a, **k: self.copied("in", k) or to(*a, **k))

        def begun(target, source, **kwargs):
            self.copied(way(target), kwargs)
            if self.current == "main":
                return copy(target, source, **kwargs)
            self.coming.append(lambda: copy(target, source, **kwargs))
            return target.fill_(resting.ABSURD)

        patch(torch.Tensor, "copy_", begun)

    @contextlib.contextmanager
    def beside(self, stream):
        self.current = "beside"
        yield
        self.current = "main"

    def copied(self, way, kwargs):
        if kwargs.get("non_blocking"):
            self.events.append(f"{way}, {self.current}")

    def wait_stream(self, other):
        self.events.append("beside waits for main")

    def record_event(self):
        return self.arrived + len(self.coming)

    def wait_event(self, event):
        self.events.append("main waits until arrived")
        self.arrive(event)

    def synchronize(self):
        self.events.append("the host waits")
        self.arrive(self.record_event())

    def arrive(self, event):
        while self.arrived < event:
            self.coming.pop(0)()
            self.arrived += 1


def linear():
    return on_device(torch.nn.Linear(2, 2))


@contextlib.contextmanager
def two_ranks(rank=0):
    """A mesh of two ranks, of which the other is not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def shared_out(tensor, mesh):
    """The tensor in two parts, of which this rank's is on the device."""
    sharded = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
    return with_local(sharded, Pretended(local_tensor(sharded).clone()))


def momentum(mesh):
    """An optimizer with two moments on the device, in parts on a mesh, and the numbers that this rank has of them."""
    parameters = [torch.nn.Parameter(torch.zeros(n, 2)) for n in (4, 3)]
    optimizer = torch.optim.SGD(parameters, momentum=0.9)
    for p in parameters:
        whole = torch.randn_like(p)
        moment = Pretended(whole) if mesh is None else shared_out(whole, mesh)
        optimizer.state[p]["momentum_buffer"] = moment
    return optimizer, [part.inner.clone() for part in held(optimizer)]


def held(optimizer):
    return [local_tensor(state["momentum_buffer"]) for state in optimizer.state.values()]


def numbers_of(part):
    return part.inner if isinstance(part, Pretended) else part


def absurd(parts):
    return all(bool((numbers_of(part) == resting.ABSURD).all()) for part in parts)


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_copies_go_beside_and_are_awaited_by_the_stream_that_reads(form, monkeypatch):
    ranks = two_ranks() if form == "sharded" else contextlib.nullcontext()
    with ranks as mesh, pretended() as counts, monkeypatch.context() as patch:
        optimizer, true = momentum(mesh)
        streams = Streams(patch.setattr)
        counts.reset()
        made = Offloading(CUDA)
        made.register(optimizer)
        out = ["beside waits for main", "out, beside"]
        assert streams.events == 2 * ["page-locked", *out]
        rests = held(optimizer)
        assert all(type(part) is torch.Tensor for part in rests) and absurd(rests)
        streams.events.clear()
        for _ in range(2):
            with made.on_device(optimizer, wait=False):
                streams.events.append("other work")
                there = held(optimizer)
                assert all(type(part) is Pretended for part in there) and absurd(there)
                made.ready(optimizer)
                made.ready(optimizer)  # which waits for nothing more
                assert all(map(torch.equal, [part.inner for part in there], true))
                for part, numbers in zip(there, true, strict=True):
                    part.add_(1.0)
                    numbers.add_(1.0)
        into = ["beside waits for main", "in, beside"]
        once = [*2 * into, "other work", "main waits until arrived", *2 * out]
        assert streams.events == 2 * once, "with the buffers of the first time"
        again = [part.data_ptr() for part in held(optimizer)]
        assert again == [part.data_ptr() for part in rests]
        assert absurd(held(optimizer)), "the host has not waited"
        assert not counts.waits, "and nothing else made it wait"
        streams.events.clear()
        made.settle()
        assert streams.events == ["the host waits"]
        assert all(map(torch.equal, held(optimizer), true))


def test_memory_that_cannot_be_page_locked_is_said_once(monkeypatch, caplog):
    empty = torch.empty

    def refused(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("out of locked memory.\nmore")
        return empty(*args, **kwargs)

    with pretended() as counts, monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch, "empty", refused)
        optimizer = torch.optim.SGD(linear().parameters(), momentum=0.9)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        made = Offloading(CUDA)
        made.register(optimizer)
        rests = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert all(tensor.device.type == "cpu" for tensor in rests)
        counts.reset()
        with made.on_device(optimizer):
            pass
        waits = Counter({what: n for (what, _), n in counts.waits.items()})
        assert sum(counts.copies.values()) == 2 and waits == {"copy_ to the host": 2}
        again = [state["momentum_buffer"] for state in optimizer.state.values()]
        assert all(a is b for a, b in zip(rests, again, strict=True)), "each has one buffer"
    [sentence] = [record.getMessage() for record in caplog.records]
    assert "cannot be page-locked (out of locked memory)" in sentence and "ulimit -l" in sentence


def test_on_a_cpu_it_is_said_that_nothing_moves():
    asked = read_settings(
        recipe_path("sums"),
        [*SMALL, "policy.create.max_length=32", "run.offload=true", "run.device=cpu"],
    )
    assert any(
        note.startswith("run.offload = true moves nothing here")
        for note in build(asked.config).notes
    )


def test_on_a_cpu_nothing_moves():
    made = Offloading(torch.device("cpu"))
    weights = torch.nn.Linear(2, 2)
    before = weights.weight.data_ptr()
    made.register(weights)
    with made.on_device(weights, None, "whatever"), NO_OFFLOAD.on_device(weights):
        assert weights.weight.data_ptr() == before


# --- what waits for copies to main memory


class Late(Transfer):
    """A `Transfer` whose copies to main memory arrive when the device reads them again, or when the host waits."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.coming, self.waits = [], 0

    def store(self, tensor, buffer=None):
        buffer = torch.empty_like(tensor) if buffer is None else buffer
        self.coming.append((buffer, tensor.detach().clone()))
        buffer.fill_(resting.ABSURD)
        return buffer

    def load(self, tensor):
        self._arrive()
        return tensor.clone()

    def mark(self):
        return None

    def wait(self, mark):
        pass

    def settle(self):
        self.waits += 1
        self._arrive()

    def _arrive(self):
        for buffer, true in self.coming:
            buffer.copy_(true)
        self.coming = []


class Both(Late):
    """The same, whose copies to the device arrive only when they are waited for."""

    def load(self, tensor):
        self._arrive()
        return self.store(tensor)

    def wait(self, mark):
        self._arrive()


@pytest.mark.parametrize("rows", [4, 3])
def test_a_frozen_block_in_parts_is_on_its_way_and_one_in_unequal_parts_is_awaited(rows):
    """FSDP pads unequal parts: it copies them as soon as they are replaced."""
    with two_ranks(rank=1) as mesh:
        block = torch.nn.Linear(2, rows, bias=False).requires_grad_(False)
        block = fully_shard(block, mesh=mesh)
        true = local_tensor(block.weight).clone()
        made = Offloading(torch.device("cpu"), Both())
        made.register(block)
        for _ in range(2):
            with made.on_device(block, wait=False):
                assert absurd([local_tensor(block.weight)]) == (rows == 4)
                made.ready(block)
                assert torch.equal(local_tensor(block.weight), true)
        assert made.transfer.waits == 1 + (rows == 3), "its weights are not copied back"


class Length:
    name = "length"

    def score(self, rollouts):
        return [float(len(r.response_ids)) for r in rollouts]

    def token_scores(self, rollouts):
        return None


def stage(placement):
    """PPO in the tiny world, two steps of it."""

    def components(folder):
        made = make_learner(placement=placement)
        actor = made.models.actor
        generator = NativeGenerator(actor, tokenizer(), stop_ids(actor, tokenizer()), 0)
        return RLComponents(made, generator, [Weighted(Length(), 1.0)])

    sampling = Sampling(max_new_tokens=8, temperature=0.8)
    return RLStage(
        "ppo",
        prompts(4),
        tokenizer(),
        components,
        ALGORITHMS["ppo"],
        sampling,
        1,
        4,
        2,
        0,
        EveryPrompt(),
    )


def saved(placement, folder):
    """What a worker saves after each of two steps, by name; and how often the host had waited before the save and after it."""
    folder.mkdir()
    torch.manual_seed(0)
    worker, found, waits = Worker([stage(placement)], folder), [], []
    late = getattr(placement, "transfer", Late())
    worker.begin("ppo", None)
    begun = late.waits
    for number in (1, 2):
        worker.step()
        before = late.waits - begun
        (folder / str(number)).mkdir()
        worker.save(str(folder / str(number)))
        found.append(load_file(folder / str(number) / TENSORS))
        waits.append((before, late.waits - begun))
    return found, waits


def test_a_step_does_not_wait_for_moments_and_a_save_has_them(tmp_path):
    plain, _ = saved(NO_OFFLOAD, tmp_path / "plain")
    rests, waits = saved(Offloading(torch.device("cpu"), Late()), tmp_path / "rests")
    assert waits == [(0, 1), (1, 2)], "the host waits when it saves"
    assert any("exp_avg" in name for name in plain[0])
    for here, there in zip(plain, rests, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_copy_of_a_state_has_the_moments(tmp_path):
    runs = [
        stage(placement).begin(tmp_path)
        for placement in (NO_OFFLOAD, Offloading(torch.device("cpu"), Late()))
    ]
    for run in runs:
        next(run.steps(0))
    here, there = (split_tensors(run.copy_state())[1] for run in runs)
    assert any("exp_avg" in name for name in here) and here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


class Arriving(Transfer):
    """Copies to main memory that arrive when they are waited for."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.coming = []

    def store(self, tensor, buffer=None):
        buffer = torch.zeros_like(tensor)
        self.coming.append((buffer, tensor))
        return buffer

    def settle(self):
        while self.coming:
            buffer, tensor = self.coming.pop()
            buffer.copy_(tensor)


def test_the_weights_of_a_frozen_model_have_arrived_when_it_rests():
    made, placement = torch.nn.Linear(3, 2), Offloading(torch.device("cpu"), Arriving())
    mark = ReferenceChecksum(made)
    placement.register(made)
    assert made.weight.count_nonzero() == 6 and mark.now() == mark.value
