"""Engines on GPUs, which schedule a batch ahead, take weights between two steps of requests in flight."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e import engines

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
PROGRAM = str(engines.ROOT / "tests" / "e2e" / "test_generator_in_flight.py")


def found(folder: Path, size: int) -> dict[str, bool]:
    scenarios = [f"landed-{mode} dense-{mode} bfloat16 {size}" for mode in ("keep", "recompute")]
    return engines.run(PROGRAM, folder, scenarios, "cuda")


def test_weights_that_come_between_two_steps(tmp_path: Path) -> None:
    said = found(tmp_path, 1)
    engines.check(said)
    assert sum(name.endswith("batches scheduled ahead: True") for name in said) == 2


@pytest.mark.gpu(2)
def test_two_ranks(tmp_path: Path) -> None:
    engines.check(found(tmp_path, 2))
