"""What a person meets before anything is trained."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "pyarrow", "numpy")


def in_a_fresh_process(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_no_two_classes_have_one_name():
    """A reader who meets `Progress` need not ask which."""
    files: dict[str, list[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                files.setdefault(node.name, []).append(path.name)
    assert not {name: where for name, where in files.items() if len(where) > 1}


@pytest.mark.parametrize(
    "what",
    [
        "import quartet",
        "from typer.testing import CliRunner; from quartet.cli import app; assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "from typer.testing import CliRunner; from quartet.cli import app; r = CliRunner().invoke(app, ['run', 'reviews', '--plan']);"
        "assert r.exit_code == 0 and 'peak' in r.output, r.output",
        "from typer.testing import CliRunner; from quartet.cli import app;"
        "assert CliRunner().invoke(app, ['plan', 'sums', 'seed=2', '--json']).exit_code == 0",
        "from typer.testing import CliRunner; from quartet.cli import app;"
        "assert CliRunner().invoke(app, ['sweep', 'epsilon-beta', '--plan']).exit_code == 0",
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported(what):
    done = in_a_fresh_process(
        f"import sys; {what}; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def quartet(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    command = [str(Path(sys.executable).parent / "quartet"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_init_writes_a_file_and_never_over_another(tmp_path):
    assert quartet("init", "ppo", cwd=tmp_path).returncode == 0
    assert "kl = {" in (tmp_path / "ppo.toml").read_text()
    again = quartet("init", "ppo", cwd=tmp_path)
    assert again.returncode == 2 and "ppo.toml: exists already" in again.stderr
    unknown = quartet("init", "dqn", cwd=tmp_path)
    assert (
        unknown.returncode == 2
        and "Known are dpo, grpo, ilql, on_policy_distillation, ppo, reward_model, sft"
        in unknown.stderr
    )


def test_plan_prints_the_models_and_json_where_asked(tmp_path):
    words = quartet("plan", "reviews", cwd=tmp_path).stdout
    assert re.search(
        r"policy 0\.9 M · critic 0\.9 M · reward model 0\.9 M · reference 0\.9 M · peak ≈ [\d,]+ MB",
        words,
    )
    read = json.loads(quartet("run", "sums", "--plan", "--json", cwd=tmp_path).stdout)
    assert read["config"]["rollout"]["samples_per_prompt"] == 8
    assert set(read["plan"]["models"]) == {"policy", "reference"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["run", "revews"],
            '"revews": no such recipe, and not a .toml file. Did you mean reviews? Recipes are dialogue, film-reviews, guess, labelled-reviews, reviews, sums.',
        ),
        (["run", "none.toml"], "none.toml: no such file."),
        (["run", "reviews", "optim.lr=-1"], "optim.lr = -1: must be > 0."),
        (["run", "dialogue", "--model", "m", "data.train=none.jsonl"], "none.jsonl: no such file."),
        (["run", "dialogue", "--model", "m"], "data.train: name a file"),
        (["run", "reviews", "run.device=quantum"], 'run.device = "quantum": cannot be used here'),
        (
            ["chat", "nowhere"],
            "nowhere: no such folder.",
        ),
    ],
)
@pytest.mark.slow
def test_a_wrong_request_gets_one_sentence_exit_code_2_and_leaves_nothing_behind(
    tmp_path, words, sentence
):
    done = quartet(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())
