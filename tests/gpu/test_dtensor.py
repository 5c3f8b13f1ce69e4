"""DTensors on GPUs: layouts of the grid between processes that have one GPU each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.device import MULTICAST_OFF
from nemo_rl.refit.dtensor import xferdtensor
from tests.unit.refit.grid import LAYOUTS, S0, S1, Case, R, Side, random_full, same_bits

ROOT = Path(__file__).parents[2]
TWO = {
    "apart": ((9, 3), Side((0,), (1,), (S1,)), Side((1,), (1,), (S0,))),
    "both on both sides": ((7, 5), Side((0, 1), (2,), (S0,)), Side((1, 0), (2,), (S1,))),
    "replicas, and a shard without rows": ((1, 3), Side((0, 1), (2,), (S0,)), Side((0, 1), (2,), (R,))),
}
"""Layouts of two ranks."""
FEW = (*TWO, "2-D, rows to columns", "1-D, shards without rows", "3-D")
"""Layouts that go over NCCL too, which connects anew for each."""


def cases(num_ranks: int, transport: str) -> Iterator[tuple[str, Case]]:
    """Layouts of four ranks or of two, with rows as long as copy engines and kernels care for."""
    for name, (shape, src, dst) in (LAYOUTS if num_ranks == 4 else TWO).items():
        if transport == "peer" or name in FEW:
            yield name, Case((*shape, 4096), torch.bfloat16, src, dst)


def held(side: Side, rank: int, full: torch.Tensor, device: str) -> DTensor | None:
    """Every rank calls it: meshes are made together."""
    mesh = DeviceMesh(device, torch.tensor(side.ranks).view(side.mesh))
    if rank not in side.ranks:
        return None
    given = {"run_check": False, "shape": full.shape, "stride": full.stride()}
    return DTensor.from_local(side.local(full, rank).to(device), mesh, side.placements, **given)


def wrong(name: str, case: Case, transport: str, device: str) -> str:
    """What is wrong on this rank, or nothing."""
    rank, full = dist.get_rank(), random_full(case.shape, case.dtype, seed=1)
    src, dst = held(case.src, rank, full, device), held(case.dst, rank, random_full(case.shape, case.dtype, 2), device)
    everyone = sorted({*case.src.ranks, *case.dst.ranks})
    if rank not in everyone:
        return ""
    world = World(*(tuple(map(everyone.index, side.ranks)) for side in (case.src, case.dst)))
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    options = RefitOptions(transport=transport, deadline_s=60)
    report = xferdtensor(src, dst, rank=everyone.index(rank), world=world, store=store, options=options)
    if (report.transport, report.verified) != (transport, True):
        return f"{name}: {report}"
    exact = dst is None or same_bits(dst.to_local().cpu(), case.dst.local(full, rank))
    return "" if exact else f"{name}: other bits than torch's own shard"


def run_rank(rank: int, num_ranks: int, port: int, transport: str, device: str) -> int:
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store, timeout=timedelta(seconds=60))
    found = [wrong(name, case, transport, device) for name, case in cases(num_ranks, transport)]
    sys.stdout.write(f"{len(found)} cases; " + "; ".join(filter(None, found)) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return int(any(found) or not found)


def run_ranks(num_ranks: int, transport: str, device: str = "cuda") -> None:
    """Raises AssertionError with what ranks said where one of them found something wrong."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "tests.gpu.test_dtensor"]
    environ = {**os.environ, **MULTICAST_OFF}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(num_ranks), str(store.port), transport, device],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        said = [rank.communicate(timeout=200)[0][-3000:] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(said)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_layouts_of_two_gpus(transport: str) -> None:
    run_ranks(2, transport)


@pytest.mark.gpu(4)
@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_layouts_of_four_gpus(transport: str) -> None:
    run_ranks(4, transport)


if __name__ == "__main__":
    sys.exit(run_rank(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]))
