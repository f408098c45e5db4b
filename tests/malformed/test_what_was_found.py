"""Inputs that went through, or ended in a traceback, when they were first tried."""

import json
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quartet.cli import app
from quartet.config.toml import ConfigError, read_settings
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, load_model, read_config, save
from quartet.planning.memory import _safetensors_parameters
from quartet.recipes import recipe_path
from tests.support.world import model, tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "lm"
    save(model(), tokenizer(), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "lm")


def configured(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_that_are_not_there_are_not_made_up(folder):
    layers = read_config(folder).num_hidden_layers
    configured(folder, num_hidden_layers=layers + 1)
    with pytest.raises(
        ModelError, match=rf"has no weights for model.layers.{layers}.*, which would be random"
    ):
        load_model(folder)
    configured(folder, num_hidden_layers=layers - 1)
    with pytest.raises(
        ModelError,
        match=rf"has weights for model.layers.{layers - 1}.*, which its config.json does not know",
    ):
        load_model(folder)


def test_weights_that_are_no_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match="model.norm.weight is not finite: the weights are damaged"
    ):
        load_model(folder)


DAMAGED = {
    "empty": b"",
    "four bytes": b"1234",
    "a header of terabytes": struct.pack("<Q", 2**42) + b"{}",
    "a header that is not JSON": struct.pack("<Q", 4) + b"oops",
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        load_model(folder)
    with pytest.raises(ModelError, match="cannot be loaded as a reward model"):
        ScalarModel.load(folder)
    assert _safetensors_parameters(folder / "model.safetensors") == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"vocab_size": None},
        {"num_attention_heads": 5},
        {"hidden_act": "nosuch"},
    ],
)
def test_configs_that_no_model_has(folder, changes):
    configured(folder, **changes)
    with pytest.raises(ModelError):
        read_config(folder)
        load_model(folder)


WORDS = {
    "optim.lr=inf": "optim.lr = inf: must be a finite number.",
    "reward.0.weight=nan": "reward.0.weight = nan: must be a finite number.",
    "algorithm.kl.coef=inf": "algorithm.kl.coef = inf: must be a finite number.",
    "optim.betas=[inf, 0.9]": "must be a finite number.",
    'run.name="a/b"': "run.name = 'a/b': is a name, not a path",
    'run.name="../x"': "is a name, not a path",
    'run.name=""': "is a name, not a path",
    'policy.model=""': "policy.model: is empty. Name a file or folder.",
    'data.train=""': "data.train: is empty. Name a file or folder.",
}


@pytest.mark.parametrize(("word", "sentence"), WORDS.items())
def test_values_that_went_through(word, sentence):
    with pytest.raises(ConfigError) as caught:
        read_settings(recipe_path("reviews"), [word])
    assert sentence in str(caught.value)


def test_bounds_may_be_infinite():
    words = [
        "optim.max_grad_norm=inf",
        "algorithm.value_loss.clip=inf",
        "algorithm.policy_loss.high=inf",
    ]
    assert read_settings(recipe_path("reviews"), words).config.optim.max_grad_norm == float("inf")


@pytest.mark.parametrize("name", ["", "./reviews", "../recipes/reviews", "templates/ppo"])
def test_a_recipe_is_a_name(name):
    assert recipe_path(name) is None


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        read_settings(tmp_path)


def test_weights_are_as_readable_as_the_files_beside_them(small_run, tmp_path):
    done = CliRunner().invoke(
        app, ["export", str(small_run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]
    )
    assert done.exit_code == 0, done.output
    files = [p for folder in (small_run, tmp_path / "out") for p in folder.rglob("*.safetensors")]
    assert len({p.parent.name for p in files}) > 3  # policy, sft, checkpoints, out
    assert {p.stat().st_mode for p in files} == {(small_run / "env.json").stat().st_mode}
