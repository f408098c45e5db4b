"""A run keeps the places that its config's links led to when it began, and is found again from anywhere."""

import dataclasses
import json
import os
import shlex
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quartet.cli import app
from quartet.config.links import PATHS, absolute_word, relative_paths, where
from quartet.config.suggestions import _parts_in
from quartet.config.tables import Config
from quartet.config.toml import read_settings, resolved_toml
from quartet.io.texts import typed
from quartet.recording.run_folder import RunFolder, beginning_of, point_latest
from tests.support.tiny_run import SMALL, make_run

FILE = """recipe = RECIPE
[data]
world = "sums"
rows = 64
held_out_rows = 64
[policy]
model = "runs/latest/sft"
[[reward]]
type = "exact"
[rollout]
prompts_per_step = 8
samples_per_prompt = 4
max_new_tokens = 8
[run]
steps = 2
checkpoint_every = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that made an SFT model, to start others from."""
    root = tmp_path_factory.mktemp("place")
    make_run(root / "runs", "sums", *SMALL, 'recipe=["sft", "grpo"]', "run.steps=1")
    (root / "grpo.toml").write_text(FILE.replace("RECIPE", '"grpo"'))
    (root / "both.toml").write_text(
        FILE.replace("RECIPE", '["sft", "grpo"]') + "[sft]\nsteps = 2\nbatch_size = 8\n"
    )
    return root


def linked(tmp_path: Path) -> None:
    (tmp_path / "runs" / "1").mkdir(parents=True)
    (tmp_path / "runs" / "1" / "rows.jsonl").write_text("{}")
    (tmp_path / "runs" / "latest").symlink_to("1")
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "rows.jsonl").symlink_to("blob")
    (tmp_path / "far").symlink_to("/usr/lib")
    (tmp_path / "rw.py").write_text("")
    (tmp_path / "runs" / "1" / "rw.py").write_text("")


WHERE = {
    "runs/latest": "runs/1",
    "runs/latest/": "runs/1",
    "runs/latest/rows.jsonl": "runs/1/rows.jsonl",
    "runs/latest/../latest": "runs/1",
    "runs/latest/rw.py:f": "runs/1/rw.py:f",
    "rows.jsonl": "rows.jsonl",  # a file keeps its name, and with it what kind of file it is
    "far": "/usr/lib",
    "rw.py:f": "rw.py:f",
    "runs/1": "runs/1",
    "owner/model": "owner/model",
    "a\0b": "a\0b",
    "": "",
}


@pytest.mark.parametrize("written", WHERE)
def test_where_a_path_leads(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    linked(tmp_path)
    assert where(written) == WHERE[written]
    if written:
        absolute = (
            str(tmp_path / WHERE[written])
            if written not in {"owner/model", "a\0b", "far"}
            else written
        )
        assert where(str(tmp_path / written)) in {WHERE[written], absolute, str(tmp_path / written)}


def test_every_key_that_names_a_path_is_known():
    """A new key of type text is a path, or is listed here as none."""
    others = {
        "policy.adapter.targets", "run.folder", "run.name", "run.device", "run.keep_best", "launch.address",
        "generator.urls", "reward.*.name", "reward.*.url", "reward.*.token_env", "reward.*.answer", "reward.*.tests",
        "reward.*.pattern", "reward.*.separator", "reward.*.object", "recipe",
        "data.shape.columns", "data.shape.label", "rollout.stop", "algorithm.advantage.separator",
    }  # fmt: skip
    found = set()

    def look(owner, prefix):
        for name, hint in typing.get_type_hints(owner, include_extras=True).items():
            if any(t is str for t in _leaves(hint)):
                found.add(prefix + name)
            for part in _parts_in(hint):
                if not part.__module__.startswith("quartet."):
                    continue  # a part that another test has registered
                look(part, f"{prefix}{name}." + ("*." if name == "reward" else ""))

    look(Config, "")
    ours = {key for key in found if key.count(".") <= 2 and not key.endswith(".type")}
    assert sorted(ours - set(PATHS) - others) == []


def test_the_files_of_own_parts_are_paths(tmp_path):
    table = {
        "algorithm": {"policy_loss": {"type": "a.py:Loss"}, "scores": [{"type": "b.py:Shape"}]},
        "reward": [{"type": "exact"}, {"type": "c.py:Source"}],
        "data": {"shape": "d.py:Rows"},
        "run": {"metrics": ["e.py:One", {"type": "f.py:Two"}]},
    }
    assert sorted(map(str, relative_paths(table))) == [f"{name}.py" for name in "abcdef"]


def _leaves(hint):
    if hint is str or dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in {dict, typing.Literal}:
        return []
    return [leaf for inner in typing.get_args(hint) for leaf in _leaves(inner)]


def test_what_is_written_and_where_it_led_are_in_the_resolved_config(place, monkeypatch):
    monkeypatch.chdir(place)
    first = (place / "runs" / "latest").resolve().name
    settings = read_settings(place / "grpo.toml")
    assert settings.config.policy.model == f"runs/{first}/sft"
    assert (
        f'model = "runs/{first}/sft"  # {place}/grpo.toml:7: "runs/latest/sft" then'
        in resolved_toml(settings)
    )
    assert settings.links == {"policy.model": ("runs/latest/sft", f"runs/{first}/sft")}
    judge = read_settings(
        place / "grpo.toml", ['reward=[{type="judge", url="http://h/", model="runs/latest"}]']
    )
    assert judge.config.reward[0].model == "runs/latest", "what a judge is called is no path"


def invoked(*words: str):
    return CliRunner().invoke(app, ["run", *words])


@pytest.mark.parametrize("file", ["grpo.toml", "both.toml"])
@pytest.mark.slow
def test_a_run_from_the_latest_model_is_stopped_and_goes_on_as_printed(place, monkeypatch, file):
    """The run became the latest meanwhile; with SFT in its recipe it even has an `sft/` of its own."""
    monkeypatch.chdir(place)
    before = (place / "runs" / "latest").resolve()
    whole = invoked(file, f"run.name=whole-{file[:4]}")
    assert whole.exit_code == 0, whole.output
    point_latest(place / "runs", before)
    stopped, name = [], f"the one's {file[:4]}"

    def after_a_step(screen, event):
        if (
            type(event).__name__ == "Advanced"
            and event.stage.name == "grpo"
            and event.progress.number == 1
        ):
            stopped.append(event)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("quartet.cli.screen.Screen.show", after_a_step)
        cut = invoked(file, f"run.name={name}")
    assert stopped and cut.exit_code != 0
    [run] = (place / "runs").glob(f"*-{name}")
    assert (place / "runs" / "latest").resolve() == run, "it has taken a step"
    printed = shlex.split(f"quartet run {typed(run.relative_to(place))} --resume")
    again = CliRunner().invoke(app, printed[1:])
    assert again.exit_code == 0, again.output
    [other] = (place / "runs").glob(f"*-whole-{file[:4]}")
    for path in (
        "policy/model.safetensors",
        *(["sft/model.safetensors"] if file == "both.toml" else []),
    ):
        assert (run / path).read_bytes() == (other / path).read_bytes(), path
    by_name = invoked(file, f"run.name={name}", "--resume")
    assert by_name.exit_code == 0 and "is done" in by_name.output, by_name.output
    assert beginning_of(run).links == {"runs/latest/sft": f"runs/{before.name}/sft"}
    point_latest(place / "runs", before)


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    first = invoked("grpo.toml", "run.name=far", "run.steps=1", "optim.schedule=constant")
    assert first.exit_code == 0, first.output
    [run] = (place / "runs").glob("*-far")
    monkeypatch.chdir(tmp_path)
    again = invoked(str(run), "--resume", "run.steps=2")
    assert again.exit_code == 0, again.output
    lines = again.output.splitlines()
    assert lines[0] == f"note   the run was started in {place}"
    assert lines[1].startswith("note   runs/") and lines[1].endswith(
        "/sft is not here but there: paths are taken from there"
    )
    assert "resume grpo-000001" in again.output
    point_latest(place / "runs", next((place / "runs").glob("*-sums")))


def test_a_word_with_a_path_means_the_folder_in_which_it_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "rw.py").write_text("")
    assert absolute_word("data.train=rows.jsonl") == f'data.train="{tmp_path}/rows.jsonl"'
    assert absolute_word("reward.0.function=rw.py:f") == f'reward.0.function="{tmp_path}/rw.py:f"'
    for word in ("data.train=none.jsonl", "run.name=rows.jsonl", "critic.init=policy", "seed=3"):
        assert absolute_word(word) == word


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"folder": 3, "links": {}}',
        '{"folder": "x", "links": []}',
        "[" * 10**5,
        '{"folder": "/nowhere", "links": {"a": 1}}',
    ],
)
def test_a_damaged_beginning_is_none(tmp_path, text):
    (tmp_path / "env.json").write_text(text)
    began = beginning_of(tmp_path)
    assert began.folder is None and began.links == {}


def test_a_beginning_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "env.json")
    assert beginning_of(tmp_path).folder is None


def test_paths_are_typed_as_a_shell_takes_them():
    assert (
        typed("runs/a b") == "'runs/a b'"
        and typed("-x") == "./-x"
        and typed(Path("runs/a")) == "runs/a"
    )
    assert shlex.split(typed("it's")) == ["it's"]


def test_only_a_run_that_took_a_step_is_the_latest(tmp_path):
    first = RunFolder.create(tmp_path, "x", {})
    first.close()
    assert not (tmp_path / "latest").exists()
    first.become_latest()
    second = RunFolder.create(tmp_path, "y", {})
    second.close()
    assert (tmp_path / "latest").resolve() == first.path
    assert json.loads((second.path / "env.json").read_text())["folder"] == str(Path.cwd())
