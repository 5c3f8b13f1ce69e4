"""Parcels over NCCL between processes that see one GPU each, with ranges large enough to be received in place."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.strided import Places
from nemo_rl.refit.transports import m2n

ROOT = Path(__file__).parents[2]
COMMAND = ("scripts/bench_refit.py", "--device", "cuda", "--layers", "2")
FIRST_OF_TWO = ("--cases", "30B 1 -> first of TP2")
WHOLE = ("--trainers", "1", "--generators", "1")
LIMITS = ("--repeat", "3", "--deadline", "30", "--limit", "100")


def bench(case: tuple[str, ...], variants: str, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *COMMAND, *case, *LIMITS, "--variants", variants, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def tails(out: Path) -> str:
    """What ranks said last."""
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(out.glob("rank*.log")))


def boxes_of(whole: torch.Tensor) -> list[torch.Tensor]:
    """Of 4 MiB: a long range, one that is not aligned, and short rows."""
    parts = whole[: 1 << 20], whole[1 << 20 :][3:100_003], whole[2 << 20 :]
    return [parts[0].view(1, -1), parts[1].view(1, -1), parts[2].view(-1, 1024)[:, 256:640]]


def places_of(boxes: list[torch.Tensor]) -> Places:
    sizes = np.array([list(box.shape) for box in boxes], np.int64)
    strides = np.array([list(box.stride()) for box in boxes], np.int64)
    packed = np.stack([sizes[:, 1], np.ones(len(boxes), np.int64)], axis=1)
    address = np.array([box.data_ptr() for box in boxes], np.int64)
    return Places(address, sizes.prod(axis=1), np.ones(len(boxes), np.int64), sizes, strides, packed)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("programs", [3, None])
def test_few_programs_pack_and_spread_what_all_do(programs: int | None) -> None:
    from nemo_rl.refit.transports.strided_kernel import StridedBatch

    source, slot, landed = (torch.randint(0, 256, (4 << 20,), dtype=torch.uint8).cuda() for _ in range(3))
    want, packed = landed.clone(), torch.cat([box.reshape(-1) for box in boxes_of(source)])
    for here, there in zip(boxes_of(source), boxes_of(want), strict=True):
        there.copy_(here)
    out, back = places_of(boxes_of(source)), places_of(boxes_of(landed))
    for jobs in (out.into(slot.data_ptr()), back.out_of(slot.data_ptr())):
        StridedBatch(jobs, range(len(jobs)), slot.device, programs).launch(torch.cuda.current_stream())
    assert torch.equal(slot[: len(packed)], packed)
    assert torch.equal(landed, want), "every byte of the boxes and none beside"


@pytest.mark.gpu(2)
def test_experts_are_packed_at_the_trainer_and_received_in_place(tmp_path: Path) -> None:
    done = bench(FIRST_OF_TWO, "nccl,nccl no verify", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + tails(tmp_path)
    rows = rows_of(tmp_path)
    assert all(row["bit_exact"] and row["staging_bytes"] <= 512 << 20 for row in rows)
    assert [row["verified"] for row in rows] == [True, False]


@pytest.mark.gpu(2)
def test_m2n_runs_or_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in MULTICAST_OFF.items():  # as the benchmark starts its ranks
        monkeypatch.setenv(name, value)
    done = bench(WHOLE, "m2n no verify,m2n", tmp_path)  # m2n takes no part of a tensor alone
    if missing := m2n.missing():
        text = done.stdout + (tmp_path / "rows.jsonl").read_text()
        assert "transport 'm2n' is not possible" in text, text[-6000:]
        assert any(word in missing for word in ("install", "preload"))
        return
    assert done.returncode == 0, done.stdout[-3000:] + tails(tmp_path)
    rows = rows_of(tmp_path)
    assert [row["verified"] for row in rows] == [False, True], "a process uses m2n in one session after the other"
    assert all(row["bit_exact"] for row in rows)
    calls = re.findall(r"m2n: (\d+) tensors in (\d+) calls", (tmp_path / "rank0.log").read_text())
    assert calls and all(int(tensors) > 0 < int(num) for tensors, num in calls), "nothing went by m2n"
