"""What a stage measures of its model before the first step is part of its checkpoint: a stage that is resumed takes it from there."""

import shutil

import pytest

from quartet.assembly import Assembler, stage
from quartet.config.toml import read_settings
from quartet.stages.probes import FirstAnswers

MEASURES = {
    "sft": ("quartet.stages.sft.held_out_loss", "held_out_loss_before"),
    "reward_model": ("quartet.stages.reward_model.pair_accuracy", "held_out_accuracy_before"),
    "dpo": ("quartet.stages.preference.held_out_preference", "held_out_loss_before"),
}


def never(*_, **__):
    raise AssertionError("measured again")


def stage_of(name, ppo_run):
    words = ['recipe=["dpo"]', "preference.steps=2", "preference.batch_size=4"]
    settings = read_settings(ppo_run.path / "config.resolved.toml", words if name == "dpo" else [])
    return stage(Assembler(settings.config), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_a_resumed_stage_measures_its_first_model_no_second_time(
    name, ppo_run, tmp_path, monkeypatch
):
    place, key = MEASURES[name]
    own = stage_of(name, ppo_run)
    folder = shutil.copytree(ppo_run.path, tmp_path / "run")
    run = own.begin(folder)
    steps = run.steps(0)
    next(steps)
    state = run.copy_state()
    assert list(steps)
    whole = run.finish()
    with monkeypatch.context() as patched:
        patched.setattr(place, never)
        resumed = own.begin(folder)
        resumed.load_state(state)
        steps = resumed.steps(1)
    assert len(list(steps)) == own.num_steps - 1
    assert resumed.finish() == whole
    assert whole[key] != whole[key.removesuffix("_before")]


@pytest.mark.slow
def test_a_resumed_rl_stage_keeps_the_answers_of_its_first_policy(ppo_run, tmp_path, monkeypatch):
    own = stage_of("ppo", ppo_run)
    folder = shutil.copytree(ppo_run.path, tmp_path / "run")
    run = own.begin(folder)
    steps = run.steps(0)
    next(steps)
    state = run.copy_state()
    first = state["first_answers"]
    assert len(first["probes"]) == 8 and len(first["compared"]) == 32
    assert all(answer.score is not None for answer in first["compared"])
    monkeypatch.setattr(FirstAnswers, "sample", never)
    resumed = own.begin(folder)
    resumed.load_state(state)
    one, other = next(steps), next(resumed.steps(1))
    names = {"policy/win_rate", "reward/drift", "policy/sft_perplexity"}
    assert names <= one.metrics.keys()
    assert {name: one.metrics[name] for name in names} == {
        name: other.metrics[name] for name in names
    }
    assert resumed.stateful["first_answers"].state() == first
    del state["first_answers"]  # as in a checkpoint of a version that did not write them
    resumed = own.begin(folder)
    resumed.load_state(state)
    older = next(resumed.steps(1)).metrics
    unknown = {"policy/win_rate", "reward/drift"}
    assert {n: older.get(n) for n in one.metrics} == one.metrics | dict.fromkeys(unknown)
