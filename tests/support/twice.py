"""A program with two runs of two ranks, and a third that is left in the middle and goes on: `python -m tests.support.twice FOLDER`."""

import sys
from pathlib import Path

import torch.distributed as dist

from tests.api.test_train import steps_of, tiny


def main() -> None:
    root = Path(sys.argv[1])
    for left in (False, False, True):
        run = tiny(root, launch={"processes": 2, "shard": True})
        for step in run:
            if left and run.stage == "grpo" and step.number == 1:
                run.close()
                assert not dist.is_initialized()
                break
        run.finish(progress=False)
        assert run.finished and not dist.is_initialized()
        assert [event["step"] for event in steps_of(run, "grpo")] == [1, 2]
    print("three runs")


if __name__ == "__main__":
    main()
