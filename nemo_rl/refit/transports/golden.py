"""The reference refit: broadcast each source region whole, assemble the tensor, slice at the destination.

Slow and memory-hungry on purpose. It reads layouts, not the plan's copies, and shares no geometry with the planner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.pipeline import Tracker, Traffic
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.base import as_bytes
from nemo_rl.refit.transports.mover import Setting

_Box = tuple[tuple[int, ...], tuple[int, ...]]


class Golden:
    """The mover of one rank. It holds at most one whole tensor and one piece at a time."""

    def __init__(self, setting: Setting) -> None:
        self._plan, self._rank, self._device = setting.plan, setting.rank, setting.device
        self._channel, self._sources = setting.messages.channel, setting.sources

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """See `Mover.ready`."""
        return False

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """Move every tensor of `copies`; all ranks of the world call it.

        Raises:
            TransferError: a broadcast failed or the deadline passed; which one, and whose.
        """
        end = time.monotonic() + deadline_s
        traffic = Traffic()
        owners = _owners(self._sources)
        for fqn in dict.fromkeys(self._plan.names[t] for t in np.unique(copies.tensor)):
            meta = self._plan.table[fqn]
            full = self._empty(meta.shape, meta.dtype) if tracker is not None else None
            for (offsets, sizes), (owner, row) in owners[fqn].items():
                if self._rank == owner:
                    piece = src_view(row, Region(offsets, sizes)).contiguous()
                else:
                    piece = self._empty(sizes, meta.dtype)
                self._broadcast(piece, fqn, Region(offsets, sizes), owner, end)
                traffic.sent_bytes += piece.nbytes if self._rank == owner else 0
                traffic.received_bytes += 0 if self._rank == owner else piece.nbytes
                held = piece.nbytes + (0 if full is None else full.nbytes)
                traffic.staging_bytes = max(traffic.staging_bytes, held)
                if full is not None:
                    full[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = piece
            if tracker is not None and full is not None:
                _land(copies, self._rank, fqn, full, tracker)
        return traffic

    def _broadcast(self, piece: torch.Tensor, fqn: str, region: Region, owner: int, end: float) -> None:
        everyone, world = tuple(range(self._plan.world.size)), self._plan.world
        try:
            self._channel.broadcast(as_bytes(piece), owner, everyone).wait(end - time.monotonic())
        except RuntimeError as error:
            peers = "the other ranks" if owner == self._rank else world.describe(owner)
            raise TransferError(
                f"{'sending' if owner == self._rank else 'receiving'} {fqn} {region} ({piece.nbytes} bytes) "
                f"{'to' if owner == self._rank else 'from'} {peers}: {error}",
                rank=self._rank,
                phase="transfer",
                remedy=f"look at the logs of {peers}; remake the session",
            ) from error

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def close(self) -> None:
        return None


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


def _land(copies: CopyTable, rank: int, fqn: str, full: torch.Tensor, tracker: Tracker) -> None:
    layout = tracker.layout
    for row in range(len(layout)):
        if layout.fqn(row) == fqn:
            starts, sizes = layout.offsets[row, : full.ndim].tolist(), layout.sizes[row, : full.ndim].tolist()
            index = tuple(slice(o, o + s) for o, s in zip(starts, sizes, strict=True))
            tracker.row_view(row).copy_(full[index])
            mine = np.flatnonzero((copies.dst_rank == rank) & (copies.dst_row == row))
            tracker.landed(mine.tolist())
