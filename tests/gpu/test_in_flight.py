"""Engines on GPUs, which schedule a batch ahead, take weights between two steps of requests in flight."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e import engines

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
PROGRAM = str(engines.ROOT / "tests" / "e2e" / "test_generator_in_flight.py")


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_weights_that_come_between_two_steps(size: int, mode: str, tmp_path: Path) -> None:
    """Into an engine of so many ranks, over kept caches and recomputed ones."""
    said = engines.run(PROGRAM, tmp_path, [f"landed-{mode} dense-{mode} bfloat16 {size}"], "cuda")
    engines.check(said)
    assert any(name.endswith("batches scheduled ahead: True") for name in said)
