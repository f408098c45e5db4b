"""What is exported loads without Quartet."""

import errno
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from quartet.cli import app
from quartet.models import hub
from quartet.models.export import export
from quartet.models.language_model import ModelError, save
from tests.support.world import model, tokenizer


@pytest.fixture
def run(tmp_path):
    save(model(), tokenizer(), tmp_path / "run" / "policy")
    return tmp_path / "run"


def quartet(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_folder_is_half_the_size_in_bfloat16_and_loads_elsewhere(run, tmp_path):
    done = quartet(run, "--to", tmp_path / "half", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(run / "policy")
    for name, weight in whole.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "half").get_vocab() == tokenizer().get_vocab()


def test_without_a_dtype_it_is_the_same_bytes(run, tmp_path):
    assert quartet(run, "--to", tmp_path / "same").exit_code == 0
    there = {file.name: file.read_bytes() for file in (run / "policy").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "same").iterdir()} == there


def test_nothing_is_written_over_or_left_half_done(run, tmp_path):
    assert f"{run}: exists already" in quartet(run, "--to", run).output.replace("\n", "")
    said = quartet(run, "--to", tmp_path / "x", "--part", "critic").output.replace("\n", "")
    assert "has no model called critic. It has policy." in said
    large = model()
    with torch.no_grad():
        large.lm_head.weight[0, 0] = 1e6
    save(large, tokenizer(), tmp_path / "large")
    with pytest.raises(
        ModelError, match=r"has weights up to 1e\+06, too large for float16. Use bfloat16\."
    ):
        export(tmp_path / "large", tmp_path / "x", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "run"]


def test_a_policy_that_was_sampled_is_exported_to_be_sampled(run, tmp_path):
    rollout = "[rollout]\nmax_new_tokens = 77\ntemperature = 0.7\ntop_k = 0\ntop_p = 1.0\n"
    (run / "config.resolved.toml").write_text(rollout)
    (run / "policy" / "README.md").write_text("All settings: `../config.resolved.toml`.")
    base = {"eos_token_id": 1, "repetition_penalty": 1.3, "min_new_tokens": 9}
    (run / "policy" / "generation_config.json").write_text(json.dumps(base))
    target = tmp_path / "mine"
    assert quartet(run, "--to", target).exit_code == 0
    table = json.loads((target / "generation_config.json").read_text())
    assert table["eos_token_id"] == tokenizer().eos_token_id
    theirs = AutoModelForCausalLM.from_pretrained(target).generation_config
    assert theirs.do_sample and theirs.temperature == 0.7 and theirs.max_new_tokens == 77
    assert theirs.top_k == 0, "transformers' own default keeps 50"
    assert not theirs.repetition_penalty and not theirs.min_new_tokens, "the run had none"
    assert "All settings: `config.resolved.toml`." in (target / "README.md").read_text()
    assert (target / "config.resolved.toml").read_text() == rollout


def test_a_full_disk_is_one_sentence(run, tmp_path, monkeypatch):
    def full(source, target, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    monkeypatch.setattr("shutil.copy2", full)
    monkeypatch.setattr("shutil.copytree.__defaults__", (False, None, full, False, False))
    done = quartet(run, "--to", tmp_path / "x")
    said = done.output.replace("\n", "")
    assert done.exit_code == 1 and not (tmp_path / "x").exists()
    assert said.endswith("x: cannot be written (No space left on device). Nothing was written.")


class Hub:
    """Answers as the hub's client does, and keeps what it was asked."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def create_repo(self, name, private, exist_ok, repo_type):
        self.asked.append((name, repo_type, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message, repo_type):
        if self.error:
            raise self.error
        names = sorted(path.name for path in folder_path.iterdir())
        self.asked.append((repo_id, repo_type, commit_message, names))


def test_a_pushed_model_is_the_folder_that_was_written_in_a_private_repository(
    run, tmp_path, monkeypatch
):
    fake = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    done = quartet(run, "--to", tmp_path / "out", "--push", "me/model")
    assert done.exit_code == 0 and "https://hub/me/model uploaded" in done.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert fake.asked == [
        ("me/model", "model", True, True),
        ("me/model", "model", "Model by Quartet", names),
    ]


def test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(OSError("no route to the hub\nmore")))
    monkeypatch.setattr(hub, "get_token", lambda: "secret")
    done = quartet(run, "--to", tmp_path / "out", "--push", "me/model")
    assert done.exit_code == 1 and (tmp_path / "out" / "model.safetensors").is_file()
    said = " ".join(done.output.split())
    assert "me/model: could not be uploaded (no route to the hub). The folder is whole" in said
    assert f"hf upload me/model {tmp_path / 'out'}" in said


@pytest.mark.parametrize(
    ("name", "token", "sentence"),
    [
        ("model", "secret", "--push model: write owner/name, as on the hub."),
        (
            "me/model",
            None,
            "--push me/model: needs an account of the hub: log in with: hf auth login",
        ),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_anything_is_written(
    run, tmp_path, monkeypatch, name, token, sentence
):
    monkeypatch.setattr(hub, "get_token", lambda: token)
    done = quartet(run, "--to", tmp_path / "out", "--push", name)
    assert done.exit_code == 2 and sentence in done.output and not (tmp_path / "out").exists()
