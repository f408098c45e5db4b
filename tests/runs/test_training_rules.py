"""The rules on SFT, reward models and preferences: each speaks of its fault, with the numbers."""

import json
import math
import re

import pytest

from quartet.api.record import IdTexts
from quartet.loops.progress import Progress
from quartet.recording.run_folder import RunFolder
from quartet.recording.step_recorder import StepRecorder
from quartet.runs import training_rules as rules
from quartet.runs.doctor import Watch, diagnose
from quartet.runs.history import History
from quartet.runs.reader import Run
from quartet.runs.rules import RULES
from quartet.runs.training_rules import wilson

STEPS = 40


def sft(step):
    return {"loss": 2 + 0.4 * math.exp(-step / 10), "grad_norm/policy": 1.0, "lr": 1e-3}


def reward_model(step):
    learnt = 1 - math.exp(-step / 15)
    return {
        "loss": 0.69 - 0.3 * learnt + 0.05 * math.sin(7.3 * step),
        "accuracy": 0.5 + 0.35 * learnt,
        "margin": 2 * learnt,
        "lr": 1e-3,
    }


def dpo(step):
    chosen = -60 - 5 * (1 - math.exp(-step / 15))
    return reward_model(step) | {
        "logratio/abs": 0.0 if step == 1 else 1.0,
        "logprobs/chosen": chosen,
    }


SFT_SUMMARY = {"held_out_loss_before": 2.4, "held_out_loss": 2.05}
PAIRS = {"held_out_pairs": 200, "held_out_lengths": 180, "held_out_longer_chosen": 0.55}
REWARD_MODEL_SUMMARY = PAIRS | {
    "held_out_accuracy_before": 0.48,
    "held_out_accuracy": 0.82,
    "held_out_confidence": 0.85,
    "held_out_prefers_longer": 0.6,
    "centre": 0.3,
}
DPO_SUMMARY = PAIRS | {
    "held_out_loss_before": 0.693,
    "held_out_loss": 0.6,
    "held_out_accuracy_before": 0.5,
    "held_out_accuracy": 0.7,
    "held_out_logprobs/chosen_before": -60.0,
    "held_out_logprobs/chosen": -66.0,
    "held_out_prefers_longer": 0.5,
}


def ilql(step):
    learnt = 1 - math.exp(-step / 15)
    return sft(step) | {
        "loss/cql": 0.03 - 0.01 * learnt,
        "loss/q": 0.1 - 0.05 * learnt,
        "return/rms": 0.5,
    }


HEALTHY = {
    "ilql": (ilql, SFT_SUMMARY),
    "sft": (sft, SFT_SUMMARY),
    "reward_model": (reward_model, REWARD_MODEL_SUMMARY),
    "dpo": (dpo, DPO_SUMMARY),
}


def spoken(stage, metrics=lambda step: {}, summary=None, steps=STEPS):
    """Return the rules that speak of a healthy stage with some changes: the step, 0 at its end, and
    the sentence."""
    healthy, end = HEALTHY[stage]
    watch, found = Watch(), {}
    for step in range(1, steps + 1):
        for rule, sentence in watch.see(healthy(step) | metrics(step)):
            found[rule] = step, sentence
    for rule, sentence in watch.finish(end | (summary or {})):
        found[rule] = 0, sentence
    return found


@pytest.mark.parametrize("stage", HEALTHY)
def test_a_healthy_stage_is_silent(stage):
    assert spoken(stage) == {}


FAULTS = {
    rules.steps_are_skipped: (
        "sft",
        lambda s: {"skipped": 1.0} if s > 10 else {},
        {},
        (13, "in 3 steps the loss or a gradient was not finite"),
    ),
    rules.loss_explodes: (
        "sft",
        lambda s: {"loss": 2.4 if s == 1 else 6.4, "grad_norm/policy": 1.0 if s == 1 else 250.0},
        {},
        # (2.4 + 4 · 6.4) / 5 = 5.6
        (5, "is 5.6 over 5 steps and was 2.4 at step 1 (gradient norm 1 → 2.5e+02)"),
    ),
    rules.worse_on_held_out: (
        "sft",
        lambda s: {},
        {"held_out_loss": 2.6},
        (0, "rose from 2.4 to 2.6: the model is worse than before the stage. Lower the learning"),
    ),
    rules.overfits: (
        "sft",
        lambda s: {"held_out/loss": 2.1 if s <= 20 else 2.35} if s % 10 == 0 else {},
        {"held_out_loss": 2.35},
        (30, "rose from 2.1 to 2.35 while the training loss fell to 2.02"),
    ),
    rules.worse_than_chance: (
        "reward_model",
        lambda s: {},
        {"held_out_accuracy": 0.3, "held_out_confidence": 0.5},
        (0, "30% of 200 held-out pairs are ordered as labelled (95% interval up to 37%)"),
    ),
    rules.no_better_than_chance: (
        "reward_model",
        lambda s: {},
        {"held_out_accuracy": 0.55, "held_out_confidence": 0.6},
        (0, "55% of 200 held-out pairs are ordered as labelled (95% interval 48% to 62%)"),
    ),
    rules.memorised: (
        "reward_model",
        lambda s: {"accuracy": 1.0} if s > 20 else {},
        {"held_out_accuracy": 0.7, "held_out_confidence": 0.85},
        (0, "pair accuracy is 100% in training and 70% on 200 held-out pairs"),
    ),
    rules.margins_explode: (
        "reward_model",
        lambda s: {},
        {"held_out_accuracy": 0.7, "held_out_confidence": 0.98},
        (0, "claim an accuracy of 98%, and it is 70% (95% interval up to 76%)"),
    ),
    rules.prefers_by_length: (
        "reward_model",
        lambda s: {},
        {"held_out_prefers_longer": 0.98},
        (0, "prefers the longer side in 98% of 180 held-out pairs, and the labels in 55%"),
    ),
    rules.one_label_only: (
        "dpo",
        lambda s: {"labels/chosen": 1.0},
        {},
        (10, "all labels of 10 steps say desirable"),
    ),
    rules.q_diverges: (
        "ilql",
        lambda s: {"loss/q": 4.0 if s > 10 else 0.0},
        {},
        # the mean of five is 0.8 at step 11, above 0.5² = 0.25, and 3 · 4 / 5 = 2.4 at step 13
        (13, "Q is wrong by 1.55 at each token over 5 steps, and the returns are of size 0.5"),
    ),
    rules.q_prefers_unseen: (
        "ilql",
        lambda s: {"loss/cql": 0.03 if s == 1 else 0.045},
        {},
        # (0.03 + 4 · 0.045) / 5 = 0.042 at step 5, above 1.1 · 0.03
        (7, "the conservative term is 0.045, and 0.03 where Q prefers no token"),
    ),
    rules.chosen_becomes_unlikely: (
        "dpo",
        lambda s: {},
        {"held_out_logprobs/chosen": -80.0},
        (0, "fell from -60.0 to -80.0"),
    ),
}


@pytest.mark.parametrize("rule", FAULTS, ids=lambda rule: rule.__name__)
def test_the_rule_speaks_of_its_fault_and_no_other_does(rule):
    stage, metrics, summary, (step, words) = FAULTS[rule]
    found = spoken(stage, metrics, summary)
    assert set(found) == {rule}
    assert found[rule][0] == step and words in found[rule][1]


def test_every_rule_on_training_has_a_planted_fault():
    assert set(FAULTS) == {rule for rule in RULES if rule.__module__ == rules.__name__}


def test_an_interval_that_was_worked_by_hand():
    """z² / n = 0.038416: (0.519208 ± √(0.038416 · (0.25 + 0.009604))) / 1.038416 for 50 of 100."""
    assert wilson(0.5, 100.0) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0.0, 20.0)[1] == pytest.approx(3.8416 / (20 + 3.8416))
    assert wilson(1.0, 20.0)[0] == pytest.approx(20 / (20 + 3.8416))


def test_few_pairs_cannot_tell_a_model_from_chance():
    """65% of 20 pairs may be chance, and 65% of 200 are not."""
    few = spoken("reward_model", summary={"held_out_accuracy": 0.65, "held_out_pairs": 20})
    assert "65% of 20 held-out pairs" in few[rules.no_better_than_chance][1]
    assert spoken("reward_model", summary={"held_out_accuracy": 0.65}) == {}


def test_a_model_that_follows_labels_by_length_has_no_shortcut():
    by_length = {"held_out_prefers_longer": 0.97, "held_out_longer_chosen": 0.95}
    assert spoken("reward_model", summary=by_length) == {}
    shorter = {"held_out_prefers_longer": 0.01}
    [(_, sentence)] = spoken("reward_model", summary=shorter).values()
    assert "the shorter side in 99% of 180 held-out pairs, and the labels in 45%" in sentence


def test_a_stage_that_had_a_better_evaluation_is_told_to_stop_earlier():
    """2.4 before, 2.1 at step 20, 2.6 at the end."""
    found = spoken(
        "sft", lambda s: {"held_out/loss": 2.1} if s == 20 else {}, {"held_out_loss": 2.6}
    )
    assert "Take fewer steps" in found[rules.worse_on_held_out][1]


def test_unpaired_preferences_have_no_chance_level():
    """Without `held_out_pairs` an accuracy of 0.5 says nothing."""
    end = {k: v for k, v in DPO_SUMMARY.items() if k not in PAIRS} | {"held_out_accuracy": 0.5}
    watch = Watch()
    assert all(watch.see(dpo(step)) == [] for step in range(1, STEPS))
    assert watch.finish(end) == []


def test_the_losses_of_rl_are_left_alone():
    """A PPO loss begins anywhere and may grow: RL records no `lr` of one optimizer."""
    watch = Watch()
    metrics = {"lr/actor": 1e-3}
    assert all(watch.see(metrics | {"loss": 0.01 * 2**step}) == [] for step in range(30))


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, -(10**400), True, "0.5", None, [1]])
def test_a_summary_that_cannot_be_right_is_left_out(value):
    history = History()
    history.finish({"held_out_loss": value, "held_out_pairs": 3})
    assert history.columns["held_out/pairs"] == [3.0]
    assert "held_out/loss" not in history.columns


@pytest.mark.parametrize("share", [-5.0, 7.0, 1e14])
def test_a_share_that_is_none_does_no_harm(share):
    watch = Watch()
    watch.finish(REWARD_MODEL_SUMMARY | {"held_out_accuracy": share, "held_out_lengths": 1e-9})


@pytest.fixture
def diverged(tmp_path):
    """The folder of a run whose SFT diverged; its reward model is fine."""
    folder = RunFolder.create_at(tmp_path / "run", {"config.resolved.toml": 'recipe = ["sft"]'})
    for stage, loss in (("sft", 6.4), ("reward_model", None)):
        folder.event("started", stage)
        healthy, end = HEALTHY[stage]
        for step in range(1, STEPS + 1):
            changed = {} if loss is None or step == 1 else {"loss": loss}
            folder.event("metrics", stage, step, metrics=healthy(step) | changed, seconds=0.1)
        ended = {} if loss is None else {"held_out_loss": loss}
        folder.event("finished", stage, summary=end | ended, seconds=1.0)
    folder.event("done")
    folder.close()
    return Run(folder.path)


def test_a_folder_is_read_as_the_running_stage_was(diverged):
    found = {(f.stage, f.rule, f.step) for f in diagnose(diverged).findings}
    assert found == {("sft", "loss_explodes", 5), ("sft", "worse_on_held_out", STEPS)}


def test_the_recorder_warns_at_the_end_of_a_stage_and_again_after_a_resume(tmp_path):
    folder = RunFolder.create_at(tmp_path / "run", {"config.resolved.toml": ""})
    recorder = StepRecorder(folder, "sft", IdTexts(), Watch())
    recorder.record(Progress(1, sft(1)), 0.1)
    resumed = StepRecorder(folder, "sft", IdTexts(), Watch())
    for one in (recorder, resumed):
        [sentence] = one.finish(SFT_SUMMARY | {"held_out_loss": 2.6})
        assert "rose from 2.4 to 2.6" in sentence
    folder.close()
    warnings = [(w["stage"], w["step"], w["rule"]) for w in Run(folder.path).warnings]
    assert warnings == [("sft", 1, "worse_on_held_out")] * 2


def test_a_rule_that_applies_is_quiet_or_fired_with_its_number(diverged):
    checks = diagnose(diverged).checks
    states = {check.rule: (check.metric, check.value, check.fired) for check in checks["sft"]}
    assert states == {
        "loss_explodes": ("loss", 6.4, True),
        "worse_on_held_out": ("held_out/loss", 6.4, True),
        "overfits": ("held_out/loss", 6.4, False),
    }
    quiet = {check.rule: check.value for check in checks["reward_model"] if not check.fired}
    assert quiet["no_better_than_chance"] == 0.82 and quiet["prefers_by_length"] == 0.6
    assert len(quiet) == len(checks["reward_model"]) == 6


def test_the_page_lists_rules_with_their_state(diverged):
    from starlette.testclient import TestClient

    from quartet.studio.app import make_app

    client = TestClient(make_app([diverged.path]), base_url="http://127.0.0.1:8700")
    page = client.get(f"/run/{diverged.name}/doctor").text
    rows = [re.sub("<.*?>", "|", row) for row in page.split("<tr>")]
    [fired] = [row for row in rows if row.startswith("|worse on held out")]
    assert "|fired|" in fired and "|held-out loss|" in fired and "|6.4|" in fired
    [quiet] = [row for row in rows if row.startswith("|memorised")]
    assert "|quiet|" in quiet and "|held-out pair accuracy|" in quiet
    missing = page.split("The stage has not recorded what they read")[1]
    assert "memorised" in missing and "worse on held out" not in missing


def test_the_command_prints_the_findings(diverged):
    from typer.testing import CliRunner

    from quartet.cli import app

    ended = CliRunner().invoke(app, ["doctor", str(diverged.path), "--json"])
    assert ended.exit_code == 3
    assert [f["rule"] for f in json.loads(ended.stdout)] == ["loss_explodes", "worse_on_held_out"]
