"""The command that installs optional packages."""

import os
from pathlib import Path

from quartet.io import install
from quartet.io.install import install_command


def test_a_clone_is_named_and_an_installed_package_by_its_distribution(monkeypatch, tmp_path):
    clone = Path(install.__file__).parents[3]
    monkeypatch.chdir(tmp_path)
    assert install_command("lora", "math") == f'pip install -e "{clone}[lora,math]"'
    monkeypatch.chdir(clone)
    assert install_command("lora") == 'pip install -e ".[lora]"'
    installed = tmp_path / "site-packages" / "quartet" / "io" / "install.py"
    monkeypatch.setattr(install, "__file__", os.fspath(installed))
    assert install_command("lora") == 'pip install "quartet-rlhf[lora]"'
