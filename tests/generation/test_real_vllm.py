"""A vLLM of one's own, in an environment of its own: QUARTET_VLLM=…/bin/vllm; docs/scaling.md says how to make one for a CPU."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch

from quartet.generation.dialects import DIALECTS
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.servers import ServedGenerator
from quartet.models.adapters import POLICY, adapter_parameters, add_adapter, save_adapter
from quartet.models.forward import masked_logprobs
from quartet.models.language_model import create, save
from quartet.models.lora import Lora
from quartet.models.padding import response_mask, right_pad
from quartet.models.shape import Shape
from tests.support.fake_server import free_port
from tests.support.world import prompts, tokenizer

VLLM = os.environ.get("QUARTET_VLLM")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(VLLM is None, reason="QUARTET_VLLM names no vLLM"),
]
SHAPE = Shape(type="llama", hidden_size=128, num_layers=2, num_heads=2, max_length=512)
SAMPLING = Sampling(max_new_tokens=300, temperature=0.8)


def made(seed):
    """Untied: where vLLM packs weights, as on CPUs, `reload_weights` leaves a head that is tied to the embeddings as it was."""
    model = create(SHAPE, tokenizer(), seed)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def adapted(seed):
    policy = add_adapter(made(0), Lora(rank=4), POLICY, seed=0)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(policy, POLICY):
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    return policy


@contextmanager
def serving(folder, *more):
    port = free_port()
    save(made(5), tokenizer(), folder / "first")  # not what it is to say: that is pushed
    words = [
        "serve",
        str(folder / "first"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    words += [
        "--logprobs-mode",
        "processed_logprobs",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "16",
        "--enforce-eager",
        "--enable-scale-out",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [VLLM, *words, *more], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    else:
        raise AssertionError((folder / "log").read_text()[-3000:])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tokens_written(url):
    found = re.findall(
        r"^vllm:generation_tokens_total\{.*\} (\S+)$", httpx.get(f"{url}/metrics").text, re.M
    )
    return sum(map(float, found))


def each_token_is_of_its_version(generator, url, models):
    """Two pushes in the middle of answers, each after some hundred tokens."""
    generator.load_weights(Weights(0, models[0].state_dict()))
    generator.generate(prompts(2), SAMPLING)  # the first answers wait for what is compiled
    found = []
    sampling = threading.Thread(
        target=lambda: found.extend(generator.generate(prompts(16), SAMPLING, 24))
    )
    sampling.start()
    for version in (1, 2):
        written = tokens_written(url)
        while sampling.is_alive() and tokens_written(url) < written + 200:
            time.sleep(0.02)
        generator.load_weights(Weights(version, models[version].state_dict()))
    sampling.join()
    assert {v for r in found for v in r.versions} == {0, 1, 2}, (
        "a push came before or after everything"
    )
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in found])
    starts = torch.tensor([len(r.prompt.ids) for r in found])
    mask = response_mask(starts, lengths, tokens.shape[1])
    with torch.no_grad():
        ours = [masked_logprobs(model, tokens, mask, SAMPLING.temperature) for model in models]
    for row, rollout in enumerate(found):
        expected = [
            float(ours[version][row, len(rollout.prompt.ids) + i])
            for i, version in enumerate(rollout.versions)
        ]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
        assert list(rollout.versions) == sorted(rollout.versions)
    assert any(len(set(r.versions)) > 1 for r in found)  # how many, the machine decides


def test_logprobs_are_ours_and_a_push_in_the_middle_gives_each_token_its_version(tmp_path):
    def write(place, tensors):
        other = made(0)
        other.load_state_dict(dict(tensors))
        save(other, tokenizer(), place)

    with serving(tmp_path) as url:
        generator = ServedGenerator(
            DIALECTS["vllm"],
            [url],
            write,
            tmp_path / "weights",
            tokenizer(),
            frozenset({1}),
            0,
            timeout=100.0,
        )
        each_token_is_of_its_version(generator, url, [made(0), made(7), made(3)])
        generator.close()


def test_so_do_adapters_that_are_pushed_alone(tmp_path):
    policies = [adapted(1), adapted(2), adapted(3)]
    with serving(tmp_path, "--enable-lora", "--max-lora-rank", "8") as url:
        generator = ServedGenerator(
            DIALECTS["vllm"],
            [url],
            lambda place, tensors: save_adapter(policies[0], POLICY, place, tensors),
            tmp_path / "weights",
            tokenizer(),
            frozenset({1}),
            seed=0,
            timeout=100.0,
            save_base=lambda place, tensors: save(made(0), tokenizer(), place),
        )
        each_token_is_of_its_version(generator, url, policies)
        generator.close()
