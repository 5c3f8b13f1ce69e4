"""Settings that hold for every test."""

from __future__ import annotations

import os

import pytest

# Read by libraries when they are imported, so they must be set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.hookimpl(tryfirst=True)  # before other reasons to skip, so that the number of devices is always told
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu(count)` where there are fewer CUDA devices."""
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return
    import torch

    needed, found = mark.args[0], torch.cuda.device_count()
    if found < needed:
        reason = f"needs {needed} CUDA device(s), found {found}"
        raise pytest.skip.Exception(reason, _use_item_location=True)
