"""`quartet.sweep`: the sweep of the command line, from Python."""

import re
from pathlib import Path

import numpy as np
import pytest

import quartet
from quartet.sweeps import conduct, processes
from tests.support.sweeping import FAKE
from tests.sweeps.files import sweep_text

DOCS = Path(__file__).parents[2] / "docs" / "sweeps.md"

TABLE = {
    "recipe": ["ppo", "evaluation"],
    "data": {"world": "reviews", "max_prompt_tokens": 32, "max_response_tokens": 64},
    "policy": {"create": {"type": "llama", "hidden_size": 16, "max_length": 128}},
    "reward": [{"type": "gold"}],
    "run": {"steps": 4},
    "sweep": {"objective": "gold", "keys": {"algorithm.kl.coef": {"values": [0.1, 1.0]}}},
}


@pytest.fixture(autouse=True)
def _fake_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "COMMAND", FAKE)
    monkeypatch.setattr(conduct, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.001")


def test_a_sweep_from_dicts_is_left_resumed_and_read():
    sweep = quartet.sweep(TABLE, name="search")
    for change in sweep:
        if change.kind == "ended":
            break
    assert [t.state for t in sweep.results.trials.values()] == ["done"]
    assert sweep.results.status == "stopped"
    results = quartet.sweep(TABLE, name="search", resume=True, **{"sweep.parallel": 2}).finish()
    assert results.status == "done" and results.path == sweep.path
    assert results.best.values == {"algorithm.kl.coef": 0.1} and results.best.mean == 1.0
    assert repr(results) == f"sweep {sweep.path.name}: done, 2 of 2 trials done"


def test_the_lines_in_the_docs_run(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "search.toml").write_text(
        sweep_text("objective = 'gold'\n[sweep.keys]\nalgorithm.kl.coef = [0.1, 1.0]")
    )
    names = {}
    exec(compile(block.replace('"run.steps": 50', '"run.steps": 4'), "sweeps.md", "exec"), names)
    assert names["results"].best.values == {"algorithm.kl.coef": 0.1}


def test_what_the_tables_hold_may_be_objects_that_a_file_can_hold(tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def short(responses):\n    return [-len(r) for r in responses]\n")
    keys = {"algorithm.kl.coef": {"values": np.array([0.25, 0.5])}, "optim.epochs": [1, 2]}
    sweep = quartet.sweep(
        TABLE
        | {
            "recipe": "ppo",
            "data": ["a prompt", "another"],
            "reward": f"{rewards}:short",
            "policy": tmp_path / "model",
            "sweep": {"objective": "reward", "keys": keys},
        },
        **{"run.steps": np.int64(2)},
    )
    request = sweep._beginning.request
    config = request.base.config
    assert request.spec.keys["algorithm.kl.coef"].values == (0.25, 0.5)
    assert config.policy.model == str(tmp_path / "model") and config.run.steps == 2
    assert config.reward[0].function == f"{rewards}:short"
    assert len(Path(config.data.train).read_text().splitlines()) == 2
    assert repr(sweep) == "<quartet sweep, not begun>"
    with pytest.raises(quartet.QuartetError, match='no Python objects of .*reward="file.py:len"'):
        quartet.sweep(TABLE | {"reward": len})
    with pytest.raises(quartet.QuartetError, match="run.loop: a builtin_function_or_method is no"):
        quartet.sweep(TABLE, **{"run.loop": len})


def test_a_mistake_names_the_key_and_writes_nothing(tmp_path):
    table = TABLE | {"sweep": {"objective": "gold", "keys": {"optim.lrr": {"values": [1, 2]}}}}
    with pytest.raises(
        quartet.QuartetError, match=r"optim.lrr: no such key. Did you mean optim.lr\?"
    ):
        quartet.sweep(table)
    with pytest.raises(quartet.QuartetError, match="no such sweep"):
        quartet.sweep("epsilon")
    assert list(tmp_path.iterdir()) == []
