"""What is never done, whatever comes in: unpickling, evaluating, telling secrets, listening to strangers, waiting for ever."""

import ast
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from starlette.testclient import TestClient
from typer.testing import CliRunner

import quartet.cli
from quartet.cli import app
from quartet.config.toml import ConfigError, read_settings
from quartet.io.http_client import Reply
from quartet.recording.run_folder import RunFolder
from quartet.recording.tokens import TokenTexts
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.runtime import machine
from quartet.runtime.events import StageFailed
from quartet.runtime.pipeline import Pipeline
from quartet.runtime.saving import Saving
from quartet.studio.app import make_app
from quartet.training import state_tree
from tests.support.world import tokenizer
from tests.training.test_guards import stage

SOURCES = sorted((Path(__file__).parents[1] / "src" / "quartet").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(p.parents[1])))
def test_no_source_unpickles_or_evaluates(path):
    """Programs of a model are run by rewards/code.py, as text that is given to a sandbox."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {
                "eval",
                "exec",
                "compile",
                "torch.load",
                "os.system",
                "marshal.loads",
                "yaml.load",
            }, name
            assert not any(
                k.arg == "shell" and getattr(k.value, "value", False) for k in node.keywords
            ), name
            assert not any(
                k.arg == "trust_remote_code" and getattr(k.value, "value", True)
                for k in node.keywords
            ), name
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not named & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "marshal",
                "shelve",
                "joblib",
            }


# --- servers that keep a connection ------------------------------------------------------------------------------------------


@pytest.fixture
def drips():
    """A server that sends its answer a byte at a time, for ever: its headers, or its body."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.1)
    ended = threading.Event()
    begin = [b"HTTP/1.1 200 OK\r\n"]

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(begin[0])
                    while not ended.is_set():
                        connection.sendall(b"x")
                        time.sleep(0.02)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", begin
    ended.set()
    thread.join()
    listening.close()


@pytest.mark.parametrize(
    "begin", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n"]
)
def test_a_server_that_drips_is_not_waited_for(drips, begin):
    url, sent = drips
    sent[0] = begin
    endpoint = Endpoint("reward server", url, timeout=0.3, tries=1)
    with pytest.raises(RewardError, match="did not answer in 0.3 s"):
        endpoint.ask({})
    endpoint.close()


def test_an_answer_that_is_nested_a_hundred_thousand_times(monkeypatch):
    endpoint = Endpoint("reward server", "http://127.0.0.1:9/", tries=1)

    async def exchange(*request):
        return Reply(200, {}, b"[" * 100_000)

    monkeypatch.setattr(endpoint._client, "exchange", exchange)
    with pytest.raises(RewardError, match="something that is not JSON"):
        endpoint.ask({})
    endpoint.close()


# --- secrets and strangers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://me:secret@host/score", "http://token@host"])
def test_an_address_with_a_password_is_refused(tmp_path, url):
    file = tmp_path / "a.toml"
    file.write_text(
        f'recipe = "grpo"\n[data]\nworld = "sums"\n[[reward]]\ntype = "server"\nurl = "{url}"\n'
    )
    with pytest.raises(ConfigError, match="reward.0.url"):
        read_settings(file)


def test_a_token_is_sent_and_never_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "hunter2-hunter2")
    endpoint = Endpoint("reward server", "http://127.0.0.1:9/", tries=1, token_env="MY_TOKEN")
    assert "Bearer hunter2-hunter2" in endpoint._client._headers.values()
    with pytest.raises(RewardError) as caught:
        endpoint.ask({})
    assert "hunter2" not in str(caught.value)
    endpoint.close()
    file = tmp_path / "a.toml"
    file.write_text(
        'recipe = "grpo"\n[data]\nworld = "sums"\n[policy]\ncreate = { type = "llama", max_length = 1024 }\n'
        '[rollout]\nsamples_per_prompt = 4\n[[reward]]\ntype = "server"\nurl = "http://127.0.0.1:9/"\ntoken_env = "MY_TOKEN"\n'
    )
    settings = read_settings(file)
    assert "hunter2" not in quartet.config.toml.resolved_toml(settings) and "hunter2" not in repr(
        settings.config
    )


def test_a_studio_for_others_asks_for_its_token(ppo_run):
    with TestClient(make_app([ppo_run.path], ("*",), token="abc")) as stranger:
        assert stranger.get("/").status_code == 401
        assert stranger.get("/static/studio.css").status_code == 401
        assert stranger.get("/?token=abd", follow_redirects=False).status_code == 401
        came_in = stranger.get("/?token=abc", follow_redirects=False)
        assert came_in.status_code == 303 and "httponly" in came_in.headers["set-cookie"].lower()
        assert stranger.get("/").status_code == 200, "the cookie is the token from now on"
    with TestClient(make_app([ppo_run.path], ("*",))) as own:
        assert own.get("/").status_code == 200


def test_a_reward_server_for_others_needs_a_token(tmp_path):
    done = CliRunner().invoke(app, ["serve-reward", str(tmp_path), "--host", "0.0.0.0"])
    assert done.exit_code == 2 and "so it must ask for a token: --token-env NAME." in done.output


# --- surroundings ----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_with_what_is_needed_and_what_there_is(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "x", {})
    pipeline, save_file = (
        Pipeline([stage(monkeypatch, set())], folder, TokenTexts(tokenizer()), Saving(every=2)),
        state_tree.save_file,
    )

    def full(tensors, path):
        if "000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(state_tree, "save_file", full)
    with pytest.raises(
        StageFailed,
        match=r"checkpoint sft-000004 could not be written \(No space left on device; it needs \d.* MB\). "
        r"The last good one is sft-000002.",
    ):
        list(pipeline.run())
    folder.close()


def test_a_package_that_is_too_old_is_named_with_what_to_install(monkeypatch):
    assert machine.unmet_requirements() == []
    real = machine.metadata.version
    monkeypatch.setattr(
        machine.metadata, "version", lambda name: "2.4.0" if name == "torch" else real(name)
    )
    [said] = machine.unmet_requirements()
    need = next(
        Requirement(line)
        for line in machine.metadata.requires("quartet-rlhf")
        if line.startswith("torch")
    )
    assert (
        said
        == f'torch 2.4.0 is installed, Quartet needs {need.specifier}: pip install "torch{need.specifier}"'
    )


def test_what_nobody_foresaw_is_a_sentence_and_with_debug_a_traceback(monkeypatch, capsys):
    def breaks():
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(quartet.cli, "app", breaks)
    monkeypatch.setattr("sys.argv", ["quartet", "runs"])
    with pytest.raises(SystemExit) as ended:
        quartet.cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert (
        "failed: ZeroDivisionError: of all things. --debug prints the traceback." in said
        and "Traceback" not in said
    )
    monkeypatch.setattr("sys.argv", ["quartet", "runs", "--debug"])
    with pytest.raises(ZeroDivisionError):
        quartet.cli.main()


def test_a_command_in_a_folder_that_was_deleted_says_so(tmp_path):
    """Intel's library, which torch loads, ends such a process itself."""
    gone = tmp_path / "gone"
    gone.mkdir()
    line = 'cd "$0"; rmdir "$0"; exec "$1" -m quartet run guess run.steps=1'
    done = subprocess.run(
        ["sh", "-c", line, gone, sys.executable], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "The folder that this command was started in was deleted. Change to another one.\n"
    )


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "x", {})
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    list(
        Pipeline(
            [stage(monkeypatch, set())], folder, TokenTexts(tokenizer()), Saving(every=2)
        ).run()
    )
    folder.close()
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "metrics"] == [1, 2, 3, 4, 5, 6]
    assert all(e["seconds"] >= 0 for e in events if "seconds" in e)


def test_the_tests_reach_nobody_outside():
    """The hook in conftest.py: a connection to another machine is an error in whatever test makes it."""
    with pytest.raises(httpx.ConnectError, match="a test reached for"):
        httpx.get("http://192.0.2.1/", timeout=0.1)
    with pytest.raises(PermissionError, match="a test listens"):
        with socket.socket() as wide:
            wide.bind(("0.0.0.0", 0))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
