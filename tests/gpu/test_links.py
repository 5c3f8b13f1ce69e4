"""Links between GPUs, measured: `auto` takes what is fastest, and predictions are those of refits."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_nccl import FIRST_OF_TWO, bench, rows_of

VARIANTS = "auto no verify,peer no verify,nccl no verify,broadcast no verify"


@pytest.mark.gpu(2)
def test_auto_takes_the_fastest_transport_and_says_how_long_it_takes(tmp_path: Path) -> None:
    done = bench(FIRST_OF_TWO, VARIANTS, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    rows = {row["variant"]: row for row in rows_of(tmp_path)}
    assert set(rows) == set(VARIANTS.split(",")) and all(row["bit_exact"] for row in rows.values())
    seconds = {name: rows[f"{name} no verify"]["seconds_median"] for name in ("auto", "peer", "nccl")}
    assert seconds["auto"] <= 1.05 * min(seconds.values()) + 1e-3, seconds
    predicted = rows["auto no verify"]["predictions"]
    assert set(predicted) == {"peer", "nccl"}
    for name, expected in predicted.items():
        assert 0.5 < expected / seconds[name] < 2, (predicted, seconds)
