"""The study of over-optimisation: its fits by hand, and a small one as a whole."""

import json
import math
import random
import sys

import pytest

from quartet.worlds.reviews import Reviews
from tests.benchmarks.conftest import FOLDER


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))
    import overoptimization

    yield overoptimization
    sys.modules.pop("overoptimization")


@pytest.mark.parametrize(
    ("shape", "gain"),
    [
        ("bon", lambda d: d * (1.5 - 0.25 * d)),
        ("rl", lambda d: d * (1.5 - 0.25 * math.log(d))),
    ],
)
def test_a_law_is_found_again(study, shape, gain):
    d = [0.0, 0.5, 1.0, 1.7, 2.5, 3.0]
    law = study.Law.fitted(d, [0.0] + [gain(x) for x in d[1:]], shape)
    assert (law.alpha, law.beta) == pytest.approx((1.5, 0.25))
    assert law.r2 == pytest.approx(1.0)


def test_a_curve_is_the_gain_of_the_best_over_one_answer(study):
    """Of answers with gold 0, 1, 2, 3, one has 1.5 on average, the best of two 14/6, of four 3. A
    second prompt, whose scores have the reverse order, loses as much."""
    scores, gold = [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0, 3.0]] * 2
    curve = study.Curve.of(scores, gold)
    assert curve.gain == pytest.approx([0.0, 0.0, 0.0])
    curve = study.Curve.of(scores[:1] * 2, gold)
    assert curve.gain == pytest.approx([0.0, 14 / 6 - 1.5, 1.5])
    assert curve.d == pytest.approx(
        [0.0, math.sqrt(math.log(2) - 0.5), math.sqrt(math.log(4) - 0.75)]
    )


def test_an_ensemble_has_no_scale_of_its_members(study):
    members = [[[1.0, 2.0], [3.0, 4.0]], [[40.0, 30.0], [20.0, 10.0]]]
    ways = study.ensemble(members)
    unit = 1 / math.sqrt(1.25)
    assert ways["mean"] == [pytest.approx([0.0, 0.0])] * 2, "they say the opposite"
    assert ways["worst"][0] == pytest.approx([-1.5 * unit, -0.5 * unit])
    assert ways["mean − deviation"] == [pytest.approx(row) for row in ways["worst"]]


def test_the_true_reward_at_a_kl_is_between_two_steps(study):
    run = [{"kl": 0.0, "gold": 0.0}, {"kl": 2.0, "gold": 1.0}, {"kl": 6.0, "gold": -1.0}]
    assert study.first_at(run, 1.0) == pytest.approx(0.5)
    assert study.first_at(run, 5.0) == pytest.approx(-0.5)
    assert study.first_at(run, 7.0) is None


def test_flipped_labels_change_sides(study):
    examples = Reviews(0).comparisons(400)
    flipped = list(study.rows(examples, 0.25, random.Random(0)))
    changed = sum(e.chosen != row["chosen"] for e, row in zip(examples, flipped, strict=True))
    assert 70 <= changed <= 130
    for example, row in zip(examples, flipped, strict=True):
        assert {row["chosen"], row["rejected"]} == {example.chosen, example.rejected}
    assert all(
        row["chosen"] == e.chosen
        for e, row in zip(examples, study.rows(examples, 0.0, random.Random(0)), strict=True)
    )


@pytest.mark.slow
def test_a_small_study_makes_its_tables_and_makes_nothing_twice(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["overoptimization", "--small", "--folder", str(tmp_path)])
    study.main()
    first = capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert first.count("16 | 50 |") == 6, "each row as it is found, and in the tables"
    study.main()
    assert capsys.readouterr().out == first
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_the_table_of_the_docs_is_of_the_results(study):
    page = FOLDER.parent / "docs" / "papers" / "overoptimization.md"
    results = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    for part in study.tables(results).split("\n\n"):
        assert part in page.read_text(encoding="utf-8")
