"""A run knows the files of its user's code: one that has changed refuses resume."""

import dataclasses

import pytest

from quartet.assembly import build
from quartet.assembly.data import fingerprints
from quartet.assembly.user_code import code_files
from quartet.config.toml import read_settings
from quartet.errors import PartError
from quartet.loops.rl import Step
from quartet.recipes import recipe_path
from quartet.rewards.sources import FunctionSource
from quartet.runtime.resume import CannotResume, choose
from quartet.stages.rl import checked
from tests.support import killing
from tests.support.tiny_run import make_run

pytestmark = pytest.mark.slow

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


LOOP = """import quartet

def loop(collector, learner, algorithm, done=0):
    yield from quartet.rl(collector, learner, algorithm, done)
"""


def test_a_users_loop_is_the_rl_stages(tmp_path):
    (tmp_path / "mine.py").write_text(LOOP)
    words = ("run.steps=2", "evaluation.best_of=0")
    loop = f'run.loop="{tmp_path}/mine.py:loop"'
    own, ours = (make_run(tmp_path / str(len(w)), "sums", *words, *w) for w in ([loop], []))
    assert own.series["grpo"].columns == ours.series["grpo"].columns
    config = read_settings(own.path / "config.resolved.toml").config
    assert code_files(config).keys() == {f"{tmp_path}/mine.py"}


def test_a_loop_yields_the_next_step_and_nothing_else():
    with pytest.raises(PartError, match=r"run.loop: yielded a dict, not a quartet.Step"):
        list(checked(iter([{}]), 0))
    step = object.__new__(Step)
    object.__setattr__(step, "number", 7)
    assert list(checked(iter([step]), 6)) == [step]
    with pytest.raises(PartError, match="yielded step 7 in the place of 3"):
        list(checked(iter([step]), 2))


def test_a_loop_that_is_not_there_is_said_before_anything_starts(tmp_path):
    (tmp_path / "mine.py").write_text("number = 3\n")
    for name, said in {
        "mine.loop": "write file.py:name",
        f"{tmp_path}/mine.py:loop": "has no loop",
        f"{tmp_path}/other.py:loop": "no such file",
        f"{tmp_path}/mine.py:number": "is of type int, and no function",
    }.items():
        with pytest.raises(PartError, match=said):
            make_run(tmp_path / "runs", "sums", f'run.loop="{name}"')


def test_a_run_with_a_users_stage_goes_on_from_a_checkpoint_of_it(tmp_path):
    (tmp_path / "stage.py").write_text(killing.STAGE)
    words = [w for w in killing.CUSTOM[1:] if not w.startswith(("reward_model", "recipe"))]
    kind = f"{tmp_path}/stage.py:Best"
    stage = f'custom={{type="{kind}", steps=2, batch_size=4, schedule="constant"}}'
    recipe = 'recipe=["sft","custom"]'
    run = make_run(tmp_path / "runs", "reviews", *words, recipe, stage, "reward=[{type='gold'}]")
    config = read_settings(run.path / "config.resolved.toml").config
    longer = dataclasses.replace(config, custom=dataclasses.replace(config.custom, steps=5))
    assert choose(run.path, longer, build(longer).made_with, ()).checkpoint.facts["step"] == 2
    other = dataclasses.replace(config, custom=dataclasses.replace(config.custom, lr=0.5))
    with pytest.raises(CannotResume, match=r"custom.lr = 1e-05, the config says 0.5"):
        choose(run.path, other, build(other).made_with, ())


@pytest.mark.parametrize(
    ("stage", "more", "expected"),
    [
        ("custom", ("reward=[{type='gold'}]",), True),
        ("custom", ("custom.type={stage}:Offline", "reward=[{type='gold'}]"), False),
        ("online_dpo", ("reward=[{type='gold'}]",), True),
        ("dpo", (), False),
        ("ppo", ("reward=[{type='gold'}]", "algorithm.preset=ppo"), True),
    ],
)
def test_a_stage_says_whether_it_leaves_rollouts(stage, more, expected, tmp_path):
    """By this a run that is resumed in a later stage knows whose rollouts to keep."""
    file = tmp_path / "stage.py"
    file.write_text(killing.STAGE + '\n\nclass Offline(Best):\n    reads = "demonstrations"\n')
    words = ["policy.create.hidden_size=16", "data.rows=32", f'recipe=["{stage}"]']
    words += [f'custom={{type="{file}:Best"}}'] * (stage == "custom")
    words += [word.replace("{stage}", str(file)) for word in more]
    [made] = build(read_settings(recipe_path("reviews"), words, "recipe reviews").config).stages
    assert getattr(made, "samples", False) is expected
