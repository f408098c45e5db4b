"""A plan is of the device that the run would take on this machine."""

import ctypes
import json

import pytest
import torch
from typer.testing import CliRunner

from quartet.assembly.device import planned_device
from quartet.cli import app
from quartet.config.toml import read_settings
from quartet.planning import device as devices
from quartet.planning import gpu_plan
from quartet.planning.device import CPU, Device, device_named
from quartet.planning.gpu_memory import load_peak, training_memory, workload
from quartet.planning.gpu_plan import plan_on
from quartet.planning.hardware import GPUS, LEGEND
from quartet.planning.plan import in_words, plan, remarks
from quartet.recipes import recipe_path
from quartet.sweeps.plan import plan_sweep
from quartet.sweeps.request import request_of

H200 = Device("cuda", "NVIDIA H200", 141e9)
LARGE = [f"policy.create.{key}" for key in ("hidden_size=2048", "num_layers=16", "num_heads=32")]
LARGE += ["optim.micro_batch_tokens=2048", "policy.create.max_length=2048"]
LARGE += ["rollout.prompts_per_step=64", "rollout.max_new_tokens=64", "sft.batch_size=64"]
LARGE += ["optim.minibatches=1"]
P = 16 * (4 * 2048**2 + 3 * 2048 * 6144)
"""Parameters of the matrices in its blocks; embeddings and norms are a thousandth of them."""


def config_of(recipe, *words):
    return read_settings(recipe_path(recipe), words).config


class Driver:
    """The functions of CUDA's driver that are asked, for two GPUs."""

    cards = ((b"NVIDIA H200", 150_000_000_000, 9), (b"Tesla T4", 15_800_000_000, 7))

    def cuInit(self, flags):
        return 0 if self.cards else 100

    def cuDeviceGet(self, found, index):
        found._obj.value = index
        return 0 if index < len(self.cards) else 101

    def cuDeviceGetName(self, name, size, number):
        name.value = self.cards[number.value][0]
        return 0

    def cuDeviceTotalMem_v2(self, memory, number):
        memory._obj.value = self.cards[number.value][1]
        return 0

    def cuDeviceGetAttribute(self, major, attribute, number):
        assert attribute == 75
        major._obj.value = self.cards[number.value][2]
        return 0


@pytest.fixture
def driver(monkeypatch):
    devices.cuda_device.cache_clear()
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    yield monkeypatch
    devices.cuda_device.cache_clear()


def test_the_driver_is_asked_for_the_gpu(driver):
    first = Device("cuda", "NVIDIA H200", 150e9)
    assert device_named("auto") == device_named("cuda") == device_named("cuda:0") == first
    assert device_named("cuda:1") == Device("cuda", "Tesla T4", 15.8e9, has_bf16=False)
    assert device_named("cuda:2") is None and device_named("cpu") == CPU
    assert first.gpu is not None and first.gpu.memory == 150e9
    assert first.gpu.flops == GPUS["h200"].flops
    names = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "rtx4090"}
    names |= {"NVIDIA GH200 480GB": None, "Tesla T4": None}
    for name, key in names.items():
        found = Device("cuda", name, 1.0).gpu
        assert (found and found.flops) == (key and GPUS[key].flops), name


def test_a_machine_without_one_has_a_cpu_or_an_apple_gpu(driver):
    driver.setattr(Driver, "cards", ())
    assert device_named("auto") == CPU and device_named("cuda") is None
    devices.cuda_device.cache_clear()
    driver.setattr(devices.sys, "platform", "darwin")
    driver.setattr(devices.platform, "machine", lambda: "arm64")
    assert device_named("auto") == device_named("mps") == Device("mps")


def test_a_build_of_torch_for_cpus_takes_no_gpu(driver):
    driver.setattr(devices, "_torch_has_cuda", lambda: False)
    assert device_named("auto") == CPU


def test_the_build_of_torch_is_known_without_its_import():
    assert devices._torch_has_cuda() == (torch.version.cuda is not None)


def test_the_device_of_a_run_is_that_of_its_plan(monkeypatch):
    class Properties:
        name, total_memory = "NVIDIA H200", 141_000_000_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert planned_device(torch.device("cuda", 0)) == H200
    assert planned_device(torch.device("cpu")) == CPU
    assert planned_device(torch.device("mps")) == Device("mps")


def test_on_a_cpu_it_is_the_plan_of_before():
    config = config_of("reviews")
    assert plan_on(config, CPU) == plan(config) and remarks(plan(config)) == []
    for device in (Device("mps"), None):
        found = plan_on(config, device)
        assert found.memory is found.seconds is None and found.tokens == plan(config).tokens
        assert "≈" not in in_words(found) and len(remarks(found)) == 1


def test_the_memory_of_each_phase_is_that_on_the_gpu():
    """16 bytes of each trained parameter, 2 of each that is read and 2 rounded ones, and activations, of actor or critic at a time;
    Adam's moments stay while responses are sampled, gradients do not."""
    config = config_of("reviews", *LARGE)
    memory = plan_on(config, H200).memory
    work = workload(config)
    assert memory["ppo update"] == sum(training_memory(work, 1).values())
    assert memory["ppo loading"] == load_peak(work, 1)
    activations = training_memory(work, 1)["activations"]
    assert memory["sft"] == pytest.approx(18 * P + activations, rel=0.02)
    assert memory["reward model"] == pytest.approx(20 * P + activations, rel=0.02)
    assert memory["ppo update"] == pytest.approx(38 * P + activations, rel=0.02)
    assert memory["ppo sampling"] > (2 * 12 + 2 * 2 + 2) * P
    assert memory["evaluation"] > (2 + 2 + 2) * P
    best = plan_on(config_of("reviews", *LARGE, 'sft.keep="best"', "sft.eval_every=5"), H200)
    assert best.memory["sft"] == pytest.approx(memory["sft"] + 4 * P, rel=0.01)


def test_adapters_and_older_gpus():
    words = [*LARGE, "policy.adapter.type=lora"]
    full, lora = (plan_on(config_of("reviews", *w), H200).memory for w in (LARGE, words))
    for phase in ("sft", "reward model", "ppo update", "ppo sampling"):
        assert lora[phase] < full[phase] / 2
    assert lora["sft"] == pytest.approx(lora["reward model"], rel=0.1), "on one trunk"
    old = Device("cuda", "Tesla V100-SXM2-32GB", 32e9, has_bf16=False)
    wide = plan_on(config_of("reviews", *words), old)
    assert wide.memory["ppo loading"] > 1.9 * 2 * P, "models are held in float32"
    assert wide.span is None and "the rates of Tesla V100-SXM2-32GB are not" in remarks(wide)[0]


def test_online_pairs_are_sampled_and_scored_on_the_gpu():
    """Beside the update there is a reward model in bfloat16, and before it a phase that samples."""
    words = [*LARGE, "sft.steps=1", "reward_model.steps=1"]
    offline, online = (
        plan_on(config_of("reviews", *words, f'recipe=["sft","reward_model","{stage}"]'), H200)
        for stage in ("dpo", "online_dpo")
    )
    assert online.memory["online_dpo"] - offline.memory["dpo"] == pytest.approx(2 * P, rel=0.01)
    resident = (4 + 8 + 2 + 2 + 2) * P  # weights, moments, those that are sampled with, two frozen
    assert resident < online.memory["online_dpo sampling"] < 1.2 * resident
    assert online.tokens["online_dpo, generated"] > 0


def test_the_time_of_generation_is_not_that_of_training():
    """What is generated outside of the RL stage is left out, and the RL stage has times of its own."""
    config = config_of("reviews", *LARGE)
    tokens = {"sft": 1e6, "reward_model": 1e6}
    alone, beside = (
        gpu_plan._time(config, H200.gpu, tokens | more, 2048)
        for more in ({}, {"ppo, generated": 1e9, "ppo.2, generated": 1e9})
    )
    assert alone == beside


def test_what_does_not_fit_is_said():
    small = Device("cuda", "NVIDIA GeForce RTX 4090", 24e9)
    found = plan_on(config_of("reviews", *LARGE), small)
    assert found.span is None, "no time of a run that does not fit"
    [sentence, *_, legend] = remarks(found)
    assert (
        sentence.startswith("ppo update needs 36.4 GB")
        and "21.6 GB of NVIDIA GeForce RTX 4090" in sentence
    )
    assert legend == LEGEND
    fits = plan_on(config_of("reviews", *LARGE), H200)
    assert not any("needs" in each for each in remarks(fits))
    assert fits.span.best < fits.seconds < fits.span.worst


@pytest.mark.parametrize("words", [["plan", "sums"], ["run", "sums", "--plan"]])
def test_the_command_plans_for_the_device_that_the_run_would_take(driver, words):
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "of 150 GB on NVIDIA H200" in said.output and LEGEND in said.output
    memory = [line for line in said.output.splitlines() if "  memory  " in line]
    assert len(memory) == 5 and all("~" in each and "GB on each GPU" in each for each in memory)
    read = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)["plan"]
    assert read["device"]["name"] == "NVIDIA H200"
    assert read["never_measured_on_a_gpu"] == ["memory", "seconds", "span"]
    on_cpu = CliRunner().invoke(app, [*words, "run.device=cpu"]).output
    assert "H200" not in on_cpu and "~" not in on_cpu and " MB" in on_cpu


def test_the_time_of_a_sweep_is_that_of_its_device(driver):
    request = request_of("epsilon-beta")
    on_gpu = plan_sweep(request).seconds
    driver.setattr(devices, "_torch_has_cuda", lambda: False)
    devices.cuda_device.cache_clear()
    assert on_gpu is not None and on_gpu < plan_sweep(request).seconds
