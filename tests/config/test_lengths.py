"""How long a stage before RL is: in optimizer steps, or in epochs over its rows."""

import json

import pytest
from typer.testing import CliRunner

from quartet.assembly import build
from quartet.cli import app
from quartet.config.rules import untrained_filter
from quartet.config.tables import DEFAULT_STEPS, Sft
from quartet.config.toml import ConfigError, read_settings, resolved_toml
from quartet.planning.plan import num_steps, plan
from quartet.recipes import recipe_path
from quartet.runtime.resume import steps_of
from quartet.worlds.labelled_texts import LabelledTexts
from tests.worlds.test_labelled_texts import labelled

TOML = """
recipe = "sft"
data.train = "{file}"
data.unusable = "drop"
[policy]
create = {{ type = "llama", num_layers = 1, hidden_size = 16, num_heads = 2 }}
tokenizer = {{ type = "train", vocab_size = 300 }}
[sft]
batch_size = 4
{length}
"""


@pytest.fixture
def settings(tmp_path):
    """Settings of SFT on 20 rows, of which 2 are held out and 1 cannot be used."""
    rows = [{"prompt": f"{n} and one is", "completion": f" {n + 1}."} for n in range(20)]
    rows[3]["completion"] = " "
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))

    def of(length, *words):
        (tmp_path / "sft.toml").write_text(TOML.format(file=file, length=length))
        return read_settings(tmp_path / "sft.toml", words)

    return of


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(3.0, 700, 132), (0.5, 64, 2), (1.0, 64, 4), (0.01, 16, 1)]
)
def test_epochs_are_steps_rounded_up(epochs, rows, steps):
    assert Sft(epochs=epochs, batch_size=16).num_steps(rows) == steps


def test_a_length_that_is_not_said_is_the_default():
    assert Sft().steps == Sft().num_steps(7) == DEFAULT_STEPS
    assert Sft(epochs=2.0).steps is None


def test_the_rows_that_are_used_are_counted(settings):
    job = build(settings("epochs = 3").config)
    assert "sft: 3 epochs of 17 rows = 13 steps of 4" in job.notes
    assert job.stages[0].num_steps == steps_of(job.config)["sft"] == 13
    assert "epochs" not in job.made_with["config"]["sft"], "a checkpoint knows the steps"
    same = build(settings("steps = 13").config)
    assert same.made_with["config"] == job.made_with["config"]
    assert not any("epoch" in note for note in same.notes)


def test_a_plan_counts_the_rows_of_the_files(settings):
    assert num_steps(settings("epochs = 2").config, "sft") == 9
    assert num_steps(settings("steps = 7").config, "sft") == 7


def test_the_command_line_replaces_the_length_of_a_file(settings):
    replaced = settings("steps = 5", "sft.epochs=2")
    assert (replaced.config.sft.steps, replaced.config.sft.epochs) == (None, 2.0)
    assert "\nsteps =" not in resolved_toml(replaced)
    replaced = settings("epochs = 5", "sft.steps=2")
    assert (replaced.config.sft.steps, replaced.config.sft.epochs) == (2, None)


def test_a_length_is_given_once(settings):
    sentence = r"sft.epochs = 3: sft.steps = 5 is there already. Take one of the two out."
    with pytest.raises(ConfigError, match=sentence):
        settings("steps = 5\nepochs = 3")
    with pytest.raises(ConfigError, match=sentence):
        settings("", "sft.steps=5", "sft.epochs=3")


def test_the_steps_of_rl_leave_the_epochs_over_its_experience_alone():
    changed = read_settings(recipe_path("sums"), ["run.steps=2"], "recipe sums").config
    assert (changed.run.steps, changed.optim.epochs) == (2, 1)


def test_a_plan_counts_the_texts_that_a_file_of_labels_has(tmp_path):
    """3 of 10 texts train, and the world makes as many pairs of them as data.rows says."""
    file = labelled(tmp_path / "texts.jsonl")
    words = [
        f'data.texts="{file}"',
        "policy.model=m",
        "sft.epochs=2",
        "sft.batch_size=10",
        "reward_model.epochs=1",
        "reward_model.batch_size=10",
    ]
    read = read_settings(recipe_path("film-reviews"), [*words, "data.rows=5000"])
    texts = LabelledTexts(read.config.seed, str(file)).demonstrations(5000)
    assert 100 < len(texts) < 700
    assert num_steps(read.config, "sft") == -(-2 * len(texts) // 10)
    assert num_steps(read.config, "reward_model") == 500


def test_a_plan_counts_the_copy_of_the_best_weights():
    words = ["recipe=sft", "sft.eval_every=1"]
    last, best = (
        plan(read_settings(recipe_path("sums"), [*words, f'sft.keep="{keep}"']).config)
        for keep in ("last", "best")
    )
    copy = 4 * last.models["policy"]
    assert best.memory["sft"] - last.memory["sft"] == pytest.approx(copy)
    kept = read_settings(recipe_path("sums"), words).config.run.keep_last + 1
    assert best.disk - last.disk == pytest.approx(copy * kept)


def test_a_plan_refuses_a_filter_that_is_not_trained_as_a_run_does(monkeypatch):
    done = CliRunner().invoke(app, ["plan", "sums", "rollout.top_k=5"])
    config = read_settings(recipe_path("sums"), ["rollout.top_k=5"]).config
    assert done.exit_code == 2
    assert " ".join(done.output.split()) == untrained_filter(config)
    assert "rollout.min_new_tokens = 3" in str(
        untrained_filter(read_settings(recipe_path("sums"), ["rollout.min_new_tokens=3"]).config)
    )


def test_several_reward_models_on_the_command_line_are_an_ensemble():
    read = read_settings(recipe_path("reviews"), ["reward_model.members=3"], "recipe reviews")
    assert [source.type for source in read.config.reward] == ["ensemble"]
    [note] = read.notes
    assert note.startswith("recipe reviews:") and "the mean of the 3 reward models" in note
    alone = read_settings(recipe_path("reviews"), ["reward_model.members=1"])
    assert [source.type for source in alone.config.reward] == ["model"] and not alone.notes
    with pytest.raises(ConfigError, match="the run trains 3 reward models"):
        read_settings(recipe_path("reviews"), ["reward_model.members=3", "reward.0.type=model"])
