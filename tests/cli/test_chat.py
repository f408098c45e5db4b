"""A conversation in the terminal."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from quartet.cli.chat import ChatSession
from quartet.models.language_model import ModelError, save
from tests.support.world import model, tokenizer


def said(session, *lines):
    out = io.StringIO()
    session.talk(Console(file=out, width=120), lines)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    save(model(), tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_any_models_folder_can_be_talked_to(folder):
    session = ChatSession(folder, 1.0, 3)
    assert "no policy from before RL" in said(session, "/compare")
    said(session, "good")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]


def test_help_lists_the_commands_and_an_unknown_one_is_no_message(folder):
    session = ChatSession(folder, 1.0, 3)
    for command in ("/compare", "/new", "/help", "/quit"):
        assert command in said(session, "/help")
    assert "/hlep: no such command." in said(session, "/hlep")
    assert session.messages == []
    said(session, "good", "/new")
    assert session.messages == []


def test_what_is_longer_than_the_model_reads_is_not_answered(folder):
    session = ChatSession(folder, 1.0, 3)
    long = "the " * session.longest
    assert f"more than the {session.longest} that the model reads. /new" in said(session, long)
    assert session.messages == []
    said(session, "good")
    assert len(session.messages) == 2


def test_a_reward_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="which scores text and generates none"):
        ChatSession(folder, 1.0, 3)


@pytest.mark.slow
def test_no_command_shows_the_progress_bars_of_other_libraries(folder, tmp_path):
    """In a process of its own: they are turned off when transformers is imported."""
    words = [sys.executable, "-m", "quartet", "chat", str(folder)]
    done = subprocess.run(words, check=False, input="good\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is no model's folder"):
        ChatSession(tmp_path, 1.0, 3)


def test_answers_stop_at_the_strings_of_the_run(folder):
    settings = folder / "config.resolved.toml"
    settings.write_text('[rollout]\nstop = ["good", "was"]\n')
    session = ChatSession(folder, 1.0, 30)
    assert session.sampling.stop == ("good", "was")
    reply = said(session, "the film")
    assert "good" not in reply and "was" not in reply
    for other in ("[rollout]\nstop = 3\n", "rollout = 1\n", "not TOML"):
        settings.write_text(other)
        assert ChatSession(folder, 1.0, 3).sampling.stop == ()
