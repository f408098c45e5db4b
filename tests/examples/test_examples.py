"""Every example runs, at toy size."""

import importlib.util
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CREATE = {
    "policy.create.hidden_size": 16,
    "policy.create.num_layers": 1,
    "policy.create.num_heads": 2,
}
ROLLOUT = {"rollout.prompts_per_step": 4, "rollout.max_new_tokens": 4}
TINY = {"data.rows": 64, "data.held_out_rows": 64}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_script_has_more_than_forty_lines():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo_own_reward", {"sft.steps": 2, "evaluation.prompts": 4, **ROLLOUT}),
        pytest.param(
            "grpo_verifier",
            {"sft.steps": 2, "evaluation.prompts": 4, **ROLLOUT},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "own_policy_loss",
            {"sft.steps": 2, "evaluation.prompts": 4, **ROLLOUT},
            marks=pytest.mark.slow,
        ),
        pytest.param("reward_model_and_dpo", {}, marks=pytest.mark.slow),
        pytest.param(
            "own_stage",
            {"sft.steps": 2, "custom.batch_size": 4, "evaluation.prompts": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_script_trains_and_its_run_can_be_read(name, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = load(name).main(steps=2, **{**TINY, **settings})
    assert run.finished
    assert load("read_a_run").main(run.folder).status == "done"
    assert "→" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "own_algorithm"])
@pytest.mark.slow
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    """Cells tagged "parameters" set sizes; here they are followed by smaller ones."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace["size"] = {**namespace["size"], "sft.steps": 2, **TINY, **ROLLOUT}
                namespace["steps"] = 2
    assert all(not cell.get("outputs") for cell in cells)
