"""Engines on GPUs take unquantized weights straight into the parameters that their kernels read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e import engines

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
PROGRAM = str(engines.ROOT / "tests" / "e2e" / "test_generator_landing.py")


def test_one_rank_lands_in_place(tmp_path: Path) -> None:
    engines.check(engines.run(PROGRAM, tmp_path, ["direct tied bfloat16 1", "direct moe bfloat16 1"], "cuda"))


@pytest.mark.gpu(2)
def test_two_ranks_land_in_place(tmp_path: Path) -> None:
    engines.check(engines.run(PROGRAM, tmp_path, ["direct moe bfloat16 2"], "cuda"))
