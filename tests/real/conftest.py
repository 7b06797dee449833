"""The real checkpoint, for the tests marked `real`."""

import os
from pathlib import Path

import pytest
import torch

from tests.real.make_checkpoint import ensure


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, made on first use."""
    # Real weights are worth every core; the small ones of the other tests are not.
    torch.set_num_threads(os.cpu_count())
    return ensure("0.5b", "bfloat16")
