"""The time of a plan, by hand."""

import dataclasses
import json

import pytest

from quartet.config.toml import read_settings
from quartet.planning import seconds as planned
from quartet.planning.memory import policy_parameters
from quartet.planning.plan import plan, row_tokens, vocabulary
from quartet.planning.seconds import RATES, START_SECONDS
from quartet.recipes import recipe_path

SHAPE = ["policy.create.hidden_size=512", "policy.create.num_layers=8"]
ONE_ROW_BEFORE = [
    f"{stage}.{key}=1" for stage in ("sft", "reward_model") for key in ("steps", "batch_size")
]
LORA = 'policy.adapter={type = "lora", rank = 16}'


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(planned, "usable_cores", lambda: 2)


def config_with(*words):
    return read_settings(recipe_path("reviews"), list(words)).config


def operations(*words):
    """What the plan counts, and the parts of the policy: numbers in its blocks and in its head, and the tokens of a row."""
    config = config_with(*words)
    hidden = config.policy.create.hidden_size
    rate = RATES[256 if hidden >= 256 else 0]
    blocks = config.policy.create.num_layers * (
        4 * hidden**2 + 3 * hidden * config.policy.create.intermediate
    )
    head = policy_parameters(config, vocabulary(config)) - blocks
    made = plan(config)
    assert made.row_tokens == row_tokens(config)
    return (made.seconds - START_SECONDS) * rate * 2, blocks, head, made.row_tokens


@pytest.mark.parametrize("shape", [[], SHAPE])
def test_demonstrations(shape):
    """Six operations for each number of the blocks and token, and eight for each of the head and token of the answer."""
    found, blocks, head, (prompt, response) = operations(
        'recipe="sft"', "sft.steps=5", "sft.batch_size=4", *shape
    )
    expected = 20 * (6 * blocks * (prompt + response) + 8 * head * response)
    assert found == pytest.approx(expected, rel=1e-6)
    found, *_ = operations('recipe="sft"', "sft.steps=5", "sft.batch_size=4", LORA, *shape)
    expected = 20 * (5 * blocks * (prompt + response) + 4 * head * response)
    assert found == pytest.approx(expected, rel=1e-6)


def test_comparisons_have_two_sides_and_no_head():
    found, blocks, _, row = operations(
        'recipe="reward_model"', "reward_model.steps=5", "reward_model.batch_size=4"
    )
    assert found == pytest.approx(40 * 6 * blocks * sum(row), rel=1e-6)


def test_groups_share_a_prompt_and_read_a_reference_and_a_reward_in_python():
    """Three steps of 2 prompts with 4 answers; two epochs."""
    found, blocks, head, (prompt, response) = operations(
        'recipe="grpo"', 'algorithm={preset="grpo"}', 'reward=[{type="gold"}]', "run.steps=3",
        "rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "optim.epochs=2",
    )  # fmt: skip
    row = prompt + response
    sampled = 2 * (6 * prompt * blocks + 24 * response * (blocks + head))
    scored = 2 * 24 * (row * blocks + response * head)
    trained = 2 * 24 * (6 * row * blocks + 8 * response * head)
    assert found == pytest.approx(sampled + scored + trained, rel=1e-6)


def test_ppo_has_a_critic_and_a_reward_model():
    found, blocks, head, (prompt, response) = operations(
        "run.steps=3", "rollout.prompts_per_step=8", "optim.epochs=2",
        *ONE_ROW_BEFORE,
    )  # fmt: skip
    row = prompt + response
    before = 18 * row * blocks + 8 * response * head  # a demonstration, and two sides
    sampled = 2 * (24 * prompt * blocks + 24 * response * (blocks + head))
    scored = 2 * 24 * (3 * row * blocks + response * head)
    trained = 2 * 24 * (2 * 6 * row * blocks + 8 * response * head)
    assert found == pytest.approx(before + sampled + scored + trained, rel=1e-6)


def test_online_preference_data_are_sampled_and_scored_before_they_are_trained_on():
    """Three steps of 4 prompts with two answers each."""
    found, blocks, head, (prompt, response) = operations(
        'recipe=["sft", "reward_model", "online_dpo"]', "preference.steps=3", "preference.batch_size=4",
        *ONE_ROW_BEFORE,
    )  # fmt: skip
    row = prompt + response
    before = 18 * row * blocks + 8 * response * head  # a demonstration, and two sides
    sampled = 2 * (12 * prompt * blocks + 24 * response * (blocks + head))
    scored = 2 * 24 * (2 * row * blocks + response * head)  # by the reference and the reward model
    trained = 24 * (6 * row * blocks + 8 * response * head)
    assert found == pytest.approx(before + sampled + scored + trained, rel=1e-6)


def test_a_folder_says_how_large_the_head_is(tmp_path):
    """Embeddings of another size than the head cost nothing: a token is looked up in them."""
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "vocab_size": 100,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False} | shape)
    )
    config = config_with('recipe="sft"', "sft.steps=5", "sft.batch_size=4")
    config = dataclasses.replace(
        config, policy=dataclasses.replace(config.policy, create=None, model=str(folder))
    )
    blocks, (prompt, response) = 2 * (4 * 16**2 + 3 * 16 * 24), (10.0, 20.0)
    found = planned.seconds(config, 10_000, (prompt, response), {"sft": 600.0})
    expected = 20 * (6 * blocks * 30 + 8 * 100 * 16 * 20)
    assert (found - START_SECONDS) * RATES[0] * 2 == pytest.approx(expected, rel=1e-6)


def test_a_run_has_the_threads_that_it_is_given_and_no_more_than_there_are_cores(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    config = config_with()
    times = {}
    for threads in ("1", "2", "64"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        times[threads] = plan(config).seconds - START_SECONDS
    assert times["1"] == pytest.approx(2 * times["2"]) == pytest.approx(4 * times["64"])
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert plan(config).seconds - START_SECONDS == pytest.approx(times["2"])
