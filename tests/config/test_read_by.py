"""The table of which stages read which settings."""

import pytest

from quartet.config.read_by import CHANGES_NOTHING_LEARNT, READ_BY, ROLES, roles_that_read
from quartet.config.suggestions import keys_of
from quartet.config.tables import Config
from quartet.config.toml import ConfigError, settings_of_table

PPO = {
    "recipe": ["sft", "ppo"],
    "policy": {"model": "m"},
    "data": {"train": "p.jsonl"},
    "reward": [{"type": "model", "model": "rm"}],
}
RECIPES = {
    "sft": {"recipe": ["sft"]},
    "ppo": {"recipe": ["ppo"]},
    "ptx": {"recipe": ["ppo"], "algorithm": {"ptx": {"coef": 1.0}}},
    "sft and ppo": {"recipe": ["sft", "ppo"]},
    "dpo": {"recipe": ["dpo"]},
    "online dpo": {"recipe": ["online_dpo"]},
    "reward model": {"recipe": ["reward_model"]},
    "evaluated dpo": {"recipe": ["dpo", "evaluation"]},
}


def config(recipe: str) -> Config:
    table = PPO | RECIPES[recipe]
    if recipe in {"sft", "dpo", "reward model"}:
        del table["reward"]
    return settings_of_table(table, "x", "here").config


def test_the_table_names_keys_and_roles_that_there_are():
    known = set(keys_of(Config))
    assert set(READ_BY) <= known and known >= CHANGES_NOTHING_LEARNT
    assert all(roles is None or roles <= ROLES for roles in READ_BY.values())


@pytest.mark.parametrize(
    ("recipe", "key", "stages"),
    [
        ("sft", "sft.lr", ("sft",)),
        ("sft", "run.steps", ()),
        ("sft", "optim.lr", ()),
        ("sft", "data.sampling.least", ()),
        ("sft", "data.rows", ("sft",)),
        ("sft and ppo", "data.sampling.type", ("ppo",)),
        ("sft", "optim.micro_batch_tokens", ("sft",)),
        ("sft", "rollout.temperature", ()),
        ("sft and ppo", "seed", ("sft", "ppo")),
        ("sft and ppo", "optim.lr", ("ppo",)),
        ("ppo", "sft.data", ()),
        ("ptx", "sft.data", ("ppo",)),
        ("ptx", "sft.lr", ()),
        ("dpo", "reward.0.weight", ()),
        ("online dpo", "reward.0.weight", ("online_dpo",)),
        ("online dpo", "critic.init", ()),
        ("reward model", "rollout.temperature", ("reward_model",)),
        ("evaluated dpo", "reward", ("evaluation",)),
        ("evaluated dpo", "evaluation.best_of", ("evaluation",)),
    ],
)
def test_the_stages_that_read_a_key(recipe, key, stages):
    assert config(recipe).readers(key) == stages
    assert config(recipe).reads(key) == bool(stages)


def test_what_no_stage_owns_is_read_by_the_whole_run():
    assert roles_that_read("seed") is None and roles_that_read("data.rows") is None
    assert config("sft").reads("run.device")


def test_settings_of_an_evaluation_are_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"evaluation.best_of: no stage of this recipe reads it"):
        settings_of_table(PPO | {"evaluation": {"best_of": 4}}, "x", "here")
