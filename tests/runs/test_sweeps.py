"""A sweep's record: numbers worked by hand, and files that are damaged."""

import json

import pytest

from quartet.runs.reader import NoRun, Run
from quartet.runs.sweep_figures import (
    frontier,
    importance,
    objective_text,
    parallel_coordinates,
    sweep_figures,
    sweep_rows,
)
from quartet.runs.sweeps import Sweep, curve, measured
from tests.support.sweep_record import make_sweep


def test_mean_and_deviation_over_seeds_by_hand(tmp_path):
    """(1 + 2 + 6) / 3 = 3; ((−2)² + (−1)² + 3²) / 2 = 7, whose root is 2.6458."""
    sweep = Sweep(make_sweep(tmp_path, [({"a": 1}, [1.0, 2.0, 6.0], [4.0, 5.0, 6.0])]))
    [trial] = sweep.trials.values()
    assert trial.mean == 3.0 and trial.deviation == pytest.approx(7**0.5)
    assert trial.measure("kl") == 5.0 and objective_text(trial) == "3 ± 2.65"


def test_the_share_of_variance_by_hand(tmp_path):
    """a = 0: 1, 3; a = 1: 5, 7, the mean is 4. Between: 2 · (2 − 4)² + 2 · (6 − 4)² = 16; in all 9 + 1 + 1 + 9 = 20.
    b: groups 1, 5 and 3, 7: between 2 · (3 − 4)² + 2 · (5 − 4)² = 4. Without effect (2 − 1) / (4 − 1)."""
    rows = [
        ({"a": 0, "b": 0}, [1.0], [1.0]),
        ({"a": 0, "b": 1}, [3.0], [1.0]),
        ({"a": 1, "b": 0}, [5.0], [1.0]),
        ({"a": 1, "b": 1}, [7.0], [1.0]),
    ]
    found = Sweep(make_sweep(tmp_path, rows)).importance()
    assert found["a"] == (pytest.approx(16 / 20), pytest.approx(1 / 3))
    assert found["b"] == (pytest.approx(4 / 20), pytest.approx(1 / 3))


def test_the_share_between_seeds_by_hand(tmp_path):
    """Two settings, 1 and 3, 5 and 7: within 1 + 1 + 1 + 1 = 4 of 20."""
    rows = [({"a": 0}, [1.0, 3.0], [1.0, 1.0]), ({"a": 1}, [5.0, 7.0], [1.0, 1.0])]
    sweep = Sweep(make_sweep(tmp_path, rows))
    assert sweep.noise == pytest.approx(4 / 20)
    assert sweep.importance()["a"] == (pytest.approx(16 / 20), pytest.approx(1 / 3))


def test_many_numbers_are_three_groups(tmp_path):
    """Nine rates with the objectives 0 0 0 1 1 1 2 2 2: the thirds explain all of it; without effect 2 / 8."""
    rows = [({"lr": 0.1 * n + 0.1}, [float(n // 3)], [1.0]) for n in range(9)]
    found = Sweep(make_sweep(tmp_path, rows)).importance()
    assert found["lr"] == (pytest.approx(1.0), pytest.approx(2 / 8))


def test_equal_objectives_have_no_shares(tmp_path):
    rows = [({"a": n}, [1.0], [1.0]) for n in range(4)]
    sweep = Sweep(make_sweep(tmp_path, rows))
    assert sweep.importance() == {} and sweep.noise is None
    assert importance(sweep)["data"] == []


def test_the_best_keeps_all_bounds_and_less_can_be_better(tmp_path):
    rows = [({"a": 0}, [3.0], [9.0]), ({"a": 1}, [2.0], [5.0]), ({"a": 2}, [1.0], [1.0])]
    more = Sweep(make_sweep(tmp_path / "more", rows, at_most={"kl": 6.0}))
    assert [t.number for t in more.ranked()] == [1, 2, 0] and more.best.number == 1
    assert [row["note"] for row in sweep_rows(more)] == ["", "", "kl > 6"]
    less = Sweep(make_sweep(tmp_path / "less", rows, at_most={"kl": 6.0}, direction="minimize"))
    assert [t.number for t in less.ranked()] == [2, 1, 0]
    none = Sweep(make_sweep(tmp_path / "none", rows, at_most={"kl": 0.5}))
    assert none.best is None and len(none.ranked()) == 3


def test_the_frontier_is_what_no_nearer_trial_beats(tmp_path):
    """KL and objective: (1, 1), (2, 3), (3, 2), (4, 5)."""
    rows = [
        ({"a": n}, [y], [x])
        for n, (x, y) in enumerate([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 5.0)])
    ]
    figure = frontier(Sweep(make_sweep(tmp_path, rows, at_most={"kl": 3.5})))
    line = next(trace for trace in figure["data"] if trace["name"] == "not beaten in both")
    assert (line["x"], line["y"]) == ([1.0, 2.0, 4.0], [1.0, 3.0, 5.0])
    best = next(trace for trace in figure["data"] if trace["name"] == "best")
    assert (best["x"], best["y"]) == ([2.0], [3.0])
    assert figure["layout"]["shapes"][0]["x0"] == 3.5


def test_a_line_crosses_each_axis_at_its_value(tmp_path):
    """Rates over two decades stand by their logarithm; a pruned trial has no objective."""
    rows = [
        ({"lr": 1e-4, "kind": "x"}, [0.0], [1.0]),
        ({"lr": 1e-3, "kind": "y"}, [1.0], [1.0]),
        ({"lr": 1e-2, "kind": "x"}, [4.0], [1.0]),
        ({"lr": 1e-2, "kind": "y"}, None, None),
    ]
    lines = parallel_coordinates(Sweep(make_sweep(tmp_path, rows)))["data"]
    assert lines[0]["y"] == pytest.approx([0.0, 0.0, 0.0])
    assert lines[1]["y"] == pytest.approx([0.5, 1.0, 0.25])
    assert lines[2]["y"] == pytest.approx([1.0, 0.0, 1.0])
    assert lines[3]["y"] == pytest.approx([1.0, 1.0]) and lines[3]["line"]["dash"] == "dash"


def test_strange_values_are_shown_and_stop_no_chart(tmp_path):
    strange = [float("nan"), float("inf"), None, True, {"a": [1]}, "x" * 9_000, -1e308, 1e308]
    rows = [({"a": value, "b": n}, [float(n)], [1.0]) for n, value in enumerate(strange)]
    sweep = Sweep(make_sweep(tmp_path, rows))
    assert len(sweep_rows(sweep)) == 8 and set(sweep.importance()) == {"a", "b"}
    assert len(sweep_figures(sweep)) == 3
    numbers = [
        ({"a": value}, [float(n)], [1.0]) for n, value in enumerate([strange[0], *strange[-2:]])
    ]
    assert sweep_figures(Sweep(make_sweep(tmp_path / "numbers", numbers)))


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    path = make_sweep(tmp_path, [({"a": 0}, [1.0], [1.0])])
    record = path / "sweep.jsonl"
    text = record.read_text()
    lines = [
        "not json",
        '{"event": "ended", "time": 1.0, "trial": 7, "seed": 0, "state": "done"}',
        "[]",
    ]
    lines.append(json.dumps({"event": "suggested", "time": 1.0, "trial": -3, "values": {}}))
    record.write_text(text + "\n".join(lines) + "\n")
    sweep = Sweep(path)
    assert [t.mean for t in sweep.trials.values()] == [1.0]
    assert sweep.problems == ["sweep.jsonl: 4 lines left out."]
    record.write_text("")
    with pytest.raises(NoRun, match="is no sweep"):
        Sweep(path)
    record.unlink()
    with pytest.raises(NoRun):
        Sweep(path)


def test_what_a_run_reached_is_of_its_evaluation_or_the_mean_of_its_last_values(ppo_run):
    run = Run(ppo_run.path)
    assert measured(run, "gold") == run.evaluation["after"]["gold"]
    assert measured(run, "held_out_kl") == run.evaluation["kl"]["mean"]
    rewards = list(run.series["ppo"].columns["reward"])
    assert measured(run, "reward") == pytest.approx(sum(rewards[-5:]) / 5)
    assert measured(run, "no such thing") is None
    points = curve(run, "held_out_reward")
    assert points[0] == (1, rewards[0]) and len(points) == 14
    assert points[-1] == (14, pytest.approx(sum(rewards[-5:]) / 5))
