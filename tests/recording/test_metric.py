"""Metrics of a user's own: measured, described in the record, shown, and watched by their rule."""

import pytest

import quartet
from quartet.recording.metric import Metric
from quartet.runs.charts import charts
from quartet.runs.definitions import definition
from quartet.runs.doctor import examine
from quartet.runs.figures import lines
from quartet.studio.views import overview
from tests.support.tiny_run import make_run


class LongestAnswer(Metric):
    """The number of tokens of the longest response."""

    name = "mine/longest"
    reading = "At rollout.max_new_tokens responses are cut off."
    chart = "Longest"
    limit: int = quartet.Field(default=3, ge=0, description="Tokens that are too many.")

    def __call__(self, step):
        return max(len(rollout.response_ids) for rollout in step.rollouts)

    def check(self, history):
        longest = history.now(self.name, 0.0)
        return f"{longest:.0f} tokens. Ask for less." if longest > self.limit else None


class Fails(Metric):
    def __call__(self, step):
        return 1 / 0

    def check(self, history):
        raise KeyError("nothing")


class Taken(Metric):
    name = "reward"

    def __call__(self, step):
        return 0.0


HERE = __file__


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    words = (
        f'run.metrics=[{{type="{HERE}:LongestAnswer", limit=0}}, "{HERE}:Fails", "{HERE}:Taken"]'
    )
    return make_run(tmp_path_factory.mktemp("runs"), "sums", words, "run.steps=2")


def test_it_is_a_column_like_any_other_and_is_described_in_the_record(run):
    assert min(run.series["grpo"].columns["mine/longest"]) > 0
    row = run.definitions[0]
    assert (row.name, row.label) == ("mine/longest", "longest answer")
    assert row.what == "The number of tokens of the longest response."
    assert definition("mine/longest", run.definitions) == row


def test_it_has_its_chart_with_its_title_and_meaning(run):
    chart, names = charts(run.series["grpo"], run.definitions)[-1]
    assert (chart.title, names) == ("Longest", ["mine/longest"])
    assert lines(run, "grpo", chart.title, names)["data"][-1]["name"] == "longest answer"
    meanings = [m for row in overview(run, "grpo") for m in row["meanings"]]
    assert any("response. At rollout.max_new_tokens" in m["text"] for m in meanings)


def test_what_its_rule_finds_is_a_finding_of_readers_too(run):
    found = next(f for f in examine(run) if f.rule == "mine/longest")
    assert found.step == 1 and found.sentence.endswith("Ask for less.")
    assert found.why == "The number of tokens of the longest response."


def test_one_that_fails_or_has_a_name_that_is_taken_is_named_once_and_left_out(run):
    warnings = [warning["sentence"] for warning in run.warnings]
    for words in (
        "metric own/fails failed and is left out of this step: ZeroDivisionError",
        "metric reward failed and is left out of this step: ValueError('another metric has",
        "the rule of metric own/fails failed: KeyError('nothing').",
    ):
        assert sum(words in sentence for sentence in warnings) == 1, words
    assert "own/fails" not in run.series["grpo"].columns
