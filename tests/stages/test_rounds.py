"""Rounds of labels in one run: names and folders by hand, and a run of two rounds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from quartet.assembly import Assembler, stage
from quartet.assembly.checkpoint_models import write_models
from quartet.cli.common import app
from quartet.cli.label import labels_path, pairs_of
from quartet.config.tables import Config
from quartet.config.toml import ConfigError, read_settings
from quartet.data.files import rows
from quartet.recipes import recipe_path
from quartet.runs.doctor import examine
from quartet.runs.label_tables import labelled_run
from quartet.runs.rounds import in_round, round_of
from quartet.runtime.resume import steps_of
from quartet.stages.kinds import LABEL, REWARD_MODEL, RL, kind_of
from quartet.stages.rounds import Round, rounds_of
from quartet.studio.report import report
from tests.support.tiny_run import ROUND

TWO = ["sft", *ROUND, *ROUND, "evaluation"]


def test_earlier_rounds_have_folders_of_their_own_and_the_last_one_has_the_runs():
    run = Path("run")
    rounds = [Round(number, 3) for number in (1, 2, 3)]
    assert [each.folder(run) for each in rounds] == [run / "round-1", run / "round-2", run]
    assert [each.before(run) for each in rounds] == [None, run / "round-1", run / "round-2"]
    assert Round().folder(run) == run and Round().before(run) is None


def test_the_stages_of_later_rounds_are_numbered():
    assert [in_round("ppo", number) for number in (1, 2)] == ["ppo", "ppo.2"]
    assert [round_of(name) for name in ("ppo", "ppo.2", "reward_model-1", "a.b")] == [
        ("ppo", 1),
        ("ppo", 2),
        ("reward_model-1", 1),
        ("a.b", 1),
    ]
    assert [kind_of(f"{name}.2") for name in ROUND] == [LABEL, REWARD_MODEL, RL]
    assert REWARD_MODEL.folders("reward_model.2") == ("reward_model",)
    assert rounds_of(TWO) == [("sft", *ROUND), (*ROUND, "evaluation")]
    assert rounds_of(["sft", "ppo"]) == [("sft", "ppo")]


def settings(*words):
    return read_settings(recipe_path("labelled-reviews"), list(words)).config


def test_a_recipe_of_three_rounds_has_ten_stages_and_rl_steps_that_count_on():
    config: Config = settings(f"recipe={['sft', *ROUND * 3]}", "run.steps=5")
    assert config.num_rounds == 3
    assert config.stages[-3:] == ("label.3", "reward_model.3", "ppo.3")
    assert len(set(config.stages)) == 10
    steps = steps_of(config)
    assert [steps[name] for name in ("ppo", "ppo.2", "ppo.3")] == [5, 10, 15]
    assert steps["label.3"] == 200 and steps["reward_model.2"] == 60


REFUSED = {
    "no label": (["sft", *ROUND, "reward_model", "ppo"], "Only label begins another round"),
    "another order": ([*ROUND, "label", "ppo", "reward_model"], "the same three stages"),
    "another algorithm": ([*ROUND, "label", "reward_model", "grpo"], "the same three stages"),
    "sft between": ([*ROUND, "sft", *ROUND], "Only label begins another round"),
    "evaluation between": ([*ROUND, "evaluation", *ROUND], "the same three stages"),
    "no RL stage": (["label", "reward_model", *ROUND], "the same three stages"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_no_recipe_of_rounds_is_refused(case):
    recipe, sentence = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        settings(f"recipe={recipe}")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def run(two_rounds):
    return two_rounds


@pytest.mark.slow
def test_labels_of_all_rounds_are_what_the_last_reward_model_is_trained_on(run):
    assert list(run.series) == ["sft", "label", "reward_model", "ppo", "label.2", "reward_model.2",
                                "ppo.2", "evaluation"]  # fmt: skip
    first, last = (list(rows(place / "comparisons")) for place in (run.path / "round-1", run.path))
    assert [row for _, row in last[: len(first)]] == [row for _, row in first]
    assert len(last) > len(first)
    lines = (run.path / "label" / "pairs.jsonl").read_text().splitlines()
    sources = [json.loads(line)["source"] for line in lines]
    assert all(source.startswith("label.2: ") for source in sources)
    config = read_settings(run.path / "config.resolved.toml").config
    labelled = stage(Assembler(config), "reward_model.2").labelled(run.path)
    assert len(labelled.train) + len(labelled.held_out) == len(last)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_policy_and_reward_model_continue_and_the_reference_stays(run):
    config = read_settings(run.path / "config.resolved.toml").config
    assembler = Assembler(config)
    second = stage(assembler, "ppo.2").load_components(run.path).learner
    of = dict(second.models.actor.named_parameters())
    before = weights(run.path / "round-1" / "policy")
    assert all(torch.equal(of[name], value) for name, value in before.items())
    reference = dict(second.reference.named_parameters())
    sft = weights(run.path / "sft")
    assert all(torch.equal(reference[name], value) for name, value in sft.items())
    assert any(not torch.equal(sft[name], value) for name, value in before.items())
    reward_model, policy = stage(assembler, "reward_model.2").load_models(run.path, 0)
    earlier = weights(run.path / "round-1" / "reward_model")
    parameters = dict(reward_model.model.named_parameters()) | {
        f"score.{name}": value for name, value in reward_model.head.named_parameters()
    }
    shared = [name for name in earlier if name in parameters]
    assert len(shared) > 5 and all(torch.equal(parameters[n], earlier[n]) for n in shared)
    assert all(p.requires_grad for p in reward_model.parameters())
    asked = dict(policy.named_parameters())
    assert all(torch.equal(asked[name], value) for name, value in before.items())


@pytest.mark.slow
def test_rl_steps_count_on_and_readers_show_every_round(run):
    assert [list(run.series[name].steps) for name in ("ppo", "ppo.2")] == [[1, 2], [3, 4]]
    assert run.steps() == [1, 2, 3, 4] and run.rl_stage == "ppo.2"
    assert run.series["ppo"].columns["kl"][0] == pytest.approx(0, abs=1e-5)
    assert run.series["ppo.2"].columns["kl"][0] > 1e-4, "it is measured to the SFT policy"
    rules = {"reference_differs", "does_not_start_at_the_reference"}
    assert not [finding for finding in examine(run) if finding.rule in rules]
    page = report(run)
    assert ">reward model.2</h2>" in page and ">ppo.2</h2>" in page
    labelled = labelled_run(run)
    assert labelled.wanted == 48 and len(labelled.labels) == 48 and not labelled.problems
    assert labels_path(run.path) == run.path / "label" / "labels.jsonl"
    for step in ("2", "4"):
        answer = CliRunner().invoke(app, ["replay", str(run.path), "--step", step])
        assert answer.exit_code == 0, answer.output
        assert "every metric is the recorded one, to the bit" in answer.output


@pytest.mark.slow
def test_labellers_get_the_pairs_of_the_round_that_waits(run, tmp_path):
    (tmp_path / "round-1").mkdir()
    (run.path / "round-1" / "label").rename(tmp_path / "round-1" / "label")
    try:
        assert labels_path(tmp_path) == tmp_path / "round-1" / "label" / "labels.jsonl"
        found = pairs_of(tmp_path, None, 0)
    finally:
        (tmp_path / "round-1" / "label").rename(run.path / "round-1" / "label")
    assert found and all(pair.source.startswith("label: ") for pair in found)


@pytest.mark.slow
def test_the_models_of_a_checkpoint_of_an_earlier_round(run, tmp_path):
    for name, place in (("ppo-000002", run.path / "round-1"), ("ppo.2-000004", run.path)):
        scratch = tmp_path / name
        scratch.mkdir()
        write_models(run.path, run.path / "checkpoints" / name, scratch)
        mine, theirs = weights(scratch / "policy"), weights(place / "policy")
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
        assert not any(path.is_symlink() for path in scratch.rglob("*"))
    assert (run.path / "round-1" / "reward_model").is_dir()


@pytest.mark.slow
def test_the_models_of_every_round_have_cards_with_what_was_known_then(run):
    cards = {
        place: (run.path / place / "README.md").read_text()
        for place in ("round-1/reward_model", "reward_model", "round-1/policy", "policy")
    }
    accuracy = {
        name: run.summary(name)["held_out_accuracy"] for name in ("reward_model", "reward_model.2")
    }
    for place, name in (
        ("round-1/reward_model", "reward_model"),
        ("reward_model", "reward_model.2"),
    ):
        assert f"value: {accuracy[name]}" in cards[place].split("---")[1]
    assert "reward model.2" not in cards["round-1/reward_model"]
    assert "reward model.2" in cards["reward_model"]
    assert "ppo.2" not in cards["round-1/policy"] and "ppo.2" in cards["policy"]
    assert "win_rate" not in cards["round-1/policy"] and "win_rate" in cards["policy"]
    assert "`../../config.resolved.toml`" in cards["round-1/policy"]
    assert cards["policy"].split("---")[1].count("- label\n") == 1


@pytest.mark.slow
def test_a_model_of_an_earlier_round_is_exported_with_its_settings(run, tmp_path):
    words = ["export", str(run.path / "round-1"), "--to", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    mine, theirs = weights(tmp_path / "out"), weights(run.path / "round-1" / "policy")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert "All settings: `config.resolved.toml`" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "config.resolved.toml").is_file()


@pytest.mark.slow
def test_inspect_prints_the_probes_of_every_round(run):
    for step in ("0", "1", "4"):
        words = ["inspect", str(run.path), "--probes", "--step", step, "--sample", "0"]
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output
