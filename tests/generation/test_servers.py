"""Generation by servers, against a fake that speaks as vLLM and SGLang do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial

import httpx
import pytest
import torch
import uvicorn

from quartet.assembly import build
from quartet.config.toml import ConfigError, read_settings
from quartet.distributed.process_group import SINGLE_PROCESS
from quartet.distributed.sharding import GatheredWeights
from quartet.generation.dialects import DIALECTS, Piece
from quartet.generation.protocol import Weights
from quartet.generation.rank_zero import RankZeroGenerator
from quartet.generation.sampling import Sampling
from quartet.generation.scripted import ScriptedGenerator
from quartet.generation.servers import ServedGenerator, ServersAwake, ServersGone
from quartet.io.http_client import IDLE
from quartet.models.adapters import (
    POLICY,
    adapter_parameters,
    add_adapter,
    in_adapter,
    save_adapter,
)
from quartet.models.forward import masked_logprobs
from quartet.models.language_model import save
from quartet.models.lora import Lora
from quartet.models.padding import response_mask, right_pad
from quartet.recipes import recipe_path
from tests.support.fake_server import Engine, Refused, free_port, make_app
from tests.support.tiny_run import SMALL_REVIEWS, make_run
from tests.support.world import model, prompts, tokenizer

SAMPLING = Sampling(max_new_tokens=12, temperature=0.9)


@contextmanager
def served(folder, pause=0.0, kind="vllm"):
    engine, port = Engine(folder, pause), free_port()
    server = uvicorn.Server(
        uvicorn.Config(make_app(engine, kind), host="127.0.0.1", port=port, log_level="error")
    )
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

    def make(*args, **more):
        made.append(speaking_to(*args, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def speaking_to(folder, urls, kind="vllm", **more):
    def write(place, tensors):
        other = model()
        other.load_state_dict(dict(tensors))
        save(other, tokenizer(), place)

    stops = frozenset({tokenizer().eos_token_id})
    made = ServedGenerator(
        DIALECTS[kind],
        urls,
        write,
        folder / "weights",
        tokenizer(),
        stops,
        seed=0,
        timeout=20.0,
        **more,
    )
    made.load_weights(Weights(0, model().state_dict()))
    return made


def own_logprobs(made, rollouts):
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in rollouts])
    starts = torch.tensor([len(r.prompt.ids) for r in rollouts])
    mask = response_mask(starts, lengths, tokens.shape[1])
    with torch.no_grad():
        found = masked_logprobs(made, tokens, mask, SAMPLING.temperature)
    return [found[i][mask[i]].tolist() for i in range(len(rollouts))]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_ids_go_out_and_ids_and_logprobs_come_back_that_are_ours(folder, generator, kind):
    with served(folder / "first", kind=kind) as (url, engine):
        made = generator(folder, [url], kind)
        rollouts = made.generate(prompts(5), SAMPLING, 2)
    assert [r.id for r in rollouts] == [f"tiny:{i}/{n}" for i in range(5) for n in range(2)]
    assert [r.group for r in rollouts] == [i for i in range(5) for _ in range(2)]
    for rollout, ours in zip(rollouts, own_logprobs(model(), rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
        assert rollout.versions == (0,) * len(rollout.response_ids) and rollout.policy_version == 0
        ended = rollout.response_ids[-1] == tokenizer().eos_token_id
        assert rollout.finish_reason == ("stop" if ended else "length") and (
            ended or len(rollout.response_ids) == 12
        )
        assert (
            rollout.response.strip()
            == tokenizer().decode(rollout.response_ids, skip_special_tokens=True).strip()
        )
    assert set(map(tuple, engine.asked)) == {p.ids for p in prompts(5)}


def test_what_is_sampled_does_not_depend_on_who_sampled_it(folder, generator):
    with served(folder / "first") as (one, _), served(folder / "first") as (two, engine):
        alone = generator(folder / "a", [one]).generate(prompts(6), SAMPLING)
        both = generator(folder / "b", [one, two]).generate(prompts(6), SAMPLING)
        assert [r.response_ids for r in alone] == [r.response_ids for r in both] and engine.asked
        again = generator(folder / "c", [one])
        again.load_state({"version": 0, "calls": 1})
        assert [r.response_ids for r in again.generate(prompts(6), SAMPLING)] != [
            r.response_ids for r in alone
        ]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_weights_pushed_in_the_middle_divide_an_answer_into_versions(folder, generator, kind):
    """Each token's log-prob is that of the version it is said to be of."""
    with served(folder / "first", pause=0.03, kind=kind) as (url, _):
        made = generator(folder, [url], kind)
        found = []
        sampling = threading.Thread(
            target=lambda: found.extend(made.generate(prompts(6), SAMPLING))
        )
        sampling.start()
        time.sleep(0.25)
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        sampling.join()
    old, new = own_logprobs(model(), found), own_logprobs(model(seed=7), found)
    spans = {v for r in found for v in r.versions}
    assert spans == {0, 1}, "the push came before or after everything"
    for rollout, before, after in zip(found, old, new, strict=True):
        assert (
            list(rollout.versions) == sorted(rollout.versions)
            and rollout.policy_version == rollout.versions[0]
        )
        for place, version in enumerate(rollout.versions):
            assert rollout.logprobs[place] == pytest.approx(
                (before, after)[version][place], abs=1e-4
            )
    assert len(list((folder / "weights").glob("[0-9]*"))) == 2


def adapted(seed):
    """The tiny model under an adapter that changes what it says, by 0.5 a token; a stronger one makes more of rounding, too."""
    made = add_adapter(model(), Lora(rank=2), POLICY, seed=0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(made, POLICY):
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_base_goes_once_and_then_adapters_alone(folder, generator, kind):
    """Also in the middle of answers; and to a server that was started with another model, or is started anew."""
    save(model(seed=3), tokenizer(), folder / "another")
    policies = [adapted(1), adapted(2)]

    def write(place, tensors):
        policy = policies[int(tensors["which"])]
        save_adapter(policy, POLICY, place, policy.state_dict())

    write_base = lambda place, tensors: save(model(), tokenizer(), place)  # noqa: E731
    with served(folder / "another", pause=0.03, kind=kind) as (url, engine):
        stops = frozenset({tokenizer().eos_token_id})
        shared = folder / "weights"
        made = ServedGenerator(
            DIALECTS[kind],
            [url],
            write,
            shared,
            tokenizer(),
            stops,
            seed=0,
            timeout=20.0,
            save_base=write_base,
        )
        made.load_weights(Weights(0, {"which": torch.tensor(0)}))
        found = []
        sampling = threading.Thread(
            target=lambda: found.extend(made.generate(prompts(6), SAMPLING))
        )
        sampling.start()
        time.sleep(0.25)
        made.load_weights(Weights(1, {"which": torch.tensor(1)}))
        sampling.join()
        assert list(engine.adapters) == ["policy-1"], "the older one was taken off"
        engine.read(
            folder / "another"
        )  # it was started anew, and says only that there is no such adapter
        again = made.generate(prompts(2), SAMPLING)
        made.close()
    pushes = [path for path in engine.told if path == DIALECTS[kind].read(shared, 0)[0].path]
    assert len(pushes) == 2, "the base goes to a server once for each time that it begins"
    assert {v for r in found for v in r.versions} == {0, 1}, (
        "the push came before or after everything"
    )
    old, new = own_logprobs(policies[0], found), own_logprobs(policies[1], found)
    for rollout, before, after in zip(found, old, new, strict=True):
        for place, version in enumerate(rollout.versions):
            assert rollout.logprobs[place] == pytest.approx(
                (before, after)[version][place], abs=1e-4
            )
    for rollout, ours in zip(again, own_logprobs(policies[1], again), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
    assert sum(f.stat().st_size for f in (shared / "00000001").rglob("*")) < 0.5 * sum(
        f.stat().st_size for f in (shared / "base").rglob("*")
    )


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_is_asked_while_a_server_stands_still_is_of_the_weights_that_come(
    folder, generator, kind
):
    """Asked for under version 0, held, begun under version 1."""
    with served(folder / "first", kind=kind) as (url, engine):
        made = generator(folder, [url], kind)
        engine.stop()
        found = []
        sampling = threading.Thread(
            target=lambda: found.extend(made.generate(prompts(3), SAMPLING))
        )
        sampling.start()
        while len(engine.asked) < 3:
            time.sleep(0.01)
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        sampling.join()
    assert {v for r in found for v in r.versions} == {1}
    for rollout, ours in zip(found, own_logprobs(model(seed=7), found), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["generator={type='vllm', urls=['http://x'], adapter=true}"],
            "generator.adapter = true: the policy is none",
        ),
        (
            ["generator={type='sglang', urls=['http://x']}", "rollout.top_p=0.9"],
            'generator.type = "sglang": tells log-probs',
        ),
        (
            ["generator={type='vllm', urls=['http://x'], sleep=true}", "rollout.staleness=1"],
            "rollout.staleness = 1: with generator.sleep = true the servers sleep while",
        ),
    ],
)
def test_what_servers_cannot_do_is_said(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_settings(recipe_path("reviews"), words, "recipe reviews")


def started(port, folder, *more):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_server", str(port), str(folder), *more]
    )
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_is_killed_loses_no_answer_and_is_given_the_newest_weights_when_it_is_back(
    folder, generator
):
    ports = [free_port(), free_port()]
    processes = [started(port, folder / "first", "0.03") for port in ports]
    try:
        made = generator(folder, [f"http://127.0.0.1:{port}" for port in ports])
        threading.Timer(0.2, lambda: os.kill(processes[0].pid, signal.SIGKILL)).start()
        rollouts = made.generate(prompts(8), SAMPLING, 2)
        assert [r.id for r in rollouts] == [f"tiny:{i}/{n}" for i in range(8) for n in range(2)], (
            "none lost, none twice"
        )
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


def test_a_server_that_does_not_say_which_weights_a_token_is_from_is_of_no_use():
    reply = {"choices": [{"token_ids": [4, 5], "finish_reason": "stop"}]}
    reply["choices"][0]["logprobs"] = {
        "content": [{"token_id": 4, "logprob": -1.0}, {"token_id": 5, "logprob": -2.0}]
    }
    with pytest.raises(ValueError, match="does not say which weights"):
        DIALECTS["vllm"].written(reply)
    reply["choices"][0]["weight_versions"] = [
        {"version": "7", "start": 0, "end": 1},
        {"version": "8", "start": 1, "end": 2},
    ]
    assert DIALECTS["vllm"].written(reply) == Piece([4, 5], [-1.0, -2.0], [7, 8], "stop")
    meta = {
        "output_token_logprobs": [[-1.0, 4, None]],
        "weight_version": "7",
        "finish_reason": {"type": "length"},
    }
    assert DIALECTS["sglang"].written({"meta_info": meta}) == Piece([4], [-1.0], [7], "length")


def test_when_no_server_answers_it_is_said_which_and_why(folder, generator):
    url = f"http://127.0.0.1:{free_port()}"
    made = generator(folder, [url])
    made.timeout = 0.2
    with pytest.raises(
        ServersGone,
        match=rf"no generation server answered for 0.2 s \({url}: .*refused.*\)\. Start one, and resume",
    ):
        made.generate(prompts(1), SAMPLING)


def test_an_answer_that_a_server_cuts_short_is_no_answer(folder, generator):
    with served(folder / "first") as (url, engine):
        made = generator(folder, [url])
        made.timeout, engine.context = 1.0, 8
        with pytest.raises(
            ServersGone,
            match=r"it wrote 2 of 12 tokens: does it read fewer than a prompt and an answer have",
        ):
            made.generate(prompts(4)[3:], SAMPLING)  # of two, one would be taken back half written


def test_one_rank_asks_for_all(folder, generator):
    with served(folder / "first") as (url, _):
        made = generator(folder, [url])
        led = RankZeroGenerator(made, SINGLE_PROCESS)
        rollouts = led.generate(prompts(2), SAMPLING)
        led.load_weights(Weights(1, model(seed=7).state_dict()))
        assert made.version == 1 and led.state() == {"version": 1, "calls": 1}
        assert [r.prompt for r in rollouts] == prompts(2) and isinstance(
            rollouts[0].response_ids, tuple
        )


def test_adapters_that_go_alone_are_all_that_is_put_together(monkeypatch):
    policy, read, pushed = model(), [], []
    add_adapter(policy, Lora(rank=2), POLICY, seed=0)
    weights, get = Weights(1, GatheredWeights(policy)), GatheredWeights.__getitem__
    monkeypatch.setattr(
        GatheredWeights,
        "__getitem__",
        lambda gathered, name: read.append(name) or get(gathered, name),
    )
    listening = ScriptedGenerator([], tokenizer())
    monkeypatch.setattr(
        listening, "load_weights", lambda weights: pushed.append(list(weights.tensors))
    )
    RankZeroGenerator(listening, SINGLE_PROCESS, partial(in_adapter, POLICY)).load_weights(weights)
    assert pushed == [list(dict.fromkeys(read))] and all(".policy." in name for name in read)
    assert len(pushed[0]) == len(list(adapter_parameters(policy, POLICY)))


def test_weights_are_loaded_by_all_servers_at_the_same_time(folder, generator):
    """Each waits until all are loading: one after another they would wait for ever."""
    with ExitStack() as stack:
        urls, engines = zip(
            *(stack.enter_context(served(folder / "first")) for _ in range(3)), strict=True
        )
        made = generator(folder, urls)
        together = threading.Barrier(3)
        for engine in engines:
            engine.read = lambda place, engine=engine: (
                together.wait(10),
                Engine.read(engine, place),
            )
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        assert [server.failed for server in made.servers] == [None] * 3
        assert [server.version for server in made.servers] == [1] * 3
        assert {engine.version for engine in engines} == {"1"}


def test_a_server_that_does_not_load_weights_in_time_is_named_and_the_others_go_on(
    folder, generator, caplog
):
    with served(folder / "first") as (stuck, engine), served(folder / "first") as (good, _):
        made = generator(folder, [stuck, good])
        released = threading.Event()
        engine.read = lambda place: (released.wait(20), Engine.read(engine, place))
        made.timeout = 0.5
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        reason = "did not load weights 1 within generator.timeout = 0.5 s"
        assert [server.failed for server in made.servers] == [reason, None]
        assert f"generation server {stuck} {reason}." in caplog.text
        made.timeout = 20.0
        made.servers[0].again = time.monotonic() + 60  # left alone while the other answers
        rollouts = made.generate(prompts(2), SAMPLING)
        released.set()
    for rollout, ours in zip(rollouts, own_logprobs(model(seed=7), rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)


LOAD = ["/pause", "/collective_rpc", "/update_weight_version", "/resume"]


def test_servers_that_sleep_are_woken_loaded_asked_and_put_to_sleep(folder, generator):
    """Weights that are ready while they sleep wait until they are woken; the first wake is for a run that left them asleep."""
    with served(folder / "first") as (url, engine):
        engine.asleep = True
        made = generator(folder, [url], sleeps=True)
        assert engine.told == [] and (folder / "weights" / "00000000").is_dir()
        asked = ["/inference/v1/generate"] * 2
        made.generate(prompts(2), SAMPLING)
        assert engine.told == ["/wake_up", *LOAD, *asked, "/sleep"] and engine.asleep
        engine.told.clear()
        made.load_weights(Weights(1, model(seed=7).state_dict()))
        assert engine.told == []
        rollouts = made.generate(prompts(2), SAMPLING)
        assert engine.told == ["/wake_up", *LOAD, *asked, "/sleep"]
        engine.told.clear()
        made.for_probes().generate(prompts(2), SAMPLING)  # by weights that they have
        assert engine.told == ["/wake_up", *asked, "/sleep"] and engine.asleep
    for rollout, ours in zip(rollouts, own_logprobs(model(seed=7), rollouts), strict=True):
        assert rollout.logprobs == pytest.approx(ours, abs=1e-4)
        assert set(rollout.versions) == {1}


def test_a_server_that_cannot_sleep_or_wake_is_named_and_none_is_asleep_after_an_error(
    folder, generator
):
    def refuses(*_):
        raise Refused("sleep mode is not enabled", 501)

    with served(folder / "first") as (url, engine), served(folder / "first") as (other, beside):
        made = generator(folder, [url], sleeps=True)
        engine.context = 8
        made.timeout = 1.0
        with pytest.raises(ServersGone, match="it wrote 2 of 12 tokens"):
            made.generate(prompts(4)[3:], SAMPLING)
        assert not engine.asleep and "/sleep" not in engine.told
        engine.context, made.timeout = 10**6, 20.0
        engine.refuse["/sleep"] = refuses
        sentence = rf"generation server {url} cannot be put to sleep .*sleep mode is not enabled.*--enable-sleep-mode"
        both = generator(folder, [url, other], sleeps=True)
        with pytest.raises(ServersAwake, match=sentence):
            both.generate(prompts(1), SAMPLING)
        assert beside.told[-2:] == ["/sleep", "/wake_up"] and not beside.asleep
        del engine.refuse["/sleep"]
        made.generate(prompts(1), SAMPLING)
        assert engine.asleep
        engine.refuse["/wake_up"] = refuses
        made.timeout = 0.5
        with pytest.raises(
            ServersGone, match=rf"{url}: sleeps and could not be woken \(answered 501"
        ):
            made.generate(prompts(1), SAMPLING)


@pytest.mark.slow
def test_all_answers_of_a_run_are_written_by_servers(tmp_path):
    """Also those of its probes, its win rate and its evaluation, without a random number of the training's."""
    words = [
        'recipe=["sft", "reward_model", "rloo", "evaluation"]',
        "algorithm.preset=rloo",
        "rollout.samples_per_prompt=2",
    ]
    job = build(
        read_settings(recipe_path("reviews"), [*SMALL_REVIEWS, *words], "recipe reviews").config
    )
    job.stages[0].load_policy(tmp_path).save_pretrained(tmp_path / "first")
    job.tokenizer.save_pretrained(tmp_path / "first")
    trained, held_out = ({p.ids for p in job.stages[i].prompts} for i in (2, 3))
    with served(tmp_path / "first") as (url, engine):
        records = []
        for name in ("one", "two"):
            where = (
                f'generator={{type="vllm", urls=["{url}"], shared="{tmp_path / name / "shared"}"}}'
            )
            run = make_run(tmp_path / name, "reviews", *words, "run.steps=3", where)
            lines = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
            records.append([line["metrics"] for line in lines if line["event"] == "metrics"])
            asked = set(map(tuple, engine.asked))
            assert held_out <= asked and asked & trained - held_out
            engine.asked.clear()
    assert records[0] == records[1] and any("policy/win_rate" in row for row in records[0])
    ages = [row["staleness/max"] for row in records[0] if "staleness/max" in row]
    assert ages == [0.0, 1.0, 1.0], (
        "where servers write, the next answers are written while one learns"
    )


def test_a_connection_that_was_idle_is_not_used_again(folder, generator):
    """The server may be closing it at that very moment: 9 of 480 requests were lost after 5 s."""
    with served(folder / "first") as (url, engine):
        made = generator(folder, [url])
        made.generate(prompts(1), SAMPLING)
        first = set(engine.ports)
        time.sleep(IDLE + 0.2)
        made.generate(prompts(1), SAMPLING)
        assert first and engine.ports - first


def test_the_folder_that_servers_read_stays_whatever_was_pushed_before(folder, generator):
    """An evaluation, or a run that is resumed, begins at version 0 again, beside what came later."""
    for later in ("00000059", "00000060"):
        (folder / "weights" / later).mkdir(parents=True)
    with served(folder / "first") as (url, _):
        made = generator(folder, [url])
        assert [p.name for p in (folder / "weights").glob("0*")] == ["00000000"]
        for version in (1, 2, 3):
            made.load_weights(Weights(version, model().state_dict()))
        assert {p.name for p in (folder / "weights").glob("0*")} == {"00000002", "00000003"}
