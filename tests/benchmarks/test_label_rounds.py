"""The study of rounds of labels: its numbers by hand, and a small one as a whole."""

import json
import sys

import pytest

from tests.benchmarks.conftest import FOLDER


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))
    import label_rounds

    yield label_rounds
    sys.modules.pop("label_rounds")


def test_pair_accuracy_by_hand(study):
    """Pairs: right, wrong, equal scores (a half), equal gold (left out); an answer alone is no pair."""
    gold = [2.0, 1.0, 0.0, 3.0, 1.0, 0.0, 5.0, 5.0, 9.0]
    scores = [0.5, 0.1, 0.7, 0.2, 0.3, 0.3, 1.0, 2.0, 0.0]
    assert study.pair_accuracy(scores, gold) == pytest.approx((1 + 0 + 0.5) / 3)
    assert study.pair_accuracy([1.0, 2.0], [3.0, 3.0]) is None


def test_all_ways_have_the_same_labels_and_steps_in_all(study):
    plan = study.Plan()
    for rounds in (*plan.rounds, 3):
        assert not any(x % rounds for x in (plan.labels, plan.reward_steps, plan.ppo_steps))
        assert plan.labels // rounds < plan.pairs


@pytest.mark.long
def test_a_small_study_measures_every_way(study, tmp_path, monkeypatch, capsys):
    words = ["--small", "--seeds", "1", "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr(
        sys, "argv", ["label_rounds.py", *words, "--results", str(tmp_path / "r.json")]
    )
    study.main()
    [rows] = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [row["rounds"] for row in rows] == [1, 2]
    assert [len(row["kl_by_round"]) for row in rows] == [1, 2]
    assert rows[0]["before"]["gold"] == rows[1]["before"]["gold"], "the same SFT policy and prompts"
    assert capsys.readouterr().out.count("| 0.1 |") == 2
