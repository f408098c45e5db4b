"""The command, which says at its end how it has left its process group: `python -m tests.support.leaving LOG WORDS`.

LOG gets a line of JSON: what of torch was called, in order, and whether there still is a group.
"""

import atexit
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

LOG = Path(sys.argv[1])
CALLS: list[str] = []


def noted(name: str, function: Any) -> Any:
    CALLS.append(name)
    return function()


def note() -> None:
    LOG.write_text(json.dumps({"calls": CALLS, "is_left": not dist.is_initialized()}))


def main() -> None:
    c10d: Any = dist.distributed_c10d
    for name in ("destroy_process_group", "_abort_process_group"):
        setattr(c10d, name, partial(noted, name, getattr(c10d, name)))
    atexit.register(note)
    sys.argv = ["quartet", *sys.argv[2:]]
    from quartet.cli import main as command

    command()


if __name__ == "__main__":
    main()
