"""Generation by servers, against a fake that speaks as vLLM does."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import uvicorn

from quartet.generation.led import Led
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.vllm import ServersGone, VllmGenerator
from quartet.models.language_model import masked_logprobs, save
from quartet.models.padding import response_mask, right_pad
from quartet.team import ALONE
from tests.fake_vllm import Engine, make_app
from tests.world import model, prompts, tokenizer

SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder, pause=0.0):
    engine, port = Engine(folder, pause), free_port()
    server = uvicorn.Server(uvicorn.Config(make_app(engine), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", engine
    engine.go_on()
    server.should_exit = True
    thread.join()


@pytest.fixture
def folder(tmp_path):
    save(model(), tokenizer(), tmp_path / "first")
    return tmp_path


@pytest.fixture
def generator():
    made = []

    def make(folder, urls):
        made.append(speaking_to(folder, urls))
        return made[-1]

    yield make
    for one in made:
        one.close()


def speaking_to(folder, urls):
    def write(place, tensors):
        other = model()
        other.load_state_dict(dict(tensors))
        save(other, tokenizer(), place)

    stops = frozenset({tokenizer().eos_token_id})
    made = VllmGenerator(urls, write, folder / "weights", tokenizer(), stops, seed=0, timeout=20.0)
    made.load_weights(Weights(0, model().state_dict()))
    return made


def own_logprobs(made, rollouts):
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts])
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts])
    mask = response_mask(starts, lengths, tokens.shape[1])
    with torch.no_grad():
        found = masked_logprobs(made, tokens, mask, SAMPLING.temperature)
    return [found[i][mask[i]].tolist() for i in range(len(rollouts))]


def test_ids_go_out_and_ids_and_logprobs_come_back_that_are_ours(folder, generator):
    with served(folder / "first") as (url, engine):
        made = generator(folder, [url])
        rollouts = made.generate(prompts(5), SAMPLING, 2)
    assert [r.id for r in rollouts] == [f"tiny:{i}/{n}" for i in range(5) for n in range(2)]
    assert [r.group for r in rollouts] == [i for i in range(5) for _ in range(2)]
    for rollout, ours in zip(rollouts, own_logprobs(model(), rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
        assert rollout.versions == (0,) * len(rollout.response_ids) and rollout.policy_version == 0
        ended = rollout.response_ids[-1] == tokenizer().eos_token_id
        assert rollout.finish_reason == ("stop" if ended else "length") and (ended or len(rollout.response_ids) == 12)
        assert rollout.response.strip() == tokenizer().decode(rollout.response_ids, skip_special_tokens=True).strip()
    assert {tuple(asked["prompt"]) for asked in engine.asked} == {p.ids for p in prompts(5)}


def test_what_is_sampled_does_not_depend_on_who_sampled_it(folder, generator):
    with served(folder / "first") as (one, _), served(folder / "first") as (two, engine):
        alone = generator(folder / "a", [one]).generate(prompts(6), SAMPLING)
        both = generator(folder / "b", [one, two]).generate(prompts(6), SAMPLING)
        assert [r.response_ids for r in alone] == [r.response_ids for r in both] and engine.asked
        again = generator(folder / "c", [one])
        again.load_state({"version": 0, "calls": 1})
        assert [r.response_ids for r in again.generate(prompts(6), SAMPLING)] != [r.response_ids for r in alone]


def test_weights_pushed_in_the_middle_divide_an_answer_into_versions(folder, generator):
    """Each token's log-prob is that of the version it is said to be of."""
    with served(folder / "first", pause=0.03) as (url, _):
        made = generator(folder, [url])
        found = []
        sampling = threading.Thread(target=lambda: found.extend(made.generate(prompts(6), SAMPLING)))
        sampling.start()
        time.sleep(0.25)
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        sampling.join()
    old, new = own_logprobs(model(), found), own_logprobs(model(seed=7), found)
    spans = {v for r in found for v in r.versions}
    assert spans == {0, 1}, "the push came before or after everything"
    for rollout, before, after in zip(found, old, new, strict=True):
        assert list(rollout.versions) == sorted(rollout.versions) and rollout.policy_version == rollout.versions[0]
        for place, version in enumerate(rollout.versions):
            assert rollout.logprobs[place] == pytest.approx((before, after)[version][place], abs=1e-4)
    assert len(list((folder / "weights").glob("[0-9]*"))) == 2


def started(port, folder, *more):
    process = subprocess.Popen([sys.executable, "-m", "tests.fake_vllm", str(port), str(folder), *more])
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.05)


def test_a_server_that_is_killed_loses_no_answer_and_is_given_the_newest_weights_when_it_is_back(folder, generator):
    ports = [free_port(), free_port()]
    processes = [started(port, folder / "first", "0.03") for port in ports]
    try:
        made = generator(folder, [f"http://127.0.0.1:{port}" for port in ports])
        threading.Timer(0.2, lambda: os.kill(processes[0].pid, signal.SIGKILL)).start()
        rollouts = made.generate(prompts(8), SAMPLING, 2)
        assert [r.id for r in rollouts] == [f"tiny:{i}/{n}" for i in range(8) for n in range(2)], "none lost, none twice"
        assert made.servers[0].failed and not made.servers[1].failed
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        processes[0].wait()
        processes[0] = started(ports[0], folder / "first")
        after = made.generate(prompts(8), SAMPLING, 2)
        assert made.servers[0].version == 1 and made.servers[0].failed is None
        for rollout, ours in zip(after, own_logprobs(model(seed=7), after), strict=True):
            assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_when_no_server_answers_it_is_said_which_and_why(folder, generator):
    url = f"http://127.0.0.1:{free_port()}"
    made = generator(folder, [url])
    made.timeout = 0.2
    with pytest.raises(
        ServersGone, match=rf"no generation server answered for 0.2 s \({url}: .*refused.*\)\. Start one, and resume"
    ):
        made.generate(prompts(1), SAMPLING)


def test_one_rank_asks_for_all(folder, generator):
    with served(folder / "first") as (url, _):
        made = generator(folder, [url])
        led = Led(made, ALONE)
        rollouts = led.generate(prompts(2), SAMPLING)
        led.load_weights(Weights(1, model(seed=7).state_dict()))
        assert made.version == 1 and led.state() == {"version": 1, "calls": 1}
        assert [r.prompt for r in rollouts] == prompts(2) and isinstance(rollouts[0].response_ids, tuple)
