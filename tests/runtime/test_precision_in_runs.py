"""run.precision in whole runs: what is computed in bfloat16, recorded, resumed to the same bits, and saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

from quartet.assembly import build
from quartet.config.toml import read_settings
from quartet.models.precision import compute_dtype
from quartet.recipes import recipe_path
from tests.support.tiny_run import SMALL, make_run

WORDS = ('recipe=["sft", "ppo"]', "run.precision=bf16", "run.steps=4", "run.checkpoint_every=2",
         'algorithm.preset="ppo"')  # fmt: skip


def metrics(run):
    lines = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["event"] == "metrics"]


@pytest.mark.slow
def test_a_run_in_bfloat16_learns_saves_float32_and_is_held_to_its_own_tolerance(tmp_path):
    run = make_run(tmp_path, "sums", *WORDS)
    assert run.status == "done" and run.rounding == "bf16"
    steps = [m for m in metrics(run) if "sampler_ratio" in m]
    assert len(steps) == 4
    # Exactly 1 where the kernels for a batch and for one token round alike, as on some CPUs.
    assert all(1 <= m["sampler_ratio"] < 1.03 and m["ratio/first_error"] < 0.1 for m in steps)
    weights = load_file(run.path / "policy" / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    # Masters: most weights are no bfloat16 numbers.
    moved = torch.cat([t.flatten() for t in weights.values()])
    assert (moved != moved.bfloat16().float()).float().mean() > 0.9


@pytest.mark.slow
def test_one_trunk_with_four_roles_computes_in_bfloat16(tmp_path):
    """SFT, a reward model and PPO, each an adapter on a base that is held in bfloat16."""
    adapter = 'policy.adapter={type="lora", rank=2}'
    run = make_run(tmp_path, "reviews", adapter, "run.precision=bf16", "run.steps=2")
    assert run.status == "done" and run.rounding == "bf16"
    steps = [m for m in metrics(run) if "sampler_ratio" in m]
    assert len(steps) == 2 and all(m["sampler_ratio"] < 1.03 for m in steps)
    assert all(m["kl/token_k3"] < 0.01 for m in steps)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(tmp_path):
    first, second = (make_run(tmp_path / name, "sums", *WORDS) for name in "ab")
    assert metrics(first) == metrics(second)
    ours, theirs = (
        (run.path / "policy" / "model.safetensors").read_bytes() for run in (first, second)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("word", "policy", "reference"),
    [
        ("run.precision=auto", torch.float32, torch.float32),
        ("run.precision=bf16", torch.bfloat16, torch.bfloat16),
        ('run.precision={reference="fp32", policy="bf16"}', torch.bfloat16, torch.float32),
    ],
)
def test_each_role_computes_in_what_the_config_says(word, policy, reference, tmp_path):
    words = [*SMALL, "policy.create.max_length=32", 'recipe=["grpo"]', word]
    job = build(read_settings(recipe_path("sums"), words, "sums").config)
    [stage] = job.stages
    learner = stage.load_components(tmp_path).learner
    assert compute_dtype(learner.models.actor) == policy
    assert {p.dtype for p in learner.models.actor.parameters()} == {torch.float32}
    assert compute_dtype(learner.reference) == reference
    assert job.precision == ("bf16" if policy == torch.bfloat16 else "fp32")


@pytest.mark.slow
def test_a_checkpoint_says_what_auto_was(tmp_path):
    config = read_settings(recipe_path("sums"), [], "sums").config
    assert build(config).made_with["config"]["run"]["precision"] == "fp32"


@pytest.mark.slow
def test_all_stages_stand_on_a_base_in_4_bits(tmp_path):
    """SFT, a reward model, PPO and an evaluation. What SFT has learnt is an adapter that the next ones start as: merged into the
    base and rounded to 4 bits again, it would be lost."""
    adapter = ('policy.adapter={type="lora", rank=2}', 'policy.quantize="nf4"')
    run = make_run(tmp_path, "reviews", *adapter, "run.steps=2", "sft.lr=0.05", "optim.lr=0.0001")
    assert run.status == "done"
    first, second = (m for m in metrics(run) if "kl/token_k3" in m)
    assert abs(first["kl"]) < 1e-6 < abs(second["kl"])  # the policy starts at its reference
    summary = run.summary("sft")
    assert summary["held_out_loss"] < summary["held_out_loss_before"] - 0.1
    sft = load_file(run.path / "sft/adapter/adapter_model.safetensors")
    policy = load_file(run.path / "policy/adapter/adapter_model.safetensors")
    near = [(policy[n] - t).norm() / t.norm().clamp(min=1e-6) for n, t in sft.items()]
    assert 0 < max(near) < 0.5
