"""Shapes are checked at run time: the annotations of `src/quartet` become assertions before it is first imported."""

import logging
import os

os.environ["QUARTET_CHECK_SHAPES"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import ipaddress
import sys
import traceback

import pytest
import torch
from jaxtyping import install_import_hook

from tests.support import checks

HERE = f"{os.sep}src{os.sep}quartet{os.sep}"


def never(event: str, arguments: tuple) -> None:
    """An audit hook over all tests: nothing is unpickled by our code, nobody outside is reached, nobody outside is listened to."""
    if event == "pickle.find_class":
        ours = [frame for frame in traceback.extract_stack() if HERE in frame.filename]
        if ours:
            raise PermissionError(f"something was unpickled: {arguments} by {ours[-1]}")
    if event in {"socket.connect", "socket.bind"}:
        address = arguments[1]
        if isinstance(address, tuple) and not loopback(address[0]):
            raise PermissionError(
                f"a test {'reached for' if event == 'socket.connect' else 'listens on'} {address}"
            )


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


sys.addaudithook(never)

checks.install()
hook = install_import_hook("quartet", "beartype.beartype")
hook.__enter__()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Have the garbage collector leave alone what has been imported: a full collection, which each stage of a run makes, goes through
    a million objects of libraries otherwise."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    checks.start_test()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """Spell out half a surrogate pair in what a test logged or raised: xdist sends reports as UTF-8, which has no form for it,
    and the worker that holds such a report ends with all tests that it had left."""
    report = yield
    return encodable(report)


def encodable(value):
    """Return a report's tables, lists and texts with what UTF-8 cannot encode as its escape."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(encodable, value))
    return value


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Also for what a module's fixtures compute: with another number of threads the bits differ."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_to_chance() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)  # a run in this process sets it for its run.log


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with two small runs: PPO with all four models, and GRPO with groups of four."""
    from tests.support.tiny_run import make_run

    root = tmp_path_factory.mktemp("runs")
    make_run(root, "reviews", "run.steps=14")
    make_run(
        root, "sums", "run.steps=3", "rollout.samples_per_prompt=4", "rollout.prompts_per_step=4"
    )
    return root


@pytest.fixture(scope="session")
def ppo_run(runs):
    from quartet.runs.reader import Run

    return Run(next(p for p in runs.iterdir() if p.name.endswith("reviews")))


@pytest.fixture(scope="session")
def two_rounds(tmp_path_factory):
    """A small run of two rounds of labels, reward model and PPO."""
    from tests.support.tiny_run import TWO_ROUNDS, make_run

    return make_run(tmp_path_factory.mktemp("rounds"), "labelled-reviews", *TWO_ROUNDS)


@pytest.fixture(scope="session")
def grpo_run(runs):
    from quartet.runs.reader import Run

    return Run(next(p for p in runs.iterdir() if p.name.endswith("sums") and not p.is_symlink()))


@pytest.fixture(autouse=True)
def own_parts_are_forgotten():
    """A part that a test loads from a file stays a member of its family, and later messages would list it."""
    from quartet.parts import Family

    before = {family: set(family.members) for family in Family.__subclasses__()}
    yield
    for family in Family.__subclasses__():
        for name in set(family.members) - before.get(family, set()):
            if ":" in name:
                del family.members[name]
