import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from quartet.runs.charts import charts
from quartet.runs.definitions import (
    DEFINITIONS,
    Definition,
    caption,
    definition,
    markdown_table,
)
from quartet.runs.figures import (
    COLORS,
    GREY,
    MOST_POINTS,
    calibration,
    figure,
    frontier,
    lines,
    overoptimised,
    score_histogram,
    smoothed,
    thinned,
)
from quartet.runs.reader import Series


def series(**columns):
    made = Series()
    for i in range(len(next(iter(columns.values())))):
        metrics = {name.replace("__", "/"): column[i] for name, column in columns.items()}
        made.add({"step": i + 1, "time": 0.0, "metrics": metrics})
    return made


def test_long_lines_become_means_of_pieces():
    x, y = thinned(range(1, 20_001), [float(v) for v in range(20_000)])
    assert len(x) == len(y) <= MOST_POINTS and x[-1] == 20_000
    assert y[0] == sum(range(25)) / 25  # pieces of 25
    assert thinned([1, 2], [0.5, math.nan]) == ([1, 2], [0.5, None])


def test_smoothing_begins_without_a_bias_and_keeps_a_constant():
    assert smoothed([2.0] * 20) == pytest.approx([2.0] * 20)
    assert smoothed([5.0] + [0.0] * 19)[0] == 5.0
    assert smoothed([1.0] * 5) is None and smoothed([1.0] * 19 + [math.nan]) is None


def test_over_optimisation_is_where_gold_turns_while_reward_rises():
    rising = [i / 10 for i in range(40)]
    hill = [min(i, 30 - i) / 5 for i in range(40)]
    top = overoptimised(series(reward=rising, reward__gold=hill))
    assert top is not None and 14 <= top <= 22
    assert overoptimised(series(reward=rising, reward__gold=rising)) is None
    assert (
        overoptimised(series(reward=hill, reward__gold=hill)) is None
    )  # both fell: no fooled reward
    assert overoptimised(series(reward=rising)) is None


def test_over_optimisation_is_not_seen_in_noise():
    rng = random.Random(0)
    for _ in range(50):
        flat = [rng.gauss(1.5, 0.1) for _ in range(100)]
        assert (
            overoptimised(series(reward=[i / 100 for i in range(100)], reward__gold=flat)) is None
        )


def test_what_is_infinite_or_missing_is_no_number_in_json():
    made = series(loss=[1.0, math.inf, math.nan] * 5)
    _, y = thinned(list(made.steps), list(made.columns["loss"]))
    assert y[:3] == [1.0, None, None] and json.dumps(y, allow_nan=False)


def test_every_metric_of_a_run_is_defined(ppo_run, grpo_run):
    for run in (ppo_run, grpo_run):
        for stage in run.series.values():
            for name in stage.columns:
                assert definition(name).what, name


def test_definitions_of_families():
    assert (
        definition("reward/brevity").label == "reward brevity"
        and definition("reward/gold").label == "gold reward"
    )
    assert definition("grad_norm/actor").label == "gradient norm, actor"
    assert definition("nobody_knows").what == ""
    assert len({d.name for d in DEFINITIONS}) == len(DEFINITIONS)
    assert all(len(d.what) > 8 for d in DEFINITIONS)


def test_the_docs_have_the_definitions():
    docs = Path(__file__).parents[2] / "docs"
    assert markdown_table() in (docs / "metrics.md").read_text(encoding="utf-8")


def test_figures_are_plain_json_and_plotly_objects(ppo_run):
    for stage, numbers in ppo_run.series.items():
        for chart, names in charts(numbers):
            json.dumps(lines(ppo_run, stage, chart.title, names))
    names = [trace.name for trace in figure(ppo_run, "frontier").data if trace.name]
    assert names[-3:] == ["reward", "gold reward", "win rate"]
    assert any("best of n" in (trace["name"] or "") for trace in frontier(ppo_run)["data"])
    assert figure(ppo_run, "reward").data and figure(ppo_run, "phases").data


def test_a_win_rate_is_drawn_at_the_kl_of_the_policy_that_it_is_of(ppo_run):
    """It is measured after a step's update, and the rollouts of the next step are of that policy."""
    ppo, spec = ppo_run.series["ppo"], frontier(ppo_run)
    at = {line["name"]: line for line in spec["data"] if "name" in line}
    distance = dict(zip(at["reward"]["customdata"], at["reward"]["x"], strict=True))
    rates = at["win rate"]
    assert len(set(rates["x"])) > 1
    for step, x in zip(rates["customdata"], rates["x"], strict=True):
        assert x == distance[min(step + 1, ppo.steps[-1])]


def test_the_frontier_names_its_first_and_last_step(ppo_run):
    [named] = [line for line in frontier(ppo_run)["data"] if "text" in line]
    steps = ppo_run.series["ppo"].steps
    assert [t for t in named["text"] if t] == [f"step {steps[0]}", f"step {steps[-1]}"]


def test_the_first_step_of_a_run_is_to_be_seen():
    young, old = series(reward=[0.5]), series(reward=[0.5] * 20)
    run = SimpleNamespace(series={"ppo": young}, definitions=(), config={}, warnings=[])
    assert lines(run, "ppo", "Reward", ["reward"])["data"][0]["mode"] == "lines+markers"
    run.series["ppo"] = old
    assert {line["mode"] for line in lines(run, "ppo", "R", ["reward"])["data"]} == {"lines"}


def test_both_histograms_of_scores_have_the_same_bins():
    pairs = [{"chosen_score": float(i), "rejected_score": i / 9} for i in range(9)]
    groups = [trace["bingroup"] for trace in score_histogram(pairs)["data"]]
    assert groups[0] and groups[0] == groups[1]


def test_an_axis_shows_small_shares_from_0_and_ratios_by_their_logarithm(ppo_run):
    axis = lines(ppo_run, "ppo", "Clip", ["policy/clip_fraction"], percent=True)["layout"]["yaxis"]
    assert axis["rangemode"] == "tozero" and "maxallowed" not in axis["autorangeoptions"]
    assert lines(ppo_run, "ppo", "C", ["kl/coef"])["layout"]["yaxis"]["rangemode"] == "tozero"
    assert (
        lines(ppo_run, "ppo", "R", ["ratio/max", "ratio/min"])["layout"]["yaxis"]["type"] == "log"
    )
    assert "type" not in lines(ppo_run, "ppo", "KL", ["kl"])["layout"]["yaxis"]


def test_lines_of_one_chart_differ_by_more_than_colour_from_the_third_on(ppo_run):
    names = ["reward", "kl", "response/tokens", "policy/entropy"]
    for smooth in (False, True):
        spec = lines(ppo_run, ppo_run.rl_stage, "KL", names, smooth=smooth)
        dashes = {each["name"]: each["line"]["dash"] for each in spec["data"] if "name" in each}
        assert list(dashes.values()) == ["solid", "solid", "dash", "dot"]


def test_a_warning_on_the_axis_has_its_sentence_as_text(ppo_run, monkeypatch):
    warning = {"stage": "ppo", "step": 2, "sentence": "a <b>bold</b> one & more " * 5}
    monkeypatch.setattr(type(ppo_run), "warnings", [warning])
    [mark] = lines(ppo_run, "ppo", "KL", ["kl"])["layout"]["annotations"]
    assert mark["hovertext"].startswith("step 2: a &lt;b>bold&lt;/b> one &amp; more a")
    assert set(re.findall("<[^>]*>", mark["hovertext"])) == {"<br>"}


def test_each_metric_of_rl_is_in_a_chart(ppo_run):
    drawn = {name for _, names in charts(ppo_run.series["ppo"]) for name in names}
    left = set(ppo_run.series["ppo"].columns) - drawn
    said_in_words_or_always_zero = {
        "responses",
        "reward/model",
        "reward/unscored",
        "reward/clipped",
    }
    said_in_words_or_always_zero |= {
        "advantage/std",
        "policy/surprise_gap",
        "loss/kl",
        "loss/entropy",
    }
    assert left <= said_in_words_or_always_zero


def test_calibration_of_a_model_that_is_as_sure_as_right():
    """Differences of 0.5 and 2; of a thousand pairs each, the higher one is preferred with σ of that."""
    pairs = []
    for difference in (0.5, 2.0):
        share = 1 / (1 + math.exp(-difference))
        pairs += [{"chosen_score": difference, "rejected_score": 0.0}] * round(1000 * share)
        pairs += [{"chosen_score": 0.0, "rejected_score": difference}] * (
            1000 - round(1000 * share)
        )
    line = calibration(pairs)["data"][1]
    assert sum(line["y"][:4]) / 4 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=1e-3)
    assert line["x"][0] == pytest.approx(1 / (1 + math.exp(-0.5))) and line["x"][
        -1
    ] == pytest.approx(1 / (1 + math.exp(-2.0)))


def drawn(columns, names, smooth=True):
    run = SimpleNamespace(series={"ppo": series(**columns)}, config={}, warnings=[], definitions=[])
    return lines(run, "ppo", "title", names, smooth=smooth)["data"]


def test_what_is_set_or_counted_is_never_smoothed():
    falling = [1e-3 * (1 - i / 40) for i in range(40)]
    for name in ("lr", "lr/actor", "kl/coef", "policy/beta", "skipped", "policy/epochs"):
        [line] = drawn({name.replace("/", "__"): falling}, [name])
        assert line["y"] == falling, name
    behind, mean = drawn({"loss": falling}, ["loss"])
    assert behind["y"] == falling != mean["y"]


def test_a_chart_is_smoothed_as_a_whole_or_not_at_all():
    whole, torn = [float(i % 7) for i in range(40)], [math.nan, *([2.0, 3.0] * 19), 1.0]
    assert (
        len(drawn({"value__mean": whole, "return__mean": whole}, ["value/mean", "return/mean"]))
        == 4
    )
    assert (
        len(drawn({"value__mean": whole, "return__mean": torn}, ["value/mean", "return/mean"])) == 2
    )
    assert len(drawn({"loss": whole}, ["loss"], smooth=False)) == 1


def test_captions_are_sentences():
    for row in DEFINITIONS:
        text = caption(row.name)
        assert text.startswith(" is ") and text.endswith(".") and ".." not in text
        assert not row.reading or row.reading[0].isupper()
    own = Definition("mine/x", "x", "share of x", "good near 1")
    assert caption("mine/x", [own]) == ": Share of x. Good near 1."


def test_each_colour_is_seen_on_light_and_on_dark():
    def luminance(color):
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for color in (*COLORS, GREY):
        for background in ("#ffffff", "#1b1e25"):
            low, high = sorted((luminance(color), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, background)


def test_what_is_measured_now_and_then_is_a_line_through_its_points():
    """And what never changes is drawn as it is: its mean over a window is off by rounding."""
    series = Series()
    for step in range(1, 41):
        now_and_then = {"policy/win_rate": 0.5 + step / 100} if step % 4 == 0 else {}
        series.add({"step": step, "time": 0.0, "metrics": {"kl/coef": 0.12, **now_and_then}})
    run = SimpleNamespace(series={"ppo": series}, config={}, warnings=[], definitions=[])
    [rates] = lines(run, "ppo", "win rate", ["policy/win_rate"])["data"]
    assert rates["mode"] == "lines+markers" and list(rates["x"]) == list(range(4, 41, 4))
    assert list(rates["y"]) == pytest.approx([0.5 + step / 100 for step in range(4, 41, 4)])
    assert smoothed([0.12] * 40) == [0.12] * 40
    assert {
        v for line in lines(run, "ppo", "coefficient", ["kl/coef"])["data"] for v in line["y"]
    } == {0.12}
