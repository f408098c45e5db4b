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
    for name in ("overoptimization", "overoptimization_tables"):
        sys.modules.pop(name)


@pytest.fixture
def tables(study):
    return sys.modules[study.overoptimization_tables.__name__]


@pytest.mark.parametrize(
    ("form", "gain"),
    [
        ("bon", lambda d: d * (1.5 - 0.25 * d)),
        ("rl", lambda d: d * (1.5 - 0.25 * math.log(d))),
    ],
)
def test_a_law_is_found_again(tables, form, gain):
    d = [0.0, 0.5, 1.0, 1.7, 2.5, 3.0]
    values = [0.0] + [gain(x) for x in d[1:]]
    law = tables.Law.fitted(d, values, form)
    assert (law.alpha, law.beta) == pytest.approx((1.5, 0.25))
    assert law.r2 == pytest.approx(1.0)
    [other] = {"bon", "rl"} - {form}
    assert 0.9 < tables.Law.fitted(d, values, other).r2 < 0.9999, "the forms are not the same"


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


def run(*steps):
    """Return a run's steps of (KL, true reward), with a learned reward of ten times the true."""
    return [{"kl": float(kl), "reward": 10 * gold, "gold": gold} for kl, gold in steps]


def test_a_run_at_a_kl_is_between_two_steps(tables):
    course = run((0, 0.0), (2, 1.0), (6, -1.0))
    assert tables.first_at(course, 1.0) == pytest.approx({"kl": 1, "reward": 5, "gold": 0.5})
    assert tables.first_at(course, 5.0)["gold"] == pytest.approx(-0.5)
    assert tables.first_at(course, 7.0) is None


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


def test_runs_with_a_penalty_are_compared_with_runs_without_one_where_the_kl_is_the_same(tables):
    """The ends, means of three steps, are at KL 2 with gold 0.9 and at KL 5 with 0.5. Without a
    penalty, means of three steps go straight to KL 4 with gold 1.0, so it was 0.5 where the KL was
    2, and the KL was never 5: one pair is left. The third kind has another reward model."""
    shared = {"width": 64, "comparisons": 800}
    penalized = [
        run((0, 0.0), (1, 0.8), (3, 1.0), (2, 0.9)),
        run((0, 0.0), (4, 0.5), (6, 0.4), (5, 0.6)),
    ]
    without = [run((0, 0.0), (0, 0.3), (0, -0.3), (12, 3.0), (0, 0.0))] * 2
    results = {
        "start": 0.1,
        "ppo": [
            shared | {"coef": 0.1, "lr": 1e-4, "runs": penalized},
            shared | {"coef": 0.0, "lr": 3e-4, "runs": without},
            {"width": 64, "comparisons": 200, "coef": 0.0, "lr": 3e-4, "runs": without},
        ],
    }
    highest = "−0.30 (−2.84 to 2.24)"  # 0.9 and 0.5 less 1.0, deviation 0.283: ± 12.706 · 0.2
    [cells] = tables.at_equal_kl(results)
    assert cells[:3] == ["0.1", "1e-4", "3e-4"]
    assert cells[3:] == ["3.50 ± 2.12", "0.60 ± 0.28", "0.40", "0.40", "0.40", "4.00", highest]


def test_gains_at_a_distance_say_how_many_runs_reach_it(tables):
    runs = [run((0, 0.0), (4, 1.0), (8, 0.0)), run((0, 0.0), (4, 1.0))]
    found = list(tables.at_distances(runs, 0.25))
    assert found == ["0.25 ± 0.00", "0.75 ± 0.00", "0.25 (1)", "−0.25 (1)", "–"]


def test_every_model_is_in_one_ensemble_of_either_kind(study):
    """Models of two seeds on two sets of comparisons: those of a set agree, those of different sets
    say the opposite, so that their mean prefers nothing."""

    class Fake:
        def __init__(self):
            self.plan, self.gold = study.Plan(seeds=2), [[0.0, 1.0]]

        def reward_model(self, cell, seed, data):
            return seed, data

        def scores(self, folder):
            _, data = folder
            return [[0.0, 1.0]] if data == 0 else [[1.0, 0.0]]

    row = study.members_row(Fake(), study.Cell(16, 50, 0.25))
    assert (row["width"], row["comparisons"], row["flipped"]) == (16, 50, 0.25)
    assert [gain[-1] for gain in row["single"]] == [0.5, -0.5, 0.5, -0.5]
    assert [gains["mean"][-1] for gains in row["same"]] == [0.5, -0.5]
    assert row["own"][0] == row["own"][1], "of either seed and either set"


@pytest.mark.slow
def test_a_small_study_makes_its_tables_and_makes_nothing_twice(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["overoptimization", "--small", "--folder", str(tmp_path)])
    study.main()
    first = capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert first.count("| 16 | 25% |") == 4, "a row of each table of reward models"
    assert first.count("| 50 | 0.1 | 3e-4 |") == 2, "of PPO and of its gains by distance"
    study.main()
    assert capsys.readouterr().out == first
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_the_tables_of_the_docs_are_of_the_results(study, tables):
    page = FOLDER.parent / "docs" / "papers" / "overoptimization.md"
    results = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    for part in tables.tables(results).split("\n\n"):
        assert part in page.read_text(encoding="utf-8")
