"""Parcels over NCCL between processes that see one GPU each, with ranges large enough to be received in place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl.refit.transports import m2n

pytestmark = pytest.mark.gpu(2)

ROOT = Path(__file__).parents[2]
COMMAND = "scripts/bench_gpu.py --layers 2 --trainers 1 --generators 1 --split 2 --repeat 3 --deadline 30 --limit 100"


def bench(variants: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *COMMAND.split(), "--variants", variants, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140)


def test_experts_are_packed_at_the_trainer_and_received_in_place(tmp_path: Path) -> None:
    done = bench("nccl,nccl no verify", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["bit_exact"] and row["staging_bytes"] <= 512 << 20 for row in rows)
    assert [row["verified"] for row in rows] == [True, False]


def test_m2n_runs_or_says_what_is_missing(tmp_path: Path) -> None:
    done = bench("m2n", tmp_path)
    if missing := m2n.missing():
        assert done.returncode != 0 and "transport 'm2n' is not possible" in done.stdout, done.stdout[-6000:]
        assert any(word in missing for word in ("install", "preload"))
        return
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and all(row["bit_exact"] for row in rows), done.stdout[-6000:]
