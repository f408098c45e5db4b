"""The command that installs optional packages."""

import os
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from quartet.cli.inspect import EXTRAS
from quartet.config.toml import read_settings
from quartet.io import install
from quartet.io.install import install_command
from quartet.launch import start
from quartet.recipes import recipe_path
from quartet.recording.trackers import Tracker
from quartet.runtime.lifecycle import CannotRun
from quartet.training.optimizer_types import TYPES

PROJECT = Path(install.__file__).parents[3]


def test_a_clone_is_named_and_an_installed_package_by_its_distribution(monkeypatch, tmp_path):
    clone = Path(install.__file__).parents[3]
    monkeypatch.chdir(tmp_path)
    assert install_command("lora", "math") == f'pip install -e "{clone}[lora,math]"'
    monkeypatch.chdir(clone)
    assert install_command("lora") == 'pip install -e ".[lora]"'
    installed = tmp_path / "site-packages" / "quartet" / "io" / "install.py"
    monkeypatch.setattr(install, "__file__", os.fspath(installed))
    assert install_command("lora") == 'pip install "quartet-rlhf[lora]"'


def test_every_extra_that_is_named_is_one():
    table = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    known = table["project"]["optional-dependencies"].keys()
    text = "".join(path.read_text() for path in sorted((PROJECT / "src").rglob("*.py")))
    named = {
        word
        for call in re.findall(r"install_command\(([^)]*)\)", text)
        for word in re.findall("[\"']([a-z_0-9]+)[\"']", call)
    }
    assert {"lora", "quantize", "math", "json", "datasets", "ray"} <= named
    packages = {traits.package for traits in TYPES.values()} - {None}
    assert named | packages | set(get_args(Tracker)) | EXTRAS.keys() <= known
    docs = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    in_docs = re.findall(r'install -e "\.\[([\w,]+)\]"', "".join(d.read_text() for d in docs))
    assert in_docs and {extra for words in in_docs for extra in words.split(",")} <= known


def test_ray_is_asked_for_before_a_folder_is_written(monkeypatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    config = read_settings(recipe_path("sums"), ["launch.type=ray", "launch.processes=2"]).config
    with pytest.raises(CannotRun, match=r'"ray" needs the package ray: pip install -e ".*\[ray\]"'):
        start.job_of(config)
