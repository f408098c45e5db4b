"""A run knows the files of its user's code: one that has changed refuses resume."""

import pytest

from quartet.assembly import build
from quartet.assembly.data import fingerprints
from quartet.assembly.user_code import code_files
from quartet.config.toml import read_settings
from quartet.rewards.sources import FunctionSource
from quartet.runtime.resume import CannotResume, choose
from tests.support.tiny_run import make_run

PARTS = """
import quartet

class Plain(quartet.PolicyLoss):
    def __call__(self, tokens):
        return -tokens.ratio * tokens.advantages

class Length(quartet.RewardSource):
    def __call__(self, rollouts):
        return [len(r.response_ids) for r in rollouts]
"""
FUNCTION = "def reward(responses):\n    return [0.0 for _ in responses]\n"
METRIC = """
import quartet
from quartet.recording.metric import Metric

class Zero(Metric):
    def __call__(self, step):
        return 0.0
"""


@pytest.fixture
def run(tmp_path):
    for name, text in (("parts", PARTS), ("function", FUNCTION), ("metric", METRIC)):
        (tmp_path / f"{name}.py").write_text(text)
    rewards = (
        f'{{type="{tmp_path}/parts.py:Length"}}, '
        f'{{type="function", function="{tmp_path}/function.py:reward"}}'
    )
    return make_run(
        tmp_path / "runs",
        "sums",
        f'algorithm.policy_loss={{type="{tmp_path}/parts.py:Plain"}}',
        f"reward=[{rewards}]",
        f'run.metrics=["{tmp_path}/metric.py:Zero"]',
        "run.steps=1",
        "run.checkpoint_every=1",
        "evaluation.best_of=0",
    )


def test_a_changed_file_of_the_users_code_refuses_resume_until_it_is_accepted(run, tmp_path):
    config = read_settings(run.path / "config.resolved.toml").config
    parts, function = (str(tmp_path / name) for name in ("parts.py", "function.py"))
    assert code_files(config).keys() == {parts, function}
    choose(run.path, config, build(config).made_with, ())

    (tmp_path / "parts.py").write_text(PARTS + "# changed\n")
    (tmp_path / "metric.py").write_text(METRIC + "# changed\n")
    made_with = {**build(config).made_with, "data": fingerprints(config)}
    sentence = (
        f"was made with other contents of {parts}. Pass --accept {parts}, or put the old file back."
    )
    with pytest.raises(CannotResume, match=f"{sentence}$") as refused:
        choose(run.path, config, made_with, ())
    assert "function.py" not in str(refused.value)
    choice = choose(run.path, config, made_with, [parts])
    assert choice.accepted[0].endswith("Accepted.")


def test_a_function_of_an_importable_module_is_known_by_its_name():
    source = FunctionSource("json.dumps")
    assert code_files((source, FunctionSource("json:dumps")))["json"].name == "__init__.py"
    assert code_files((FunctionSource("no_such_module.f"),)) == {}
