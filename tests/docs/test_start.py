"""The pages of Start, as a newcomer types them: a small model of their own, and rows of a file."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n((?:    .*\n)+)", START))
SMALLER = (
    *("sft.steps=2", "sft.batch_size=4", "reward_model.steps=2", "reward_model.batch_size=4"),
    *("rollout.prompts_per_step=4", "rollout.max_new_tokens=6", "run.steps=2"),
    *("evaluation.prompts=2", "data.max_prompt_tokens=64", "data.max_response_tokens=64"),
)


def quartet(line: str, cwd: Path, *more: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    words = [*shlex.split(line, comments=True)[1:], *more]
    done = subprocess.run(
        [sys.executable, "-m", "quartet", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode in {0, 3}, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def newcomer(tmp_path):
    """A user's folder, with comparisons.jsonl and a small model."""
    from quartet.models.language_model import create, save
    from quartet.models.shape import Shape
    from quartet.worlds import WORLDS

    tokenizer = WORLDS["reviews"](0).tokenizer()
    shape = Shape(hidden_size=16, num_layers=1, num_heads=2, max_length=256)
    save(create(shape, tokenizer, 0), tokenizer, tmp_path / "FOLDER")
    rows = [
        {"prompt": f"this film is about {n} .", "chosen": "the cast is funny .", "rejected": "bad"}
        for n in "abcdefghijklmnopqrstuvwxyz" * 2
    ]
    (tmp_path / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_ten_minutes_on_your_own_model(newcomer):
    """Every command of the page, in order; the runs are made smaller."""
    assert list(BLOCKS) == ["look", "plan", "run", "resume", "read", "export", "init"]
    assert "comparisons" in quartet(BLOCKS["look"], newcomer)
    assert "peak" in quartet(BLOCKS["plan"], newcomer)
    assert "4/4 evaluation" in quartet(BLOCKS["run"], newcomer, *SMALLER)
    quartet(BLOCKS["resume"], newcomer, "run.steps=3")
    for line in BLOCKS["read"].splitlines():
        assert quartet(line, newcomer)
    quartet(BLOCKS["export"], newcomer)
    assert (newcomer / "my-model" / "config.json").is_file()
    quartet(BLOCKS["init"], newcomer)
    assert (newcomer / "ppo.toml").is_file()


@pytest.mark.slow
def test_from_python_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "from_python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "from_python.md", "exec"), names)
    assert "3 done" in capsys.readouterr().out
