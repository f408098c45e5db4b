"""Models on a GPU that is not there are saved from main memory: no second copy of them is made on the GPU, and nothing stays."""

import dataclasses
import gc
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from quartet.generation.native import NativeGenerator
from quartet.loops.rl import rl
from quartet.models.adapters import CRITIC, POLICY, REWARD, add_adapter, frozen_copy
from quartet.models.heads import AdaptedScalar, ScalarModel
from quartet.models.language_model import save, stop_ids
from quartet.models.loading import fill
from quartet.models.lora import Lora
from quartet.models.precision import compute_in
from quartet.models.quantize import quantize
from quartet.models.skeleton import skeleton
from quartet.training.state_tree import TENSORS, join_tensors, save_tensors, split_tensors
from tests.support.pretended_device import Pretended, on_device, pretended
from tests.support.world import tokenizer
from tests.training.test_pretended_gpu import parts

BF16, FP32 = torch.bfloat16, torch.float32
CONFIG = AutoConfig.for_model(
    "llama", vocab_size=24, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=1,
)  # fmt: skip
LARGEST = 4 * 64 * 128
"""Bytes of the largest matrix in float32."""
LORA = Lora(rank=2)


def whole():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=FP32).eval()


def adapted(made, *names):
    for seed, name in enumerate(names):
        add_adapter(made, LORA, name, seed)
    with torch.no_grad():  # new adapters change nothing
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return compute_in(made, BF16)


def trained():
    return compute_in(whole(), BF16)


def under_lora():
    return adapted(whole(), POLICY, CRITIC)


def in_4_bits():
    made = adapted(quantize(skeleton(CONFIG)), POLICY)
    return fill(made, whole().state_dict(), torch.device("cpu"), "here")


def reward_model():
    return ScalarModel.from_trunk(whole(), 0, seed=0).compute_in(BF16)


def save_policy(made, folder):
    save(made, tokenizer(), folder)


def save_scalar(made, folder):
    made.save(folder, tokenizer())


def save_critic(made, folder):
    made.save_per_token(folder, tokenizer())


def moved(made):
    if isinstance(made, AdaptedScalar):
        on_device(made.view.model)
        made.collect_parameters()
    return on_device(made)


def scalar_adapter():
    return AdaptedScalar(adapted(whole(), POLICY, REWARD), REWARD, 0, seed=0)


SAVED = {
    "all weights": (trained, save_policy, FP32),
    "adapters": (under_lora, save_policy, FP32),
    "adapters on 4 bits": (in_4_bits, save_policy, BF16),
    "a reward model": (reward_model, save_scalar, FP32),
    "a critic": (reward_model, save_critic, FP32),
    "an adapter that is a reward model": (scalar_adapter, save_scalar, FP32),
    "an adapter that is a critic": (scalar_adapter, save_critic, FP32),
}
SLOW = {"adapters on 4 bits"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in SAVED]
)
def test_saving_takes_one_matrix_more_on_the_gpu_and_leaves_nothing(tmp_path, kind):
    make, save_in, dtype = SAVED[kind]
    save_in(make(), tmp_path / "here")
    with pretended() as counts:
        made = moved(make())
        assert all(isinstance(p, Pretended) for p in made.parameters())
        gc.collect()
        before = counts.alive
        counts.reset_peak()
        save_in(made, tmp_path / "there")
        # a change, what it is added to, and their sum
        assert counts.peak - before <= 5 * LARGEST
        gc.collect()
        assert counts.alive == before
    for file in (tmp_path / "here").rglob("*.safetensors"):
        name = file.relative_to(tmp_path / "here")
        ours, theirs = load_file(tmp_path / "there" / name), load_file(file)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            torch.testing.assert_close(ours[key], theirs[key])
        if name.parent.name != "adapter":
            assert {t.dtype for t in ours.values()} == {dtype}
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    with safe_open(tmp_path / "there" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys(), "a tied head is one tensor"  # noqa: SIM118


def test_a_checkpoint_is_written_from_main_memory_and_goes_back_to_the_gpu(tmp_path):
    """Moments, their step counters, the average of the weights: where they were, to the bit."""
    with pretended():
        algorithm, learner, collector = parts("ppo", ema=0.9)
        next(iter(rl(collector, learner, algorithm, 0)))
        tree = json.loads(json.dumps(save_tensors(tmp_path, learner.state())))
        files = load_file(tmp_path / TENSORS)
        _, other, _ = parts("ppo", ema=0.9)
        other.load_state(join_tensors(tree, files))
        found, expected = (split_tensors(each.state())[1] for each in (other, learner))
        assert found.keys() == expected.keys() == files.keys()
        assert {name.split("/")[0] for name in files} == {"optimizers", "ema"}
        for name, tensor in found.items():
            assert type(tensor) is type(expected[name]) is Pretended, name
            assert files[name].dtype == tensor.dtype == FP32, name
            assert torch.equal(tensor.inner, expected[name].inner), name


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_each_step_samples_from_the_weights_of_the_update_before(copied):
    """What samples is held in bfloat16: the learner's own module, or a copy that gets its weights."""
    with pretended():
        algorithm, learner, collector = parts("grpo")
        actor = learner.models.actor
        learner.optimizers["actor"].scale = 300.0
        if copied:
            own, ends = frozen_copy(actor, BF16), stop_ids(actor, tokenizer())
            generator = NativeGenerator(own, tokenizer(), ends, 0, copied=True)
            collector = dataclasses.replace(collector, generator=generator)
        before = [p.detach().clone() for p in actor.parameters()]
        steps = [s for s, _ in zip(rl(collector, learner, algorithm, 0), range(2), strict=False)]
        now = [p.detach() for p in actor.parameters()]
        moved = [float((p - q).abs().max()) for p, q in zip(now, before, strict=True)]
    assert max(moved) > 0.02
    assert all(step.metrics["sampler_ratio"] < 1.02 for step in steps)
