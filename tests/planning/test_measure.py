"""The time of a run, reckoned from a little of it."""

import os
import re
import time

import pyarrow.compute as pc
import pytest

from quartet.assembly import build
from quartet.config.tables import Config
from quartet.config.toml import read_settings
from quartet.planning.measure import Line, MeasuredTimes, Short, _summed, in_words, measure
from quartet.recipes import recipe_path
from quartet.runs.reader import Run
from tests.support.command import quartet
from tests.support.tiny_run import SMALL_REVIEWS, make_run


def config_of(*words: str) -> Config:
    return read_settings(recipe_path("reviews"), [*SMALL_REVIEWS, *words], "recipe reviews").config


def test_a_line_through_two_sizes():
    assert Line.through((10.0, 3.0), (20.0, 5.0)) == Line(1.0, 0.2)
    assert Line.through((10.0, 3.0), (20.0, 5.0)).at(40.0) == pytest.approx(9.0)
    assert Line.through((10.0, 5.0), (20.0, 3.0)) == Line(4.0, 0.0), (
        "noise: no time is gained by longer answers"
    )
    assert Line.through((10.0, 1.0), (20.0, 5.0)) == Line(0.0, 0.2), (
        "nor is there less than nothing besides"
    )
    assert Line.through((8.0, 1.0), (8.0, 3.0)) == Line(2.0, 0.0)


def test_a_whole_run_from_its_parts():
    """3 + 7 SFT and reward model steps of 1 and 2 s; 40 steps of 0.5 s + 8 tokens of 0.1 s; 20 looks of 0.25 s; an evaluation of 6 s; 4 s."""
    config = config_of(
        "run.steps=40", "sft.steps=3", "reward_model.steps=7", "evaluation.prompts=8"
    )
    made = MeasuredTimes({"sft": 1.0, "reward_model": 2.0}, Line(0.5, 0.1), 0.25, 6.0, 4.0)
    assert made.seconds(config, 8.0) == pytest.approx(4 + 3 + 14 + 40 * 1.3 + 20 * 0.25 + 6)
    assert "in all   about 84 s" in in_words(config, made)[-1]


def test_the_first_step_warms_up_and_looking_is_apart():
    def step(seconds, **phases):
        return {"seconds": seconds, "metrics": {"response/tokens": 6.0}, "phases": phases or None}

    events = {
        "sft": [step(9.0), step(1.0), step(2.0), step(3.0)],
        "ppo": [step(9.0), *[step(5.0, update=1.0, rollouts=2.0)] * 3],
    }
    assert _summed(config_of(), events, 1.5, 60.0) == Short(
        {"sft": 2.0, "ppo": 3.0}, 2.0, 6.0, 1.5, 60.0 - 1.5 - 15.0 - 24.0
    )


@pytest.mark.slow
def test_the_command_says_what_it_measured(tmp_path):
    said = quartet("plan", "reviews", *SMALL_REVIEWS, "--measure", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    for line in ("sft: 3 steps of", "reward_model: 3 steps of", "ppo: 32 steps of", "evaluation: "):
        assert f"measured {line}" in said.stdout
    assert re.search(r"in all   about \d+ s", said.stdout) and "Loading" not in said.stderr
    assert not (tmp_path / "runs").exists()
    many = quartet("plan", "reviews", "launch.processes=2", "--measure", cwd=tmp_path)
    assert many.returncode == 2 and "--measure: measures one process" in many.stderr


SHORT = (
    "sft.steps=2",
    "reward_model.steps=2",
    "run.steps=2",
    "sft.batch_size=8",
    "reward_model.batch_size=8",
    "rollout.prompts_per_step=8",
    "rollout.max_new_tokens=8",
    "evaluation.best_of=0",
    "evaluation.prompts=8",
    "data.rows=64",
)
MODEL, TEXTS = os.environ.get("QUARTET_MODEL"), os.environ.get("QUARTET_TEXTS")
SHAPES: dict[str, tuple[str, ...]] = {
    "1m": ("reviews",),
    "30m": (
        "reviews",
        *(f"policy.create.{key}" for key in ("hidden_size=512", "num_layers=8", "num_heads=8")),
    ),
    "pretrained": ("film-reviews", "--model", str(MODEL), f"data.texts={TEXTS}"),
}
"""What is run by size. A pretrained model is that of QUARTET_MODEL, a folder; QUARTET_TEXTS is a
file of labelled texts."""
LORA = ('policy.adapter={type = "lora", rank = 16}',)


def within_the_plan(words, share, folder):
    """Run with these words and check the peak of its memory."""
    said = quartet("run", *words, cwd=folder)
    assert said.returncode == 0, said.stderr
    done = Run(folder / "runs" / "latest").events[-1]
    assert abs(done["peak_bytes"] / done["planned_peak_bytes"] - 1) < share, done


def without_adapter(folder):
    """Write the recipe of a pretrained model without its adapter into a folder, and return its name."""
    if not (MODEL and TEXTS):
        pytest.skip("QUARTET_MODEL and QUARTET_TEXTS name no model folder and no file of texts")
    lines = recipe_path("film-reviews").read_text(encoding="utf-8").splitlines()
    kept = "\n".join(line for line in lines if not line.startswith("adapter"))
    (folder / "pretrained.toml").write_text(kept, encoding="utf-8")
    return "pretrained.toml"


@pytest.mark.long
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_the_peak_of_a_run_is_within_a_quarter_of_the_plan(size, adapter, tmp_path):
    what, *words = SHAPES[size]
    if size == "pretrained":
        what = without_adapter(tmp_path)
    within_the_plan([what, *words, *SHORT, *adapter], 0.25, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [(), LORA], ids=["full", "lora"])
def test_the_peak_of_two_steps_of_a_pretrained_model_is_within_15_percent_of_the_plan(
    adapter, tmp_path
):
    """SFT alone, which has the gradients of a large vocabulary, and merges an adapter at its end."""
    words = ('recipe="sft"', "sft.steps=2", "sft.batch_size=8", "data.held_out_rows=8")
    what = without_adapter(tmp_path)
    within_the_plan([what, *SHAPES["pretrained"][1:], *words, *adapter], 0.15, tmp_path)


@pytest.mark.long
def test_the_peak_of_the_rank_that_writes_is_within_a_quarter_of_the_plan(tmp_path):
    """A model of 27 M parameters in two parts, three of which learn or are read beside it."""
    words = ("launch.processes=2", "launch.shard=true")
    within_the_plan([*SHAPES["30m"], *SHORT, *words], 0.25, tmp_path)


@pytest.mark.long
def test_so_is_the_plan_that_measures_nothing(tmp_path):
    """Seconds within a factor of 3: the speed of a machine is not known to it."""
    words = ("run.steps=8", "sft.steps=60", "reward_model.steps=60")
    said = quartet("run", "reviews", *words, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    done = Run(tmp_path / "runs" / "latest").events[-1]
    assert done["planned_seconds"] / 3 < done["seconds"] < 3 * done["planned_seconds"]


@pytest.mark.long
def test_the_prediction_is_within_its_band(tmp_path):
    """Measured: within a factor of 1.6 of a run that takes half a minute, on a machine that does other things besides."""
    words = (
        "run.steps=60",
        "sft.steps=100",
        "reward_model.steps=60",
        "rollout.prompts_per_step=32",
    )
    config = config_of(*words)
    expected = measure(config, build)
    began = time.monotonic()
    run = make_run(tmp_path, "reviews", *words)
    took = time.monotonic() - began
    tokens = pc.mean(run.metrics["response/tokens"]).as_py()
    assert took / 1.6 < expected.seconds(config, tokens) < 1.6 * took
