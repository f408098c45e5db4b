"""An update computed again is the update; with a setting changed it is another, of the same rollouts."""

import dataclasses
import hashlib
import json

import pytest
import torch
from typer.testing import CliRunner

from quartet.algorithms.kl import AdaptiveCoef, KLInReward
from quartet.algorithms.policy_loss import Clip
from quartet.assembly import Assembler, stage
from quartet.cli import app
from quartet.config.toml import read_settings
from quartet.runtime.replay import (
    CannotReplay,
    checkpoint_before,
    cosine,
    differences,
    merged,
    replay,
)


def rl_stage(run, *words):
    config = read_settings(run.path / "config.resolved.toml", words).config
    return stage(Assembler(config), config.rl_stage)


def everything(run):
    return {
        p: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.path.rglob("*") if p.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("grpo", 1), ("grpo", 3), ("ppo", 3)])
def test_as_it_was_to_the_bit_and_nothing_is_written(request, name, step):
    run = request.getfixturevalue(f"{name}_run")
    before = everything(run)
    stage = rl_stage(run)
    since = checkpoint_before(run.path, name, step)
    outcome, other = replay(stage, run.path, since, step)
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    recorded = next(
        e["metrics"]
        for e in events
        if e.get("stage") == name and e.get("step") == step and e["event"] == "metrics"
    )
    assert name == "grpo" or {"reward/drift", "policy/win_rate"} <= recorded.keys()
    assert (
        differences(recorded, outcome.metrics) == [] and recorded["loss"] == outcome.metrics["loss"]
    )
    assert other is None and outcome.tokens > 0
    assert everything(run) == before


@pytest.fixture(scope="module")
def ppo_stage(ppo_run):
    return rl_stage(ppo_run)


def changed(stage, **parts):
    return dataclasses.replace(stage, algorithm=dataclasses.replace(stage.algorithm, **parts))


@pytest.mark.slow
def test_with_a_setting_changed_it_learns_something_else_from_the_same_rollouts(ppo_run, ppo_stage):
    since = checkpoint_before(ppo_run.path, "ppo", 2)
    was, clipped = replay(
        ppo_stage, ppo_run.path, since, 2, changed(ppo_stage, policy_loss=Clip(low=1e-5, high=1e-5))
    )
    assert int(clipped.clipped.sum()) > int(was.clipped.sum()) and clipped.tokens == was.tokens
    assert (
        clipped.metrics["reward"] == was.metrics["reward"]
        and -1 < cosine(was.weight_change, clipped.weight_change) < 0.9999
    )
    assert was.weight_change.norm() > 0
    assert clipped.metrics["kl/coef"] == was.metrics["kl/coef"], (
        "what was not changed is as it had adapted"
    )
    _, again = replay(ppo_stage, ppo_run.path, since, 2, ppo_stage)
    assert torch.equal(again.weight_change, was.weight_change) and again.kl_after == was.kl_after
    assert differences(again.metrics, was.metrics) == []


def test_an_adapted_coefficient_is_kept_and_a_changed_one_is_not(ppo_run, ppo_stage):
    written = changed(ppo_stage, kl=KLInReward(coef=0.2, controller=AdaptiveCoef(target=6.0)))
    now = dataclasses.asdict(
        changed(written, kl=dataclasses.replace(written.algorithm.kl, coef=0.35)).algorithm
    )
    then = dataclasses.asdict(written.algorithm)
    wider = dataclasses.asdict(changed(written, policy_loss=Clip(high=0.3)).algorithm)
    assert merged(now, then, wider) == {**wider, "kl": now["kl"]}
    dearer = dataclasses.asdict(
        changed(written, kl=dataclasses.replace(written.algorithm.kl, coef=0.7)).algorithm
    )
    assert merged(now, then, dearer)["kl"]["coef"] == 0.7


def test_what_cannot_be_replayed(grpo_run, tmp_path):
    with pytest.raises(CannotReplay, match="has no checkpoint before step 2 of grpo"):
        checkpoint_before(tmp_path, "grpo", 2)
    beyond = CliRunner().invoke(app, ["replay", str(grpo_run.path), "--step", "4"])
    assert beyond.exit_code == 2 and "grpo has the steps 1 to 3, not 4." in beyond.output


def test_the_verb(grpo_run):
    shown = CliRunner().invoke(app, ["replay", str(grpo_run.path), "optim.lr=1e-9", "--step", "2"])
    assert shown.exit_code == 0, shown.output
    assert (
        "every metric is the recorded one, to the bit" in shown.output and "cosine" in shown.output
    )
    refused = CliRunner().invoke(app, ["replay", str(grpo_run.path), "seed=3"])
    assert (
        refused.exit_code == 2 and "only algorithm.* and optim.* can be changed" in refused.output
    )


def test_the_model_of_a_checkpoint_is_what_the_stage_would_have_left(grpo_run, tmp_path):
    words = ["export", str(grpo_run.path), "--to", str(tmp_path / "out"), "--checkpoint"]
    assert CliRunner().invoke(app, [*words, "grpo-000003"]).exit_code == 0
    ours, theirs = (
        (folder / "model.safetensors").read_bytes()
        for folder in (tmp_path / "out", grpo_run.path / "policy")
    )
    assert ours == theirs
    for name, said in (
        ("best", "no checkpoint was measured"),
        ("grpo-000009", "has no checkpoint grpo-000009. There are grpo-"),
    ):
        refused = CliRunner().invoke(app, [*words, name])
        assert refused.exit_code == 2 and said in refused.output
