"""Libraries that are called from a checkout: what is executed of it, what stands in, what is said
of its version, and what each adapter calls."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rl_conformance import CLAIMS, NotOffered, judge, load
from rl_conformance.__main__ import main
from rl_conformance.adapters import ADAPTERS
from rl_conformance.checkout import Checkout
from tests.conformance.checkouts import CHECKOUTS, written

BY_NAME = {claim.name: claim for claim in CLAIMS}
LIBRARY = {
    "lib/losses.py": """
import ray
import torch
import ray.util.queue as queue
from dataclasses import dataclass
from lib.cluster import Group, Settings, setup
from megatron.core import mpu
from . import numbers as same
from .numbers import FACTOR

log = setup(__name__)
assert same.FACTOR == FACTOR
DEVICES = {ray.cpu: 1, ray.gpu: 2}

@ray.remote(num_gpus=1)
class Worker(Group):
    def name(self) -> "queue.Queue | None":
        return "worker"

@dataclass
class Config(Settings, extra="allow"):
    rate: float = 0.5

@torch.compile(dynamic=True)
def scaled(x: Group | None, *rest: Group["n"]):
    return FACTOR * mpu.size() * x

def gathered(x):
    return ray.get(x)

def is_fast():
    try:
        import flash_attn
    except ImportError:
        return False
    return True
""",
    "lib/numbers.py": "FACTOR = 3\n",
    "lib/cluster.py": "raise AssertionError('no adapter names this module')\n",
    "lib/wrong.py": "import math\nmath.sqrt(-1)\n",
}
MODULES = ("lib.losses", "lib.numbers", "lib.wrong", "lib.absent")


class Mpu:
    @staticmethod
    def size():
        return 2


def git(folder, *words):
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    environment = {"GIT_COMMITTER_DATE": "2026-01-31T12:00:00Z", "PATH": "/usr/bin:/bin"}
    subprocess.run(["git", "-C", folder, *name, *words], check=True, env=environment)


@pytest.fixture
def checkout(tmp_path):
    given = {"megatron.core.mpu": Mpu}
    return Checkout(written(LIBRARY, tmp_path), MODULES, given=given, missing=["flash_attn"])


def test_only_named_modules_are_executed_and_none_is_left_behind(checkout):
    before, compiled = set(sys.modules), torch.compile
    losses = checkout.module("lib.losses")
    assert losses.scaled(5) == 30, "3 of its own module, 2 that was given, 5"
    assert not {name for name in set(sys.modules) - before if name.startswith(("lib", "ray"))}
    assert torch.compile is compiled
    assert checkout.module("lib.losses") is losses


def test_what_stands_in_can_be_named_and_inherited_and_not_called(checkout):
    losses = checkout.module("lib.losses")
    assert losses.Worker().name() == "worker"
    assert losses.Config(rate=0.25).rate == 0.25 and losses.Config.rate == 0.5
    assert len(losses.DEVICES) == 2
    with pytest.raises(NotOffered, match=r"ray\.get is of a package that is not loaded"):
        losses.gathered(1)
    with pytest.raises(AttributeError):
        losses.Worker.nothing  # noqa: B018


def test_a_missing_package_is_missing_whatever_is_installed(checkout, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", logging)
    assert checkout.module("lib.losses").is_fast() is False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lib.wrong", r"wrong\.py: ValueError: math domain error|wrong\.py: ValueError: expected"),
        ("lib.absent", r"has no lib/absent\.py"),
    ],
)
def test_a_module_that_cannot_be_executed_is_an_import_error(checkout, name, said):
    for _ in range(2):
        with pytest.raises(ImportError, match=said):
            checkout.module(name)


def test_the_version_is_a_commit_and_its_date(tmp_path):
    folder = written(LIBRARY, tmp_path)
    assert Checkout(folder, ()).commit() == "of an unknown commit"
    git(folder, "init", "--quiet")
    assert Checkout(folder, ()).commit() == "of an unknown commit"
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    words = ["git", "-C", folder, "rev-parse", "HEAD"]
    commit = subprocess.run(words, check=True, capture_output=True, text=True).stdout[:12]
    assert Checkout(folder, ()).commit() == f"{commit} of 2026-01-31"
    (folder / "lib/numbers.py").write_text("FACTOR = 4\n", encoding="utf-8")
    assert Checkout(folder, ()).commit() == f"{commit} of 2026-01-31 +"


# --- adapters ---


@pytest.mark.parametrize("name", CHECKOUTS)
def test_an_adapter_calls_its_library(name, tmp_path):
    files, claims = CHECKOUTS[name]
    key = f"{name}={written(files, tmp_path)}"
    library = load(key)
    assert (library.name, library.version) == (name, "of an unknown commit")
    verdicts = [judge(BY_NAME[claim], library, key) for claim in claims]
    assert [v for v in verdicts if v.outcome != "holds"] == []


def test_every_adapter_of_a_checkout_has_a_small_one():
    installed = {"quartet", "trl", "trl-ppo", "verl", "areal", "torchtune"}
    assert set(ADAPTERS) - installed == set(CHECKOUTS)


def test_a_mistake_of_a_checkout_fails_with_lines_that_find_it_again(tmp_path):
    files, _ = CHECKOUTS["openrlhf"]
    wrong = {k: text.replace("d * d / 2", "d * d") for k, text in files.items()}
    key = f"openrlhf={written(wrong, tmp_path)}"
    verdict = judge(BY_NAME["kl/k2"], load(key), key)
    assert verdict.outcome == "fails"
    assert f'library = load("{key}")' in verdict.reproduction


def test_what_needs_a_package_that_is_not_there_is_not_offered(tmp_path):
    files, _ = CHECKOUTS["openrlhf"]
    cluster = {k: text.replace("d = log", "deepspeed.run(); d = log") for k, text in files.items()}
    key = f"openrlhf={written(cluster, tmp_path)}"
    assert judge(BY_NAME["kl/k2"], load(key), key).outcome == "not offered"


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("openrlhf", "a checkout of https://github.com/OpenRLHF/OpenRLHF: give openrlhf=FOLDER"),
        ("openrlhf=nowhere", "nowhere is no folder"),
        ("openrlhf={tmp}", "has no openrlhf/models/utils.py"),
        ("quartet={tmp}", "quartet is called where it is installed; leave out ="),
    ],
)
def test_wrong_sources_are_refused_in_a_sentence(library, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--library", library.format(tmp=tmp_path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_judges_a_checkout(tmp_path, capsys):
    files, _ = CHECKOUTS["prime-rl"]
    folder = written(files, Path(tmp_path))
    assert main(["--library", f"prime-rl={folder}", "--claim", "log-probs/"]) == 0
    assert "prime-rl of an unknown commit" in capsys.readouterr().out
