"""What a reward function gives to TRL's `log_metric` and `log_extra`, in a run's record."""

import json

import pytest

from quartet.experience import rollout_from_row, rollout_to_row
from quartet.runs.charts import charts
from tests.runtime.test_reference import GRPO, TABLES, metrics, place, run  # noqa: F401
from tests.support.world import prompts, rollout

FUNCTION = """
def size(completions, completion_ids, log_metric, log_extra):
    sizes = [len(ids) for ids in completion_ids]
    log_metric("tokens", sum(sizes) / len(sizes))
    log_extra("length", sizes)
    log_extra("verdict", ["short" if n < 3 else "long" for n in sizes])
    return [float(-n) for n in sizes]
"""


@pytest.fixture
def logging(place):  # noqa: F811
    """The folder, with a run whose reward function logs the number of tokens."""
    reward = 'reward = [{ type = "function", function = "rewards.py:size" }]'
    (place / "rewards.py").write_text(FUNCTION)
    text = GRPO.replace('reward = [{ type = "length", most = 3 }]', reward) + TABLES
    (place / "logging.toml").write_text(text)
    return place


def test_a_logged_number_is_a_metric_of_the_step_and_has_a_chart(logging):
    record = run("logging")
    for step in metrics(record):
        # The function logs the mean number of tokens, which Quartet measures, too.
        assert step["logged/size/tokens"] == pytest.approx(step["response/tokens"])
        assert step["logged/size/tokens"] == pytest.approx(-step["reward"])
    drawn = [(chart.title, names) for chart, names in charts(record.series["grpo"])]
    assert ("Logged size tokens", ["logged/size/tokens"]) in drawn
    samples = record.samples(1)
    assert [s.logged for s in samples] == [
        {"size/length": str(s.tokens), "size/verdict": "short" if s.tokens < 3 else "long"}
        for s in samples
    ]
    assert not record.problems


def test_rollouts_that_wait_in_a_checkpoint_keep_what_was_logged():
    one = rollout(prompts(1)[0], (5, 6), 0.0, 0, 0)
    logged = {"logged_metrics": {"f/m": 0.5}, "logged_columns": {"f/c": "x"}}
    row = json.loads(json.dumps(rollout_to_row(one) | logged))
    again = rollout_from_row(row)
    assert again.logged_metrics == {"f/m": 0.5} and again.logged_columns == {"f/c": "x"}
    del row["logged_metrics"], row["logged_columns"]  # of a version that knew none
    assert rollout_from_row(row).logged_metrics == {}
