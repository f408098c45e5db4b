"""Parts of a user's own: registered by subclass, named in a run's file, trained with."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

import quartet
from quartet.algorithms.kl import NoKL
from quartet.algorithms.policy_loss import Clip
from quartet.cli import app
from quartet.config.toml import ConfigError, read_settings
from quartet.recipes import recipe_path
from quartet.runs.reader import Run
from tests.support.tiny_run import make_run
from tests.support.world import model, tokenizer

DOCS = Path(__file__).parents[1] / "docs"
MINE = "".join(
    re.findall(
        r"```python\n# (?:spo|centred)\.py\n(.*?)```",
        (DOCS / "extending.md").read_text(),
        re.DOTALL,
    )
)


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


class Squared(quartet.PolicyLoss):
    type = "squared"
    scale: float = quartet.Field(default=1.0, gt=0, description="It multiplies the square.")

    def __call__(self, tokens):
        return self.scale * (tokens.ratio - 1).square() - tokens.advantages * tokens.ratio


def test_a_constructor_of_its_own_is_refused_where_the_class_is_written():
    """It would be replaced by that of the settings, without a word."""
    with pytest.raises(quartet.QuartetError, match="Shifted: has an __init__, which would never"):

        class Shifted(quartet.PolicyLoss):
            def __init__(self, shift):
                self.shift = shift

            def __call__(self, tokens):
                return self.shift - tokens.ratio * tokens.advantages

    assert not any(name.endswith("Shifted") for name in quartet.PolicyLoss.members)


def test_a_subclass_is_a_part_with_checked_settings():
    part = Squared(scale=2.0)
    assert (
        part.type == "squared"
        and part.scale == 2.0
        and quartet.PolicyLoss.members["squared"] is Squared
    )
    with pytest.raises(ValidationError, match="greater than 0"):
        Squared(scale=-1.0)
    with pytest.raises(ValidationError, match="(?i)unexpected"):
        Squared(scal=1.0)
    one = torch.ones(1, 1)
    tokens = quartet.Surrogate(one.log() + 0.5, one.log(), one, one.bool())
    assert not part.clipped(tokens).any() and part.adapt({}) is part and part.coefficients() == {}


def test_a_family_takes_instances_and_tables_and_says_which_types_it_knows():
    made = quartet.Algorithm(
        advantage={"type": "group_mean"},
        kl={"type": "none"},
        aggregation={"type": "token_mean"},
        policy_loss=Squared(),
    )
    assert made.policy_loss == Squared() and made.kl == NoKL()
    with pytest.raises(ValidationError) as caught:
        quartet.Algorithm(**{**made.__dict__, "policy_loss": {"type": "clipp"}})
    assert "'clip'" in str(caught.value.errors()[0]["ctx"]["expected_tags"])
    with pytest.raises(ValidationError):
        quartet.Algorithm(**{**made.__dict__, "policy_loss": NoKL()})


@pytest.mark.slow
def test_a_run_trains_with_a_loss_and_an_advantage_of_its_users_own_file(mine, tmp_path):
    words = [
        f'algorithm.policy_loss={{type="{mine}:SpoLoss", epsilon=0.3}}',
        f'algorithm.advantage={{type="{mine}:Centred"}}',
    ]
    run = make_run(tmp_path / "runs", "sums", *words, "run.steps=2")
    assert isinstance(run, Run) and len(run.series["grpo"].steps) == 2
    assert run.config["algorithm"]["policy_loss"] == {"type": f"{mine}:SpoLoss", "epsilon": 0.3}
    again = read_settings(run.path / "config.resolved.toml").config
    assert (
        type(again.algorithm.policy_loss).__name__ == "SpoLoss"
        and again.algorithm.policy_loss.epsilon == 0.3
    )


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            '{type="MINE:SpoLoss", epsilon=-1.0}',
            "algorithm.policy_loss.epsilon = -1.0: must be > 0. The width of the penalty.",
        ),
        ('{type="MINE:SpoLoss", epsilom=1.0}', "no such key"),
        ('{type="MINE:Centred"}', "MINE:Centred is no PolicyLoss"),
        ('{type="MINE:Nothing"}', "MINE: has no Nothing"),
        ('{type="gone.py:X"}', "gone.py: no such file"),
        ('{type="BROKEN:X"}', "BROKEN: failed when it was imported: ZeroDivisionError"),
        ('{type="no_such_package:X"}', "no_such_package: cannot be imported"),
        ('{type="clipp"}', 'algorithm.policy_loss.type = "clipp"'),
    ],
)
def test_what_is_wrong_with_a_part_is_one_sentence(mine, tmp_path, value, sentence):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    place = lambda text: text.replace("MINE", str(mine)).replace("BROKEN", str(broken))  # noqa: E731
    with pytest.raises(ConfigError) as caught:
        read_settings(recipe_path("sums"), ["algorithm.policy_loss=" + place(value)], "recipe sums")
    assert place(sentence) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_documented_loop_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, block = re.findall(r"```python\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    exec(first, {})
    assert "ppo 2 {" in capsys.readouterr().out
    exec(block, {"folder": str(tmp_path)})
    assert quartet.Run("runs/mine").status == "done"
    assert [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()
    ] == ["1", "2"]


def test_the_public_names_are_those_of_the_docs_and_each_is_there():
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(quartet.__all__) and len(listed) == len(set(listed))
    stub = (Path(quartet.__file__).parent / "__init__.pyi").read_text()
    assert sorted(re.findall(r"^from [\w.]+ import (\w+) as \1$", stub, re.MULTILINE)) == sorted(
        quartet.__all__
    )
    for name in quartet.__all__:
        assert getattr(quartet, name) is not None
    assert quartet.PolicyLoss.members["clip"] is Clip
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = quartet.nonsense


def test_the_parts_of_a_file_are_listed_with_their_settings(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import quartet\n\n\nclass Half(quartet.PolicyLoss):\n"
        '    scale: float = quartet.Field(default=0.5, description="What it multiplies.")\n\n'
        "    def __call__(self, tokens):\n        return -self.scale * tokens.advantages\n"
    )
    result = CliRunner().invoke(app, ["algorithms", str(file)])
    assert result.exit_code == 0, result.output
    assert f'PolicyLoss: type = "{file}:Half"' in result.output
    assert "scale (default 0.5)  What it multiplies." in result.output
    file = tmp_path / "none.py"
    for text, sentence in (("", "defines no part"), ("1 / 0", "failed when it was imported")):
        file.write_text(text)
        refused = CliRunner().invoke(app, ["algorithms", str(file)])
        assert refused.exit_code == 2 and sentence in refused.output
        file = tmp_path / "broken.py"
    assert "no such file" in CliRunner().invoke(app, ["algorithms", "nowhere.py"]).output
