"""Model folders that are damaged: `quartet export` copies none of them, and whatever loads one says what is wrong."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quartet.cli import app
from quartet.cli.chat import ChatSession
from quartet.models.heads import ScalarModel
from quartet.models.language_model import ModelError, load_model, load_tokenizer, save
from quartet.runtime.log import no_progress_bars
from tests.malformed.saying import readable
from tests.support.world import model, tokenizer

FILE = "model.safetensors"


def tensors(change):
    """The file again, whole in its form, with other tensors."""

    def act(folder):
        stored = load_file(folder / FILE)
        change(stored)
        save_file(stored, folder / FILE, {"format": "pt"})

    return act


def number(value):
    def change(stored):
        stored["model.norm.weight"][3] = value

    return tensors(change)


def header(change, pad=b""):
    """Another header before the same bytes."""

    def act(folder):
        content = (folder / FILE).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + size])
        change(table)
        text = json.dumps(table).encode()
        (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :] + pad)

    return act


def overlap(table):
    """Two tensors of one shape share their bytes; the file's other bytes are nobody's."""
    first, second, *_ = (
        name for name in table if name.endswith(("q_proj.weight", "o_proj.weight"))
    )
    assert table[first]["shape"] == table[second]["shape"]
    table[second]["data_offsets"] = table[first]["data_offsets"]


def shifted(table):
    for name, entry in table.items():
        if name != "__metadata__":
            entry["data_offsets"] = [x + 8 for x in entry["data_offsets"]]


def bytes_of(change):
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def text(name, content):
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def config(**fields):
    def change(folder):
        table = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(table))

    return change


def wider(folder):
    config(hidden_size=2 * json.loads((folder / "config.json").read_text())["hidden_size"])(folder)


def half(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def link_in_place(folder):
    shutil.move(folder / "tokenizer.json", folder.parent / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "elsewhere.json")


WEIGHTS = {
    "a number that is none": (number(float("nan")), "model.norm.weight in model.safetensors is not finite"),
    "an infinite number": (number(float("-inf")), "model.norm.weight in model.safetensors is not finite"),
    "a file cut in half": (half(FILE), "model.safetensors cannot be read"),
    "a file without its last byte": (bytes_of(lambda b: b[:-1]), "model.safetensors cannot be read"),
    "a byte more": (bytes_of(lambda b: b + b"x"), "model.safetensors cannot be read"),
    "a file of nothing": (bytes_of(lambda b: b""), "model.safetensors cannot be read"),
    "a file of zeros": (bytes_of(lambda b: bytes(len(b))), "model.safetensors cannot be read"),
    "a header of 2^60 bytes": (bytes_of(lambda b: struct.pack("<Q", 2**60) + b[8:]), "model.safetensors cannot be read"),
    "a header that is no JSON": (bytes_of(lambda b: b[:9] + b"x" + b[10:]), "model.safetensors cannot be read"),
    "tensors over each other": (header(overlap), "model.safetensors cannot be read"),
    "tensors with a gap before them": (header(shifted, bytes(8)), "model.safetensors cannot be read"),
    "a shape that is none": (header(lambda t: t["model.norm.weight"].update(shape=[-1])), "model.safetensors cannot be read"),
    "a shape of 2^62": (header(lambda t: t["model.norm.weight"].update(shape=[2**62, 4])), "model.safetensors cannot be read"),
    "an unknown type": (header(lambda t: t["model.norm.weight"].update(dtype="F7")), "model.safetensors cannot be read"),
    "a tensor less": (tensors(lambda s: s.pop("model.norm.weight")), "has no weights for model.norm.weight"),
    "a layer too many": (tensors(lambda s: s.update({"model.layers.9.input_layernorm.weight": torch.ones(16)})), "has weights for model.layers.9."),
    "a tensor of another shape": (tensors(lambda s: s.update({"model.norm.weight": torch.ones(3)})), "cannot be loaded"),
    "no file of weights": (lambda folder: (folder / FILE).unlink(), "has no .safetensors weights"),
    "a folder for the file": (lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()), "model.safetensors cannot be read"),
}  # fmt: skip
OTHERS = {
    "a config that is no JSON": (half("config.json"), "config"),
    "a config that is a list": (text("config.json", "[]"), "config"),
    "a config of another width": (wider, "cannot be loaded"),
    "a config with more layers": (config(num_hidden_layers=5), "has no weights for"),
    "a config with fewer layers": (config(num_hidden_layers=0), "has weights for"),
    "a config of an unknown architecture": (config(model_type="nosuch"), "config cannot be read"),
    "a config that brings code": (config(model_type="own", auto_map={"AutoConfig": "own.Config"}), "config cannot be read"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer."),
    "a tokenizer cut in half": (half("tokenizer.json"), "has no tokenizer that transformers can load"),
    "a tokenizer that is a list": (text("tokenizer.json", "[]"), "has no tokenizer that transformers can load"),
    "a tokenizer that is nested": (text("tokenizer_config.json", "[" * 100_000), "has no tokenizer that transformers can load"),
    "settings of a tokenizer that are a list": (text("tokenizer_config.json", "[]"), "has no tokenizer that transformers can load"),
}  # fmt: skip
LINKS = {
    "a link for a file": (link_in_place, "tokenizer.json: is a link, and only files and folders are exported."),
    "a link to a device": (lambda folder: (folder / "more").symlink_to("/dev/zero"), "more: is a link"),
    "a link to a folder": (lambda folder: (folder / "more").symlink_to("/etc"), "more: is a link"),
    "a named pipe": (lambda folder: os.mkfifo(folder / "more"), "more: is no ordinary file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "policy"
    save(model(), tokenizer(), folder)
    return folder


@pytest.fixture
def policy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run" / "policy")


def exported(run, to, *words):
    with no_progress_bars():  # the command does it by a variable that transformers read long ago
        done = CliRunner().invoke(app, ["export", str(run), "--to", str(to), *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize("words", [(), ("--dtype", "bfloat16")], ids=["as it is", "in bfloat16"])
@pytest.mark.parametrize(
    ("change", "sentence"), (WEIGHTS | OTHERS | LINKS).values(), ids=WEIGHTS | OTHERS | LINKS
)
def test_a_damaged_model_is_not_exported(policy, tmp_path, change, sentence, words):
    """Exit code 1, one sentence, and nothing at the target or beside it."""
    change(policy)
    done = exported(policy.parent, tmp_path / "out", *words)
    if done.exit_code == 2:  # without a config.json it counts as no model
        assert "has no model called policy" in done.output
        return
    assert done.exit_code == 1, done.output
    said = readable(done.output.strip())
    assert (
        sentence in said
        and said.endswith("Nothing was written.")
        and str(policy) in said
        and ".part" not in said
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "elsewhere.json") == [
        "run"
    ]


@pytest.mark.parametrize(("change", "sentence"), (WEIGHTS | OTHERS).values(), ids=WEIGHTS | OTHERS)
def test_a_damaged_model_is_not_talked_to(policy, change, sentence):
    """Chat, evaluation and `policy.model` load through the same two functions."""
    change(policy)
    with pytest.raises(ModelError) as refusal:
        ChatSession(policy.parent, 1.0, 4)
    readable(str(refusal.value))
    with pytest.raises(ModelError):
        load_model(policy), load_tokenizer(policy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_model_with_weights_that_are_no_numbers(tmp_path, value):
    made = ScalarModel.from_trunk(model(), 0, 0)
    made.save(tmp_path / "reward_model", tokenizer())
    number(value)(tmp_path / "reward_model")
    with pytest.raises(ModelError, match=r"norm.weight is not finite: the weights are damaged."):
        ScalarModel.load(tmp_path / "reward_model")


def test_whole_models_of_each_kind_are_exported(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run" / "policy")
    made = ScalarModel.from_trunk(model(), 0, 0)
    made.save(tmp_path / "run" / "reward_model", tokenizer())
    made.save_per_token(tmp_path / "run" / "critic", tokenizer())
    for part in ("policy", "reward_model", "critic"):
        done = exported(tmp_path / "run", tmp_path / part, "--part", part)
        assert done.exit_code == 0 and "written" in done.output, done.output
    again = exported(tmp_path / "run", tmp_path / "policy")
    assert again.exit_code == 2 and "exists already" in again.output
    (tmp_path / "nowhere").symlink_to("gone")
    assert "exists already" in exported(tmp_path / "run", tmp_path / "nowhere").output
