"""The names of other libraries' options, and keys in the wrong place, are answered with ours."""

import re

import pytest

from quartet.config.other_libraries import answer_to, answers
from quartet.config.suggestions import known_keys
from quartet.config.toml import ConfigError, read_settings
from quartet.recipes import recipe_path

TABLES = {key for key in known_keys() if "." not in key}


def refusal(recipe, *words):
    with pytest.raises(ConfigError) as error:
        read_settings(recipe_path(recipe), words, f"recipe {recipe}")
    return str(error.value)


@pytest.mark.parametrize("name", sorted(answers()))
def test_an_answer_names_keys_that_exist_or_says_why_there_is_none(name):
    answer = answers()[name]
    assert set(answer.keys) <= set(known_keys())
    assert answer.keys or answer.note
    assert not answer.note or answer.note.endswith((".", "--resume"))
    for key in re.findall(r"\b[a-z_]+(?:\.[a-z_0-9]+)+\b", answer.note):
        if key.partition(".")[0] in TABLES:
            assert key in known_keys(), key


def test_the_table_is_large_and_answers_no_key_of_ours():
    assert len(answers()) >= 120
    assert not set(answers()) & (set(known_keys()) - {"epochs"})


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("num_generations", "rollout.samples_per_prompt"),
        ("actor_rollout_ref.rollout.n", "rollout.samples_per_prompt"),
        ("data.train_batch_size", "rollout.prompts_per_step"),
        ("train_batch_size", "optim.minibatches"),
        ("init_kl_coef", "algorithm.kl.coef"),
    ],
)
def test_the_longest_ending_of_a_key_counts(key, ours):
    assert answer_to(key).keys[0] == ours


@pytest.mark.parametrize(
    ("recipe", "word", "sentence"),
    [
        ("reviews", "preference.beta=1", "preference.beta: no such key. Did you mean preference.loss.beta?"),
        ("reviews", "critic.lr=1", "critic.lr: no such key. Did you mean optim.critic_lr?"),
        ("reviews", "policy.dtype=bf16", "policy.dtype: no such key. Did you mean run.precision?"),
        ("reviews", "policy.lr=1", "policy.lr: no such key. Did you mean optim.lr, sft.lr or reward_model.lr?"),
        ("reviews", "optim.learnig_rate=1", "optim.learnig_rate: no such key. Did you mean optim.lr?"),
        ("reviews", "algorithm.beta=1", "algorithm.beta: no such key. Did you mean algorithm.kl.coef?"),
        ("reviews", "preset=dapo", "preset: no such key. Did you mean algorithm.preset?"),
        ("reviews", "data.optim.lr=1", "data.optim.lr: no such key. Did you mean optim.lr? [data] has no keys of other tables."),
        ("reviews", "trainer.total_epochs=1", "trainer.total_epochs: no such key. Did you mean run.steps or sft.epochs?"),
        ("reviews", "ref.model_name_or_path=x", "ref.model_name_or_path: no such key. Did you mean reference.model?"),
        ("sums", "per-device-train-batch-size=1", "per-device-train-batch-size: no such key. Did you mean rollout.prompts_per_step or sft.batch_size? It is"),
        ("sums", "beta=1", "beta: no such key. Did you mean algorithm.kl.coef?"),
        ("sums", "trust_remote_code=true", "trust_remote_code: no such key. Quartet runs no code from model folders"),
        ("sums", "reward.0.pattern=1", 'reward.0.pattern: no such key for type = "exact"; "pattern" has it. Take it out, or set the type.'),
        ("sums", "reward.0.foo=1", "reward.0.foo: no such key. reward.0 has answer, name, type, weight."),
        ("sums", "launch.foo=1", "launch.foo: no such key. launch has address, deadline, processes, restarts, shard, type."),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_place_is_answered_with_the_right_one(recipe, word, sentence):
    assert refusal(recipe, word).startswith(f"command line: {sentence}")


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm.preset=dapo"],
        ['recipe=["sft", "dapo", "evaluation"]'],
        ['recipe=["sft", "dapo", "evaluation"]', "algorithm.preset=dapo"],
    ],
)
def test_a_preset_on_the_command_line_takes_the_settings_of_replaced_parts_away(words):
    made = read_settings(recipe_path("sums"), words, "recipe sums")
    assert made.config.recipe == ("sft", "dapo", "evaluation")
    assert made.config.algorithm.kl.type == "none"
    assert made.notes == (
        'recipe sums:31: algorithm.kl is left out: it is for "in_loss" of grpo, and dapo has '
        '"none".',
    )


def test_a_preset_on_the_command_line_keeps_the_settings_of_parts_of_the_same_type():
    made = read_settings(recipe_path("sums"), ["algorithm.preset=reinforce_pp_baseline"], "sums")
    assert made.config.algorithm.kl.coef == 0.01 and made.notes == ()
    typed = ["algorithm.preset=dapo", "algorithm.kl.type=in_loss"]
    made = read_settings(recipe_path("sums"), typed, "sums")
    assert made.config.algorithm.kl.coef == 0.01 and made.notes == ()


def test_two_presets_on_the_command_line_must_be_the_same():
    words = ["algorithm.preset=dapo", 'recipe=["sft", "rloo", "evaluation"]']
    assert "Make them the same" in refusal("sums", *words)
