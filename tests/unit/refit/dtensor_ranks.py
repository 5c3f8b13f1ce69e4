"""A rank process of the DTensor grid. All ranks run every case; a case has a store prefix of its own."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor

from nemo_rl.refit.base import RefitOptions, RefitReport, World
from nemo_rl.refit.dtensor import DTensorLanding, DTensorSource, xferdtensor
from nemo_rl.refit.layout import TensorMeta
from nemo_rl.refit.session import RefitSession

from .grid import REAL_GRID, S0, S1, Case, R, Side, random_full, same_bits

NUM_RANKS = 4
APART = World((0, 1), (2, 3))
TORCH_GATHERS = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int32, torch.int64)
"""Types in which torch's own collectives over gloo check the result as well."""


@cache
def mesh_of(ranks: tuple[int, ...], shape: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks).view(shape))


def dtensor(side: Side, rank: int, full: torch.Tensor, holder: int | None = None) -> DTensor | None:
    """`full` as `side` holds it on `rank`; with `holder`, the shard of that rank under this one's name."""
    if rank not in side.ranks:
        return None
    local = side.local(full, rank if holder is None else holder)
    mesh = mesh_of(side.ranks, side.mesh)
    return DTensor.from_local(local, mesh, side.placements, run_check=False, shape=full.shape, stride=full.stride())


def store_of(name: str) -> dist.Store:
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def options(transport: str = "gloo") -> RefitOptions:
    return RefitOptions(transport=transport, deadline_s=30, bucket_bytes=1024)


def send(name: str, case: Case, transport: str, src: DTensor | None, dst: DTensor | None) -> RefitReport:
    everyone = sorted({*case.src.ranks, *case.dst.ranks})
    sides = [tuple(map(everyone.index, side.ranks)) for side in (case.src, case.dst)]
    rank = everyone.index(dist.get_rank())
    return xferdtensor(src, dst, rank=rank, world=World(*sides), store=store_of(name), options=options(transport))


def run_case(name: str, case: Case, transport: str, holders: Mapping[int, int] | None = None) -> str:
    """What is wrong with this rank's outcome, or nothing. `holders`: rank -> whose source shard it has instead."""
    rank, full = dist.get_rank(), random_full(case.shape, case.dtype, seed=1)
    for side in (case.src, case.dst):
        mesh_of(side.ranks, side.mesh)  # made by all ranks together
    if rank not in (*case.src.ranks, *case.dst.ranks):
        return ""
    src = dtensor(case.src, rank, full, None if holders is None else holders.get(rank))
    dst = dtensor(case.dst, rank, random_full(case.shape, case.dtype, seed=2))
    report = send(name, case, transport, src, dst)
    if not report.verified:
        return "not verified"
    if dst is None:
        return ""
    if not same_bits(dst.to_local(), case.dst.local(full, rank)):
        return "other bits than torch's own shard"
    return torch_disagrees(case, src, dst, full) if case.dtype in TORCH_GATHERS else ""


def torch_disagrees(case: Case, src: DTensor | None, dst: DTensor, full: torch.Tensor) -> str:
    """Ask torch's own collectives: the destination gathered, and on one mesh the source redistributed.

    Their groups number ranks in ascending order, so that they give no answer on meshes with another order.
    """
    grid = torch.tensor(case.dst.ranks).view(case.dst.mesh)
    if any((grid.diff(dim=axis) < 0).any() for axis in range(grid.ndim)):
        return ""
    if not same_bits(dst.full_tensor(), full):
        return "other bits than full_tensor gathers"
    if src is not None and (case.src.ranks, case.src.mesh) == (case.dst.ranks, case.dst.mesh):
        moved = src.redistribute(placements=case.dst.placements)
        if not same_bits(moved.to_local(), dst.to_local()):
            return "other bits than redistribute gives"
    return ""


def check_repeated() -> str:
    """One session, three refits: A, B, A; the destinations of each version are scrambled before."""
    rank = dist.get_rank()
    sides = Side((0, 1), (2,), (S0,)), Side((2, 3), (2,), (S1,))
    versions = {seed: random_full((9, 5), torch.bfloat16, seed) for seed in (1, 2)}
    src, dst = (dtensor(side, rank, torch.zeros(9, 5, dtype=torch.bfloat16)) for side in sides)
    source = None if src is None else DTensorSource({"w": src})
    landing = None if dst is None else DTensorLanding({"w": dst})
    session = RefitSession(rank, APART, store_of("repeated"), options(), source, landing)
    session.connect()
    session.plan()
    for version, seed in enumerate((1, 2, 1)):
        if src is not None:
            src.to_local().copy_(sides[0].local(versions[seed], rank))
        if dst is not None:
            dst.to_local().copy_(sides[1].local(random_full((9, 5), torch.bfloat16, 7 + version), rank))
        session.refit(version)
        if dst is not None and not same_bits(dst.to_local(), sides[1].local(versions[seed], rank)):
            return f"version {version} has other bits"
        if landing is not None and landing.version != version:
            return f"version {version} was not stamped"
    session.close()
    return ""


def check_stages() -> str:
    """Source ranks that have different tensors, of different types, in one call."""
    rank = dist.get_rank()
    full = {"a": random_full((5, 3), torch.float32, 1), "b": random_full((4,), torch.bool, 2)}
    held = {"a": Side((0,), (1,), (R,)), "b": Side((1,), (1,), (R,))}
    taken = Side((2, 3), (2,), (S0,))
    for side in (*held.values(), taken):
        mesh_of(side.ranks, side.mesh)
    src = {name: t for name, side in held.items() if (t := dtensor(side, rank, full[name])) is not None}
    other = {"a": random_full((5, 3), torch.float32, 3), "b": ~full["b"]}
    dst = {name: t for name in full if (t := dtensor(taken, rank, other[name])) is not None}
    table = {name: TensorMeta(tuple(t.shape), t.dtype) for name, t in full.items()}
    xferdtensor(
        *(src or None, dst or None), rank=rank, world=APART, store=store_of("stages"), options=options(), table=table
    )
    wrong = [name for name, t in dst.items() if not same_bits(t.to_local(), taken.local(full[name], rank))]
    return f"{wrong} have other bits" if wrong else ""


def outcomes() -> dict[str, str]:
    """Name of every check -> what is wrong on this rank."""
    out = {name: run_case(name, case, transport) for name, case, transport in REAL_GRID}
    lying = Case((4, 6), torch.int32, Side((0, 1), (2,), (S0,)), Side((2, 3), (2,), (S1,)))
    out["planted: source shards exchanged"] = run_case("planted", lying, "gloo", {0: 1, 1: 0})
    out["repeated"], out["stages"] = check_repeated(), check_stages()
    return out


def rank_main(rank: int, port: int) -> dict[str, str]:
    """The outcomes of this rank, or where it stopped. Takes a process that has no process group."""
    try:
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # torch on its own slow ways
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS, store=store, timeout=timedelta(seconds=60))
        said = outcomes()
        dist.barrier()
    except Exception:
        said = {"stopped": traceback.format_exc()}
    dist.destroy_process_group()
    return said
