"""What tests of sweeps share: a sweep carried out in the test's process."""

import pytest

from quartet.runs.sweeps import Sweep
from quartet.sweeps import conduct, processes
from quartet.sweeps.life import beginning_of
from tests.support.sweeping import FAKE
from tests.sweeps.files import sweep_file


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Carry out the sweep of a table in this process, with stand-ins for its runs; return its results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "COMMAND", FAKE)
    monkeypatch.setattr(conduct, "POLL_SECONDS", 0.01)

    def carried_out(table: str, *words: str, resume: bool = False, step: float = 0.001) -> Sweep:
        monkeypatch.setenv("FAKE_STEP_SECONDS", str(step))
        sweep_file(tmp_path, table)
        conductor = beginning_of("search.toml", words, resume).open()
        try:
            for _ in conductor.changes(lambda: None):
                pass
        finally:
            conductor.close()
        return conductor.sweep

    return carried_out
