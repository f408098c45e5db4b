"""Windows and macOS, simulated: no fcntl, no resource, no fork, no glibc, no links, folders that
cannot be opened (tests/support/other_system.py). Nothing here has run on either."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quartet.runs.reader import Run
from tests.support.tiny_run import SMALL

ROOT = Path(__file__).parents[1]
SUMS = (*SMALL, "policy.create.max_length=32", "run.steps=2")


def quartet_on(system, *words, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "QUARTET_CHECK_SHAPES"}
    environment["PYTHONPATH"] = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.support.other_system", system, *words]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


@pytest.mark.parametrize("system", ["win32", "darwin"])
@pytest.mark.slow
def test_every_module_can_be_imported(system, tmp_path):
    done = quartet_on(system, "all-modules", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 300


@pytest.mark.parametrize("system", ["win32", "darwin"])
@pytest.mark.slow
def test_a_small_run_is_done_and_resumed(system, tmp_path):
    """Checkpoints are written and read there, and the report, too."""
    first = quartet_on(system, "run", "sums", *SUMS, "run.checkpoint_every=1", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    folder = next(path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())
    more = quartet_on(system, "run", str(folder), "--resume", "run.steps=3", cwd=tmp_path)
    assert more.returncode == 0, more.stdout + more.stderr
    run = Run(folder)
    assert run.status == "done" and len(run.series["grpo"].steps) == 3
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_what_windows_cannot_do_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(responses, **_):\n    return [0.0] * len(responses)\n"
    )
    words = [*SUMS, 'reward=[{type="function", function="mine.py:mine"}]']
    for command in (["run", "sums", *words], ["sweep", "epsilon-beta"]):
        done = quartet_on("win32", *command, cwd=tmp_path)
        assert done.returncode in {1, 2}, done.stdout + done.stderr
        assert "Linux or macOS" in done.stderr and "Traceback" not in done.stderr
