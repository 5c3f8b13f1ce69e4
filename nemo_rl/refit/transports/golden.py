"""The reference refit: broadcast each source region whole, assemble the tensor, slice at the destination.

Slow and memory-hungry on purpose. It reads layouts, not the plan's copies, and shares no geometry with the planner.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nemo_rl.refit.layout import Holding, Layout
from nemo_rl.refit.pipeline import Tracker, Traffic
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.transports.base import Transport, as_bytes

_Box = tuple[tuple[int, ...], tuple[int, ...]]


def run_golden(
    plan: RefitPlan,
    rank: int,
    transport: Transport,
    sources: Mapping[int, Layout],
    holdings: Sequence[Holding],
    landing: tuple[Layout, Tracker] | None,
    deadline_s: float,
) -> Traffic:
    """Move every bulk tensor of `plan`; all ranks of the world call it.

    Args:
        sources: every trainer rank's layout.
        holdings: this rank's, row by row as in its layout; empty on generators.
        landing: this rank's destination layout and its tracker; None on trainers.

    Raises:
        RuntimeError: a broadcast failed or the deadline passed.
    """
    end = time.monotonic() + deadline_s
    traffic = Traffic()
    everyone = tuple(range(plan.world.size))
    owners = _owners(sources)
    for fqn in dict.fromkeys(plan.names[t] for t in np.unique(plan.bulk.tensor)):
        meta = plan.table[fqn]
        full = torch.empty(meta.shape, dtype=meta.dtype) if landing else None
        for (offsets, sizes), (owner, row) in owners[fqn].items():
            piece = holdings[row].view.contiguous() if rank == owner else torch.empty(sizes, dtype=meta.dtype)
            transport.broadcast(as_bytes(piece), owner, everyone).wait(end - time.monotonic())
            traffic.sent_bytes += piece.nbytes if rank == owner else 0
            traffic.received_bytes += 0 if rank == owner else piece.nbytes
            traffic.staging_bytes = max(traffic.staging_bytes, piece.nbytes + (full.nbytes if full is not None else 0))
            if full is not None:
                full[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = piece
        if landing and full is not None:
            _land(plan, rank, fqn, full, *landing)
    return traffic


def _owners(sources: Mapping[int, Layout]) -> dict[str, dict[_Box, tuple[int, int]]]:
    """fqn -> box -> the first rank that holds it, and the row there."""
    owners: dict[str, dict[_Box, tuple[int, int]]] = {}
    for rank, layout in sorted(sources.items()):
        for row in range(len(layout)):
            ndim = len(layout.metas[layout.tensor[row]].shape)
            box = (tuple(layout.offsets[row, :ndim].tolist()), tuple(layout.sizes[row, :ndim].tolist()))
            if 0 not in box[1]:
                owners.setdefault(layout.fqn(row), {}).setdefault(box, (rank, row))
    return owners


def _land(plan: RefitPlan, rank: int, fqn: str, full: torch.Tensor, layout: Layout, tracker: Tracker) -> None:
    for row in range(len(layout)):
        if layout.fqn(row) == fqn:
            starts, sizes = layout.offsets[row, : full.ndim].tolist(), layout.sizes[row, : full.ndim].tolist()
            index = tuple(slice(o, o + s) for o, s in zip(starts, sizes, strict=True))
            tracker.row_view(row).copy_(full[index])
            mine = np.flatnonzero((plan.bulk.dst_rank == rank) & (plan.bulk.dst_row == row))
            tracker.landed(mine.tolist())
