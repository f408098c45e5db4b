"""Runs in the terminal."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from quartet.cli import app
from quartet.cli.common import is_loopback
from quartet.launch import start
from quartet.runs.tables import token_rows
from quartet.runs.untrusted import printable
from tests.support.sweep_record import make_sweep


def quartet(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_rollout_token_by_token(ppo_run):
    done = quartet("inspect", ppo_run.path, "--step", 5, "--sample", 2)
    rows = ppo_run.sample(5, 2)
    assert done.exit_code == 0
    for text, reward, own in zip(rows["text"], rows["reward"], rows["is_response"], strict=True):
        if own:
            assert any(
                line.startswith(printable(text)[:18]) and f"{reward:.2f}".replace("-", "−") in line
                for line in done.output.splitlines()
            )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("replay", "RUN", "--step", 1), "computing"),
        (("export", "RUN", "--to", "NEW"), "writing policy"),
        (("eval", "RUN", "--rows", 8, "--to", "NEW"), "evaluating"),
        pytest.param(
            ("critic", "RUN", "--prompts", 2, "--prefixes", 2, "--continuations", 2),
            "sampling from",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_that_takes_long_says_what_it_does(ppo_run, tmp_path, monkeypatch, words, shown):
    monkeypatch.setattr("quartet.cli.screen.PLAIN_SECONDS", 0.001)
    monkeypatch.setattr("quartet.cli.screen.PLAIN_GROWTH", 1.0)
    monkeypatch.setattr("quartet.cli.screen.SHOWN_SECONDS", 0.0)
    places = {"RUN": shutil.copytree(ppo_run.path, tmp_path / "run"), "NEW": tmp_path / "new"}
    done = quartet(*(places.get(word, word) for word in words))
    assert done.exit_code == 0, done.output
    assert f"     {shown}" in done.stderr
    assert f"     {shown}" not in done.stdout


@pytest.mark.parametrize(("width", "columns"), [(60, 5), (100, 9), (200, 12)])
def test_a_narrow_screen_has_fewer_columns(ppo_run, width, columns):
    rows = ppo_run.sample(5, 2)
    assert len(token_rows(rows, ppo_run.cases(rows), width).columns) == columns


def test_the_samples_of_a_step_and_the_runs_of_a_folder(ppo_run, grpo_run, runs):
    assert "response" in quartet("inspect", ppo_run.path).output
    listed = quartet("runs", runs).output
    assert ppo_run.name in listed and grpo_run.name in listed


def test_two_runs_side_by_side(ppo_run, grpo_run):
    output = quartet("compare", ppo_run.path, grpo_run.path).output
    assert "algorithm.advantage.type" in output and "gae" in output


def test_the_doctor_s_exit_code_is_for_scripts(ppo_run, tmp_path):
    found = quartet("doctor", ppo_run.path, "--json")
    assert found.exit_code == (3 if json.loads(found.output) else 0)
    event = {
        "time": 1.0,
        "event": "metrics",
        "stage": "ppo",
        "step": 1,
        "metrics": {"ratio/first_error": 0.5},
    }
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    done = quartet("doctor", tmp_path)
    assert done.exit_code == 3 and "▲ ppo, step 1: ratios are up to 0.5 from 1" in done.output


def test_the_machine():
    facts = json.loads(quartet("doctor", "--json").output)
    assert facts["packages"]["torch"] and "lora" in facts["extras"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["runs", "nowhere"], "nowhere: no such folder"),
        (["studio", "nowhere"], "nowhere: no such folder"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["compare", "one"], "compare needs two runs or more"),
    ],
)
def test_what_is_not_there_is_said(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = quartet(*words)
    assert done.exit_code == 2 and sentence in done.output


def test_sweeps_are_listed_beside_runs(tmp_path):
    sweep = make_sweep(tmp_path / "runs", [({"a": 1}, [1.0], [2.0]), ({"a": 2}, [3.0], [2.0])])
    done = quartet("runs", str(tmp_path / "runs"))
    assert done.exit_code == 0 and f"sweep  {sweep.name}" in done.output
    assert "2 of 2 trials done" in done.output and "best a 2 · gold 3" in done.output


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("127.9.9.9", True),
        ("0.0.0.0", False),
        ("x", False),
    ],
)
def test_which_hosts_are_this_machine(host, here):
    assert is_loopback(host) is here


def test_control_characters_are_shown_not_obeyed():
    assert printable("a\x1b[31m\nb\u202e") == "a\\x1b[31m\\nb\\u202e"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "reviews", "--run.steps", "3"], "--run.steps: settings are written without dashes: run.steps=3"),
        (["plan", "sums", "--run.steps=3"], "--run.steps: settings are written without dashes: run.steps=3"),
        (["run", "sums", "--init-kl-coef", "3"], "--init-kl-coef: no such option. Did you mean algorithm.kl.coef? Settings are written key=value."),
    ],
)  # fmt: skip
def test_a_setting_that_is_written_as_an_option_is_answered_with_the_right_form(words, sentence):
    done = quartet(*words)
    assert done.exit_code == 2 and sentence in done.output.replace("\n", " ")


def test_a_run_that_is_stopped_before_it_begins_says_so(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "job_of", interrupted)
    done = quartet("run", "sums")
    assert done.exit_code == 130 and not list(tmp_path.iterdir())
    assert done.output == "stopped by Ctrl-C before the run began: nothing was written\n"


def test_a_text_of_millions_of_words_is_cut(tmp_path):
    row = json.dumps({"prompt": "a" * 10**6, "completion": "b"})
    (tmp_path / "long.jsonl").write_text(row + "\n")
    done = quartet("data", str(tmp_path / "long.jsonl"))
    assert done.exit_code == 0 and len(done.output) < 3000
    assert "aa … (998,000 more characters)" in done.output.replace("\n", "")


def test_an_option_that_is_no_setting_is_refused_as_ever():
    done = quartet("run", "sums", "--nonsense")
    assert done.exit_code == 2 and "no such option: --nonsense" in done.output
