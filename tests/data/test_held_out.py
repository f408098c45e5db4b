"""How many held-out rows there are, and which."""

import json

import pytest

from quartet.assembly.data import Rows, spread
from quartet.config.tables import Config
from quartet.config.toml import read_settings
from quartet.data.examples import Example
from quartet.recipes import recipe_path
from quartet.worlds import WORLDS


def config(*words: str) -> Config:
    return read_settings(recipe_path("reviews"), ["policy.model=m", *words]).config


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def test_rows_are_spread_evenly():
    rows = [Example(str(i), "p") for i in range(10)]
    assert [row.id for row in spread(rows, 4)] == ["0", "2", "5", "7"]
    assert spread(rows[:3], 4) == rows[:3]


def test_a_file_holds_out_its_share_and_at_most_so_many_are_evaluated(pairs):
    words = ["data.world=none", f"data.train={pairs}", "data.held_out=0.4", "reward.0.type=number"]
    train, held_out = Rows(config(*words), None).read("comparisons")
    assert (len(train), len(held_out)) == (60, 40)
    train, held_out = Rows(config(*words, "data.held_out_rows=4"), None).read("comparisons")
    # what is not evaluated is not trained on either
    assert len(train) == 60 and [row.prompt for row in held_out] == ["p60", "p70", "p80", "p90"]


def test_prompts_are_as_many_as_evaluation_prompts_says(pairs):
    words = [
        "data.world=none",
        f"data.train={pairs}",
        "data.held_out_rows=4",
        "reward.0.type=number",
    ]
    assert len(Rows(config(*words), None).read("prompts")[1]) == 10
    made = config("data.held_out_rows=4", "evaluation.prompts=7")
    world = WORLDS["reviews"](0)
    assert len(Rows(made, world).read("prompts")[1]) == 7
    assert len(Rows(made, world).read("comparisons")[1]) == 4


def test_a_file_of_its_own_is_spread_too(pairs):
    words = ["data.world=none", f"data.train={pairs}", f"data.eval={pairs}", "reward.0.type=number"]
    train, held_out = Rows(config(*words, "data.held_out_rows=2"), None).read("comparisons")
    assert len(train) == 100 and [row.prompt for row in held_out] == ["p0", "p50"]
