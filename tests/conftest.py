"""Shapes are checked at every call: the annotations of `src/quartet` become assertions before it is first imported."""

import os

os.environ["QUARTET_CHECK_SHAPES"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from jaxtyping import install_import_hook

hook = install_import_hook("quartet", "beartype.beartype")
hook.__enter__()


@pytest.fixture(autouse=True)
def _nothing_left_to_chance() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
