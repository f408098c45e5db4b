"""Weights that travel to servers through a group of collectives, against a fake of vLLM's workers with gloo for NCCL."""

import threading
import time

import pytest
import torch

from quartet.assembly.generators import Generators, _in_a_folder
from quartet.config.toml import ConfigError, read_settings
from quartet.distributed.sharding import GatheredWeights
from quartet.generation import transfer
from quartet.generation.dialects import DIALECTS
from quartet.generation.protocol import Weights
from quartet.generation.servers import ServedGenerator
from quartet.generation.transfer import TransferFailed, WeightTransfer
from quartet.models.adapters import POLICY, adapter_parameters, add_adapter, merged_state
from quartet.models.language_model import ModelError, load_model, save
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.recipes import recipe_path
from tests.generation.test_servers import SAMPLING, own_logprobs, served
from tests.support.fake_server import Refused
from tests.support.fake_transfer import Receiver, open_gloo
from tests.support.world import model, prompts, tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    save(model(), tokenizer(), tmp_path / "first")
    return tmp_path


@pytest.fixture
def sending(folder):
    made = []

    def make(urls, dtype=torch.float32, named=dict, timeout=20.0):
        made.append(
            ServedGenerator(
                DIALECTS["vllm"],
                urls,
                lambda *_: pytest.fail("a folder was written"),
                folder / "weights",
                tokenizer(),
                frozenset({tokenizer().eos_token_id}),
                seed=0,
                timeout=timeout,
                transfer=WeightTransfer(named, dtype, CPU, open_gloo),
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_server_samples_from_the_weights_that_were_sent_to_it(folder, sending):
    with served(folder / "first") as (url, engine):
        made = sending([url])
        for version, seed in enumerate((3, 7)):
            made.load_weights(Weights(version, model(seed=seed).state_dict()))
            found = made.generate(prompts(4), SAMPLING)
            assert {v for r in found for v in r.versions} == {version}
            for rollout, ours in zip(found, own_logprobs(model(seed=seed), found), strict=True):
                assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
    assert engine.told.count("/init_weight_transfer_engine") == 1, "one group for the whole run"
    assert made.transfer.held is None, "what is trained next is not held"


def test_weights_sent_in_the_middle_divide_an_answer_into_versions(folder, sending):
    with served(folder / "first", pause=0.03) as (url, _):
        made, found = sending([url]), []
        made.load_weights(Weights(0, model().state_dict()))
        sampling = threading.Thread(
            target=lambda: found.extend(made.generate(prompts(6), SAMPLING))
        )
        sampling.start()
        time.sleep(0.25)
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        sampling.join()
    old, new = own_logprobs(model(), found), own_logprobs(model(seed=7), found)
    assert {v for r in found for v in r.versions} == {0, 1}
    for rollout, before, after in zip(found, old, new, strict=True):
        for place, version in enumerate(rollout.versions):
            expected = (before, after)[version][place]
            assert rollout.logprobs[place] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("limit", [1, 3_000, 2**28])
def test_chunks_end_where_the_workers_end_them(monkeypatch, workers, limit):
    """A chunk ends with the tensor that exceeds the limit: with 1 byte, each tensor travels alone."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", limit)
    receiver, tensors = Receiver(workers), model(seed=5).state_dict()
    sender = WeightTransfer(dict, torch.bfloat16, CPU, open_gloo)
    sender.hold(tensors)
    sender.push("server", 4, asking(receiver))
    assert receiver.version == "4" and set(receiver.received) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(receiver.received[name], tensor.bfloat16())
    sizes = [2 * x.numel() for x in tensors.values()]
    assert receiver.chunks == {1: len(sizes), 2**28: 1}.get(limit, receiver.chunks)
    assert 1 < receiver.chunks < len(sizes) or limit != 3_000
    sender.close()


def asking(receiver):
    def ask(method, path, body):
        paths = {
            "/get_world_size": lambda *_: {"world_size": receiver.workers},
            "/init_weight_transfer_engine": receiver.init,
            "/start_weight_update": receiver.start,
            "/update_weights": receiver.update,
            "/finish_weight_update": receiver.finish,
            "/update_weight_version": lambda asked, _: (
                setattr(receiver, "version", asked["new_version"]) or {"success": True}
            ),
        }
        return paths[path](body, None)

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/init_weight_transfer_engine", "/update_weights", "/finish_weight_update"]
)
def test_a_server_that_refuses_is_left_alone_and_gets_the_next_weights(folder, sending, path):
    """Its group is given up; the other server has its weights. With the next weights it gets a
    group anew."""
    with served(folder / "first") as (one, bad), served(folder / "first") as (two, good):

        def refuse(*_):
            raise Refused("no", 500)

        bad.refuse[path] = refuse
        made = sending([one, two])
        made.load_weights(Weights(0, model(seed=3).state_dict()))
        assert "answered 500" in made.servers[0].failed and made.servers[1].failed is None
        found = made.generate(prompts(3), SAMPLING)
        assert not bad.asked and good.asked
        for rollout, ours in zip(found, own_logprobs(model(seed=3), found), strict=True):
            assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
        bad.refuse.clear()
        assert bad.receiver.updating == (path != "/init_weight_transfer_engine")
        made.servers[0].again = 0.0
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        assert [server.version for server in made.servers] == [1, 1]


def test_a_group_that_breaks_says_so():
    class Broken:
        def allreduce(self, tensors):
            raise RuntimeError("peer is gone")

        broadcast = allreduce

        def abort(self):
            self.aborted = True

    group = Broken()
    sender = WeightTransfer(dict, torch.float32, CPU, lambda *_: (group, lambda: b"x"))
    sender.hold({"w": torch.ones(2)})
    with pytest.raises(TransferFailed, match="lost its connection for weights .peer is gone"):
        sender.push("server", 0, lambda *_: {"world_size": 1})


@pytest.mark.parametrize("workers", [None, 0, "two"])
def test_a_server_that_does_not_tell_its_workers_is_refused(workers):
    sender = WeightTransfer(dict, torch.float32, CPU, open_gloo)
    sender.hold({"w": torch.ones(2)})
    with pytest.raises(TransferFailed, match="does not say how many workers"):
        sender.push("server", 0, lambda *_: {"world_size": workers})


def test_what_is_sent_is_what_a_folder_would_have(tmp_path):
    """Adapters merged, a tied head once, in the dtype that the policy computes in."""
    policy = add_adapter(model(), Lora(rank=2), POLICY, seed=0)
    with torch.no_grad():
        for p in adapter_parameters(policy, POLICY):
            p.add_(0.1)
    save(policy, tokenizer(), tmp_path)
    expected = load_model(tmp_path).state_dict()
    sent = _in_a_folder(policy, GatheredWeights(policy))
    assert set(sent) <= set(expected)
    for name in set(expected) - set(sent):
        assert any(torch.equal(expected[name], x) for x in sent.values()), name
    for name, tensor in sent.items():
        assert torch.equal(tensor, expected[name])
    assert len(sent) == len({t.data_ptr() for t in merged_state(policy).values()})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("adapter=true", "generator.adapter = true: generator.transfer"),
        ("sleep=true", "generator.sleep = true: the servers share the GPUs"),
    ],
)
def test_what_does_not_go_together_is_said(more, sentence):
    words = [f"generator={{type='vllm', urls=['http://x'], transfer='nccl', {more}}}"]
    words += ["policy.adapter={rank=2}"]
    with pytest.raises(ConfigError, match=sentence):
        read_settings(recipe_path("reviews"), words, "recipe reviews")


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ModelError, match=r"sends weights from GPU to GPU, and this run is on cpu"):
        Generators._transfer(None, model())


def test_half_precision_is_what_travels():
    policy = model()
    compute_in(policy, torch.bfloat16)
    sent = _in_a_folder(policy, GatheredWeights(policy))
    sender = WeightTransfer(dict, torch.bfloat16, CPU, open_gloo)
    receiver = Receiver()
    sender.hold(sent)
    sender.push("server", 0, asking(receiver))
    assert {x.dtype for x in receiver.received.values()} == {torch.bfloat16}
    sender.close()


def test_what_is_merged_waits_in_half_precision():
    """It is on the policy's device until it was sent: of 7B parameters in float32, that would be 28 GB."""
    policy = add_adapter(model(), Lora(rank=2), POLICY, seed=0)
    with torch.no_grad():
        for p in adapter_parameters(policy, POLICY):
            p.add_(0.1)
    compute_in(policy, torch.bfloat16)
    exact = merged_state(policy)
    changed = {name for name, tensor in exact.items() if tensor.dtype == torch.float32}
    sent = _in_a_folder(policy, GatheredWeights(policy))
    assert len(changed) > 4 and changed <= sent.keys()
    for name in changed:
        assert torch.equal(sent[name], exact[name].bfloat16())
