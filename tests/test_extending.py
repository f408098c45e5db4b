"""The worked examples of docs/extending.md: each is a file that runs as it stands, from TOML and from
Python, in a whole small run."""

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import quartet
from quartet.api.run import TrainingRun
from quartet.config.toml import read_settings, table_toml
from quartet.parts import Family

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    name: (code, toml, python)
    for name, code, toml, python in re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```\n```toml\n(.*?)```\n```python\n(.*?)```", TEXT, re.DOTALL
    )
}
MODEL = {"type": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 1024}
BASE = {
    "recipe": "grpo",
    "data": {"world": "sums", "rows": 32},
    "policy": {"create": MODEL},
    "reward": [{"type": "exact"}],
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 8},
    "run": {"steps": 3},
}
QUIZ = {
    "recipe": "sft",
    "data": {"train": "quiz.jsonl"},
    "policy": {"create": MODEL, "tokenizer": {"type": "train", "vocab_size": 300}},
    "sft": {"steps": 1, "batch_size": 4},
}
SLIC = {
    "recipe": "dpo",
    "data": {"world": "reviews", "rows": 32},
    "policy": {"create": MODEL},
    "preference": {"steps": 2, "batch_size": 4},
}
RAFT = {key: value for key, value in BASE.items() if key != "run"} | {
    "recipe": "custom",
    "rollout": {"max_new_tokens": 8},
}
BASES = {"quiz.py": QUIZ, "slic.py": SLIC, "raft.py": RAFT}
ROW = {"question": "2 + 2?", "choices": {"a": "3", "b": "4"}, "right": "b"}


@pytest.fixture(params=sorted(EXAMPLES))
def example(request, tmp_path, monkeypatch):
    """The name of an example whose file, and nothing else of ours, is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path(request.param).write_text(EXAMPLES[request.param][0])
    Path("quiz.jsonl").write_text(f"{json.dumps(ROW)}\n" * 8)
    Path("base.toml").write_text(table_toml(BASES.get(request.param, BASE)))
    yield request.param
    sys.modules.pop(request.param.removesuffix(".py"), None)


def took_part(name: str, run: TrainingRun) -> bool:
    """Whether the part of the example was one of the run's."""
    record = quartet.Run(run.folder)
    stage = next(reversed(record.series.values()))
    assert len(stage.steps) == (1 if name == "quiz.py" else 2 if name == "slic.py" else 3)
    if name == "brevity.py":
        assert max(stage.columns["reward/Brevity"]) > 0
    if name == "raft.py":
        assert len(stage.columns["reward/best"]) == 3 and record.steps() == [1, 2, 3]
        samples = record.samples(1)
        assert len(samples) == 4 * 8 and {s.score for s in samples} <= {0.0, 1.0}
        tokens = record.sample(1, 0)
        own = [i for i, mine in enumerate(tokens["is_response"]) if mine]
        assert (
            all(tokens["old_logprob"][i] <= 0 for i in own) and tokens["advantage"][own[0]] is None
        )
    if name == "growing.py":
        assert max(stage.columns["response/tokens"][:1]) <= 2 and stage.columns["reward/exact"]
    if name == "questions.py":
        assert "mine/questions" in stage.columns and record.definitions[0].percent
    return f"{name}:" in json.dumps(record.config)


@pytest.mark.slow
def test_an_example_runs_from_toml(example):
    table, block = BASES.get(example, BASE), tomllib.loads(EXAMPLES[example][1])
    for key, value in block.items():
        both = isinstance(value, dict) and key in table
        table = {**table, key: {**table[key], **value} if both else value}
    Path("run.toml").write_text(table_toml(table))
    run = TrainingRun(read_settings(Path("run.toml")), {})
    run.finish()
    assert took_part(example, run)


@pytest.mark.slow
def test_an_example_runs_from_python(example):
    scope = dict(vars(importlib.import_module(example.removesuffix(".py"))))
    exec(EXAMPLES[example][2], scope)
    run = quartet.train("base.toml", **scope["settings"])
    run.finish()
    assert took_part(example, run)


def test_each_kind_of_part_has_an_example_of_25_lines_of_code_at_most():
    shown = set(re.findall(r"^class \w+\(quartet\.(\w+)\)", TEXT, re.MULTILINE))
    assert shown == {
        "Advantage",
        "GeneratorSource",
        "KL",
        "Metric",
        "NativeGenerator",
        "PolicyLoss",
        "PreferenceLoss",
        "RewardSource",
        "RowShape",
        "ScoreShape",
        "StageSource",
    }
    for name, (code, _, _) in EXAMPLES.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 25 and max(map(len, lines)) <= 100, name


def test_every_family_is_public_but_those_inside_other_parts():
    families = {family.__name__ for family in Family.__subclasses__()}
    assert families - set(quartet.__all__) == {"ActorUpdate", "Controller"}
