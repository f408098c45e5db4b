"""The sentence about learning rates that are too high for all weights of a pretrained model."""

import pytest

from quartet.assembly import assembler
from quartet.assembly.assembler import Assembler, high_rates
from quartet.config.toml import read_settings
from quartet.models.language_model import save
from quartet.recipes import recipe_path
from tests.support.world import model, tokenizer

LARGE, SMALL = 270_000_000, 2_000_000


def config(*words):
    return read_settings(recipe_path("dialogue"), ["data.train=x", "policy.model=m", *words]).config


def test_all_weights_at_the_rates_of_an_adapter_are_named():
    words = high_rates(config("policy.adapter=none"), LARGE)
    assert words.startswith(
        "sft.lr = 0.0002 (default 1e-05), reward_model.lr = 0.0003 (default 1e-05), "
        "optim.lr = 0.0001 (default 1e-06), optim.critic_lr = 0.0003 (default 1e-05): high"
    )
    assert high_rates(config("policy.adapter=none"), None) == words  # a model of the hub


def test_of_tables_that_the_recipe_does_not_read_nothing_is_said():
    words = high_rates(config("policy.adapter=none", "recipe=sft"), LARGE)
    assert words.startswith("sft.lr") and "reward_model" not in words and "optim" not in words


FINE = ["sft.lr=1e-4", "reward_model.lr=1e-4", "optim.lr=1e-5", "optim.critic_lr=1e-4"]


@pytest.mark.parametrize(
    ("words", "parameters"),
    [
        ([], LARGE),  # with the adapter
        (["policy.adapter=none"], SMALL),
        (["policy.adapter=none", *FINE], LARGE),
        (["policy.adapter=none", *FINE, "sft.lr=0.02", "sft.optimizer=muon"], LARGE),
    ],
)
def test_silent(words, parameters):
    assert high_rates(config(*words), parameters) is None


def test_silent_for_a_model_of_random_weights():
    made = read_settings(recipe_path("reviews")).config
    assert high_rates(made, LARGE) is None


def test_a_run_says_it_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(assembler, "PRETRAINED", 1)
    save(model(), tokenizer(), tmp_path / "m")
    made = read_settings(recipe_path("reviews"), [f"policy.model={tmp_path / 'm'}", "data.rows=8"])
    assert any(note.startswith("sft.lr = ") for note in Assembler(made.config).notes())
