"""A sweep of real runs: stages that run once, trials that are ordinary runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quartet.runs.doctor import diagnose
from quartet.runs.reader import Run
from quartet.runs.sweeps import Sweep
from quartet.studio.report import report

PROJECT = Path(__file__).parents[2]
FILE = """
recipe = ["sft", "reward_model", "ppo", "evaluation"]
[sweep]
objective = "gold"
once = ["sft", "reward_model"]
[sweep.keys]
algorithm.kl.coef = [0.05, 0.5]
[data]
world = "reviews"
rows = 64
held_out_rows = 64
max_prompt_tokens = 32
max_response_tokens = 64
[policy]
create = { type = "llama", hidden_size = 16, num_layers = 1, num_heads = 2, max_length = 128 }
[sft]
steps = 3
batch_size = 8
[reward_model]
steps = 3
batch_size = 8
[[reward]]
type = "model"
[rollout]
prompts_per_step = 8
max_new_tokens = 8
[evaluation]
prompts = 8
best_of = 0
[run]
steps = 4
"""


def quartet(folder: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    environment["PYTHONPATH"] = str(PROJECT / "src")
    done = subprocess.run(
        [sys.executable, "-m", "quartet", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Run) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["event"] == "metrics"]


@pytest.mark.slow
def test_a_trial_is_the_run_that_its_settings_give(tmp_path):
    """The same metrics to the bit, and every reader reads it."""
    (tmp_path / "search.toml").write_text(FILE)
    printed = quartet(tmp_path, "sweep", "search.toml")
    sweep = Sweep(next((tmp_path / "runs").glob("*-search")))
    assert [t.state for t in sweep.trials.values()] == ["done", "done"]
    assert "sweep  runs/" in printed and "best   algorithm.kl.coef" in printed
    once = next(sweep.path.glob("*-once"))
    assert (once / "sft").is_dir() and (once / "reward_model").is_dir()
    trial = Run(sweep.path / sweep.trials[1].runs[0].run)
    assert list(trial.series) == ["ppo", "evaluation"] or list(trial.series) == ["ppo"]
    assert diagnose(trial).checks["ppo"] and "<html" in report(trial)
    words = ["search.toml", 'recipe=["ppo","evaluation"]', "algorithm.kl.coef=0.5"]
    models = [f'policy.model="{once}/sft"', f'reward.0.model="{once}/reward_model"']
    (tmp_path / "search.toml").write_text(
        FILE.replace(FILE[FILE.index("[sweep]") : FILE.index("[data]")], "")
    )
    quartet(tmp_path, "run", *words, *models, "run.name=alone")
    alone = Run(next((tmp_path / "runs").glob("*-alone")))
    assert metrics(alone) == metrics(trial)
    assert alone.evaluation["after"]["gold"] == sweep.trials[1].mean
