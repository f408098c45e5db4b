"""A rank of two, of which rank 0 does something alone: `python -m tests.support.waiting_rank RANK STORE DEADLINE KIND`.

KIND is busy: rank 0 takes three times the deadline; raises, killed or frozen: what becomes of rank 0 meanwhile. Prints a line.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from quartet.distributed.process_group import TorchProcessGroup
from quartet.launch.spmd import by_another

VALUE = {
    "ids": list(range(100)),
    "logprobs": [-0.1, float("nan"), -0.0, 1e-300, float("-inf")] * 20,
    "mask": [True, False] * 20,
    "mixed": [None, 1, 2.5, "text \u00e9 \ud83d\ude00", {"1": [2**70] * 30}] * 5,
    "short": [1, 2],
}


def main():
    rank, store, deadline, kind = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
    group = TorchProcessGroup(rank, 2)
    group.join(dist.FileStore(store, 2), deadline, torch.device("cpu"))

    def work():
        match kind:
            case "busy":
                time.sleep(3 * deadline)
            case "raises":
                raise ValueError("no servers")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
        return VALUE

    try:
        heard = group.on_rank_zero(work)
        gathered = group.all_gather({"rank": rank, **VALUE})
        print(json.dumps([heard, gathered]), flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error} ({by_another(error)})", flush=True)


if __name__ == "__main__":
    main()
