"""`quartet explain KEY`: what a setting means, from its declaration."""

import dataclasses
import re

import pytest

from quartet.config.explain import key_in_words, setting_in_words, types_of
from quartet.config.suggestions import description_of, keys_of, known_keys
from quartet.errors import QuartetError
from quartet.sweeps.spec import SweepSpec
from tests.support.command import quartet


def test_a_number_has_its_bounds_its_default_and_its_description():
    assert setting_in_words("optim.lr").splitlines() == [
        "optim.lr   a number, > 0, default 1e-06",
        "The actor's highest learning rate.",
    ]


def test_a_key_of_parts_has_a_line_for_each_type_that_has_it():
    lines = setting_in_words("algorithm.kl.coef").splitlines()
    assert lines[:2] == [
        'algorithm.kl.coef   a number, ≥ 0, default 0.05   where type = "in_reward"',
        'algorithm.kl.coef   a number, ≥ 0, default 0.04   where type = "in_loss"',
    ]


def test_a_table_lists_its_types_and_keys():
    lines = setting_in_words("algorithm.kl.controller").splitlines()
    assert any(line.startswith('  type = "adaptive"') for line in lines)
    assert any(line.split()[:1] == ["algorithm.kl.controller.target"] for line in lines)
    assert "  optim.critic_lr" in "\n".join(
        line[:17] for line in setting_in_words("optim").split("\n")
    )


def test_the_type_of_a_part_is_explained_by_what_there_is():
    lines = setting_in_words("critic.type").splitlines()
    assert lines[0] == 'critic.type   "separate" or "shared"'
    assert [line.split("   ")[0].strip() for line in lines[1:]] == [
        'type = "separate"',
        'type = "shared"',
    ]
    assert len(setting_in_words("reward.type").splitlines()) == 1 + len(types_of("reward"))


@pytest.mark.parametrize("key", known_keys())
def test_every_key_can_be_explained(key):
    words = setting_in_words(key)
    assert words.startswith(f"{key}   ") and not re.search(r"<\w|\bobject at", words)


def test_the_table_of_a_sweep_can_be_explained():
    words = key_in_words("sweep", "sweep", SweepSpec).splitlines()
    assert words[0] == "sweep   a table" and len(words) == 2 + len(dataclasses.fields(SweepSpec))
    for key in keys_of(SweepSpec, "sweep."):
        first, second, *_ = key_in_words(key, "sweep", SweepSpec).splitlines()
        assert first.startswith(f"{key}   ") and len(second.split()) > 2
    assert key_in_words("sweep.parallel", "sweep", SweepSpec).startswith(
        "sweep.parallel   a whole number, ≥ 1, default 1\nHow many runs are under way at once"
    )
    assert "  sweep.prune.startup  Trials that" in key_in_words("sweep.prune", "sweep", SweepSpec)
    with pytest.raises(QuartetError, match=r"sweep\.seed: no such key\. Did you mean sweep\.seeds"):
        key_in_words("sweep.seed", "sweep", SweepSpec)


@pytest.mark.slow
def test_what_is_unknown_is_answered_with_what_was_meant(tmp_path):
    with pytest.raises(
        QuartetError, match=r"critic\.lr: no such key\. Did you mean optim\.critic_lr\?"
    ):
        setting_in_words("critic.lr")
    for word, meant in (
        ("grppo", "Did you mean grpo?"),
        ("optim.learning_rate", "optim.lr"),
        ("lr", "Did you mean sft.lr, reward_model.lr, preference.lr, ilql.lr or optim.lr?"),
    ):
        result = quartet("explain", word, cwd=tmp_path)
        assert result.returncode == 2 and meant in result.stderr


@pytest.mark.parametrize("key", known_keys())
def test_every_key_says_in_a_sentence_what_it_means(key):
    """A table has its class's, or its keys; a type lists what it may be."""
    words = description_of(key.split("."))
    is_table = any(other.startswith(f"{key}.") for other in known_keys())
    if is_table or key.endswith(".type") or key == "algorithm.preset":
        assert len(setting_in_words(key)) > len(key) + 20
    else:
        assert words and words[-1] in ".)", key
