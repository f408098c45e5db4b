"""What rests in main memory is back when it is worked with, and nothing else changes."""

import contextlib
import json
import logging
from collections import Counter

import pytest
import torch

from quartet.algorithms.presets import ALGORITHMS
from quartet.assembly import Assembler, build
from quartet.config.toml import read_settings
from quartet.distributed.offload import NO_OFFLOAD, Offloading
from quartet.errors import NonFinite
from quartet.generation.native import NativeGenerator
from quartet.recipes import recipe_path
from tests.support import resting
from tests.support.pretended_device import CUDA, on_device, pretended
from tests.support.tiny_run import SMALL, make_run
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
    """CUDA's streams, which write down what is asked of them."""

    def __init__(self, patch):
        self.events, self.current = [], "main"
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
        patch(torch.Tensor, "copy_", lambda *a, **k: self.copied(way(a[0]), k) or copy(*a, **k))

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
        return "arrived"

    def wait_event(self, event):
        self.events.append(f"main waits until {event}")

    def synchronize(self):
        self.events.append("the host waits")


def linear():
    return on_device(torch.nn.Linear(2, 2))


def test_copies_go_beside_and_are_awaited_by_the_stream_that_reads(monkeypatch):
    with pretended(), monkeypatch.context() as patch:
        streams = Streams(patch.setattr)
        optimizer = torch.optim.SGD(linear().parameters(), momentum=0.9)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        made = Offloading(CUDA)
        streams.events.clear()
        made.register(optimizer)
        out = ["beside waits for main", "out, beside"]
        assert streams.events == 2 * ["page-locked", *out]
        streams.events.clear()
        for _ in range(2):
            with made.on_device(optimizer, wait=False):
                streams.events.append("other work")
                made.ready(optimizer)
                made.ready(optimizer)  # which waits for nothing more
        into = ["beside waits for main", "in, beside"]
        once = [*2 * into, "other work", "main waits until arrived", *2 * out]
        assert streams.events == 2 * once, "with the buffers of the first time"
        streams.events.clear()
        made.settle()
        assert streams.events == ["the host waits"]


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
