"""Parcels over NCCL between processes that see one GPU each, with ranges large enough to be received in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.refit.transports import m2n

pytestmark = pytest.mark.gpu(2)

ROOT = Path(__file__).parents[2]
COMMAND = ("scripts/bench_refit.py", "--device", "cuda", "--cases", "30B 1 -> first of TP2", "--layers", "2")
LIMITS = ("--repeat", "3", "--deadline", "30", "--limit", "100")


def bench(variants: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *COMMAND, *LIMITS, "--variants", variants, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_experts_are_packed_at_the_trainer_and_received_in_place(tmp_path: Path) -> None:
    done = bench("nccl,nccl no verify", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    rows = rows_of(tmp_path)
    assert all(row["bit_exact"] and row["staging_bytes"] <= 512 << 20 for row in rows)
    assert [row["verified"] for row in rows] == [True, False]


def test_m2n_runs_or_says_what_is_missing(tmp_path: Path) -> None:
    done = bench("m2n", tmp_path)
    if missing := m2n.missing():
        text = done.stdout + (tmp_path / "rows.jsonl").read_text()
        assert "transport 'm2n' is not possible" in text, text[-6000:]
        assert any(word in missing for word in ("install", "preload"))
        return
    assert done.returncode == 0 and all(row["bit_exact"] for row in rows_of(tmp_path)), done.stdout[-6000:]
