"""Run folders that cannot be gone on with: what is missing in them, and what only looks like a checkpoint."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from quartet import __version__
from quartet.assembly import build
from quartet.cli import app
from quartet.config.toml import read_settings
from quartet.runtime.resume import CannotResume, choose
from tests.malformed.saying import readable, refusal


@pytest.fixture(scope="module")
def wanted(small_run):
    """The run's own config, and what a run of it would be made with."""
    config = read_settings(small_run / "config.resolved.toml").config
    return config, build(config).made_with


def copied(small_run, tmp_path, change):
    run = shutil.copytree(
        small_run, tmp_path / "run", ignore=shutil.ignore_patterns("policy", "sft")
    )
    change(run)
    return run


def only(*names):
    """These folders, empty, for checkpoints."""

    def change(run):
        shutil.rmtree(run / "checkpoints")
        for name in names:
            (run / "checkpoints" / name).mkdir(parents=True)

    return change


def a_file_for_the_folder(run):
    only()(run)
    (run / "checkpoints").write_text("x")


def a_file_for_a_checkpoint(run):
    only()(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "grpo-000007").write_text("x")


def a_link_to_nowhere(run):
    only()(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "grpo-000007").symlink_to("gone")


def manifests(text):
    def change(run):
        for folder in (run / "checkpoints").glob("*-*"):
            (folder / "manifest.json").write_text(text)

    return change


def folders_for_manifests(run):
    for folder in (run / "checkpoints").glob("*-*"):
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").mkdir()


NONE = "no checkpoint can be used (there are none). Nothing was changed. To start a new run with its settings: quartet run "
CHECKPOINTS = {
    "no folder of checkpoints": (only(), NONE),
    "a file for the folder": (a_file_for_the_folder, NONE),
    "a file for a checkpoint": (a_file_for_a_checkpoint, NONE),
    "a link to nowhere": (a_link_to_nowhere, NONE),
    "names that are no step": (only("grpo-abc", "nosuch-000001", "grpo-", "-000003", "grpo-0x1"), NONE),
    "an empty checkpoint": (only("grpo-000007"), "(grpo-000007: manifest.json is missing)."),
    "a very late step": (only("grpo-99999999999999999999"), "(grpo-99999999999999999999: manifest.json is missing)."),
    "manifests that are lists": (manifests("[]"), "grpo-000002: its manifest cannot be read;"),
    "manifests of nothing": (manifests("{}"), "grpo-000002: its manifest cannot be read;"),
    "manifests of another format": (manifests('{"format": 2, "files": {}}'), "grpo-000002: is of format 2, this Quartet reads format 1;"),
    "folders for manifests": (folders_for_manifests, "grpo-000002: cannot be read (Is a directory);"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_that_are_none(small_run, wanted, tmp_path, change, sentence):
    run = copied(small_run, tmp_path, change)
    assert sentence in refusal(CannotResume, lambda: choose(run, *wanted, ()))


CONFIG = "config.resolved.toml"


def of_a_newer_version(run):
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(f"new_key = 3\n{text}")
    env = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(env | {"quartet": "99.1.0"}))


CONFIGS = {
    "missing": (lambda run: (run / CONFIG).unlink(), "run: has no config.resolved.toml, so it is not known what to go on with."),
    "a folder": (lambda run: ((run / CONFIG).unlink(), (run / CONFIG).mkdir()), "run: has no config.resolved.toml"),
    "cut short": (lambda run: (run / CONFIG).write_text("["), "run/config.resolved.toml:1: not TOML: "),
    "of a newer version": (of_a_newer_version, f"The run was made by Quartet 99.1.0, and this is {__version__}."),
    "empty": (lambda run: (run / CONFIG).write_text(""), "run/config.resolved.toml: recipe: is missing."),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_run_folders_without_a_config(small_run, tmp_path, monkeypatch, change, sentence):
    copied(small_run, tmp_path, change)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "run", "--resume"])
    assert done.exit_code == 2 and sentence in readable(done.stderr.strip())
