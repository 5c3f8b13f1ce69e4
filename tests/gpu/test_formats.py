"""Engines on a GPU, with vLLM's own FP8 kernels, take what `tests/e2e/test_generator_formats.py` sends.

`VLLM_USE_DEEP_GEMM=0` in the environment keeps vLLM off kernels that need a compiler.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e import engines

pytestmark = [pytest.mark.gpu(1), pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")]
PROGRAM = str(engines.ROOT / "tests" / "e2e" / "test_generator_formats.py")


@pytest.mark.parametrize("kinds", [("online", "calibrated", "latent"), ("blocks", "plain", "blockwise")], ids="-".join)
def test_engines_equal_fresh_ones(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """FP8 made of BF16 by channels and by blocks, FP8 that the trainer holds, scales of the cache; and plain BF16."""
    engines.check(engines.run(PROGRAM, tmp_path, [f"landed {kind} bfloat16 1" for kind in kinds], "cuda"))
