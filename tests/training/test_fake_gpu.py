"""What torch's own rules for CUDA tensors say of the forward passes, where there is no GPU."""

import json
import subprocess
import sys

import pytest
import torch

from tests.support.command import PROJECT


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this build has a device guard for CUDA")
@pytest.mark.skipif(sys.platform != "linux", reason="the table of guards has another name")
def test_all_passes_keep_to_one_device_and_have_derivatives():
    """Actor, critic, exact KL to the reference, and decoding, of Llama and of Gemma 3, in bf16 and in float32; roles that are
    adapters on a base in 4 bits; and a model that FSDP divides."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fake_gpu"], capture_output=True, text=True, cwd=PROJECT, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 8 and not any(found.values()), found
