"""The command `quartet`, whose sweeps run the stand-in of fake_run.py: `python -m tests.support.sweeping sweep …`."""

import sys
from pathlib import Path

from quartet.cli import main
from quartet.sweeps import processes

FAKE = (sys.executable, str(Path(__file__).with_name("fake_run.py")))

if __name__ == "__main__":
    processes.COMMAND = FAKE
    main()
