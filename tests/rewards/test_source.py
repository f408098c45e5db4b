"""A user's own source of rewards: its settings, its name, how it fails."""

import pytest
import torch
from pydantic import ValidationError

import quartet
from quartet.config.toml import read_settings
from quartet.recipes import recipe_path
from quartet.rewards.protocol import RewardError, TokenReward
from quartet.rewards.source import RewardContext
from quartet.rewards.sources import PatternSource
from tests.support.world import prompts, rollout

CONTEXT = RewardContext(None, lambda ids: [], 1000, torch.device("cpu"))


class Long(quartet.RewardSource):
    """The number of characters, up to a limit."""

    limit: int = quartet.Field(default=3, ge=1, description="Characters that count.")

    def __call__(self, rollouts):
        return [min(len(r.response), self.limit) for r in rollouts]


class Broken(quartet.RewardSource):
    def __call__(self, rollouts):
        return ["many" for _ in rollouts]


def test_an_own_source_is_a_reward_with_checked_settings():
    source = Long(limit=2, weight=0.5)
    reward = source.make(CONTEXT)
    assert reward.score([rollout(prompts(1)[0], (5, 6), 0.0)]) == [2.0]
    assert source.weight == 0.5 and not isinstance(reward, TokenReward)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Long(limit=0)


def test_an_own_source_is_called_by_its_class():
    assert Long().type.endswith("test_source.py:Long")
    assert Long().called == "Long" and Long(name="length").called == "length"
    assert PatternSource(pattern="x").called == "pattern"


def test_a_source_that_returns_no_numbers_is_named():
    with pytest.raises(RewardError, match="reward Broken failed: ValueError"):
        Broken().make(CONTEXT).score([rollout(prompts(1)[0], (5,), 0.0)])


def test_the_sources_of_the_family_are_the_types_of_the_reward_table():
    word = f'reward=[{{type="{__file__}:Long", limit=7}}, {{type="pattern", pattern="x"}}]'
    config = read_settings(recipe_path("sums"), [word], "recipe sums").config
    assert [type(source).__name__ for source in config.reward] == ["Long", "PatternSource"]
    assert config.reward[0].limit == 7
