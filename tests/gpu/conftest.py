"""Tests of an accelerator skip where there is none, so that `make test-all` runs on every machine."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup() -> None:
    # What they test has tests of its own on the CPU; here are CUDA's kernels, allocator and paged memory.
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
