"""Settings that hold for every test."""

from __future__ import annotations

import os

import pytest

# Read by libraries when they are imported, so they must be set before any test module is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu(count)` where there are fewer CUDA devices."""
    marked = [(item, mark) for item in items if (mark := item.get_closest_marker("gpu"))]
    if not marked:
        return
    import torch

    found = torch.cuda.device_count()
    for item, mark in marked:
        needed = mark.args[0] if mark.args else 1
        if found < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {found}"))
