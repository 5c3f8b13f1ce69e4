"""Whole tensors of a sharded trainer, one after the other at one rank: what engines that take whole tensors are fed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.region import Region
from scripts.bench.model import DTYPE, Placed, Store, trainer_rows

if TYPE_CHECKING:
    from scripts.bench.rank import Held

_LAYER = re.compile(r"\.layers\.\d+\.")


def owners(held: Held) -> dict[str, int]:
    """Tensor -> the first trainer that holds all of it. Raises ValueError where none does."""
    found: dict[str, int] = {}
    case, meta = held.case, torch.device("meta")
    for rank in range(case.trainers.world_size):
        rows = trainer_rows(case.shape, case.trainers, rank, Store(meta))
        count: dict[str, int] = {}
        for fqn, region, _ in rows:
            count[fqn] = count.get(fqn, 0) + region.volume
        for fqn, volume in count.items():
            if volume == math.prod(held.table[fqn].shape):
                found.setdefault(fqn, rank)
    cut = [fqn for fqn in held.table if fqn not in found]
    if cut:
        raise ValueError(f"whole tensors need trainers that do not cut them, these are cut: {', '.join(cut[:3])}")
    return found


class Gathered:
    """Whole tensors at trainer 0, a layer at a time; the other trainers send what they alone hold.

    Args:
        store: of this gathering alone.
        rank: of this trainer.
        alone: this trainer's own tensors are asked for, and nothing is passed.
    """

    def __init__(self, held: Held, store: dist.Store, rank: int, device: torch.device, alone: bool = False) -> None:
        assert held.source is not None
        self._table, self._rank, self._device, self._owner = held.table, rank, device, owners(held)
        self._rows: dict[str, list[Placed]] = {}
        for row in held.source.rows:
            self._rows.setdefault(row[0], []).append(row)
        self._group: Any = None
        if not alone and set(self._owner.values()) != {0}:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=60)
            self._group = dist.ProcessGroupNCCL(store, rank, held.case.trainers.world_size, options)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """In the table's order at trainer 0, on the stream that is current then; nothing at the others, which have
        sent theirs when it ends."""
        for names in by_layer(self._table):
            away = [fqn for fqn in names if self._owner[fqn]]
            got = self._pass(away)
            ready = torch.cuda.current_stream(self._device).record_event() if got else None
            if self._rank == 0:
                for fqn in names:
                    yield fqn, self._here(got[fqn], ready) if fqn in got else self.whole(fqn)

    def _pass(self, away: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors that others hold, at trainer 0; the current stream has them."""
        mine = [fqn for fqn in away if self._rank in (0, self._owner[fqn])]
        if not mine:
            return {}
        got = {}
        self._group._start_coalescing()
        for fqn in mine:
            if self._rank == 0:
                got[fqn] = torch.empty(self._table[fqn].shape, dtype=DTYPE, device=self._device)
                self._group.recv([got[fqn]], self._owner[fqn], 0)
            else:
                self._group.send([self.whole(fqn)], 0, 0)
        self._group._end_coalescing().wait()
        return got

    def _here(self, tensor: torch.Tensor, ready: torch.cuda.Event | None) -> torch.Tensor:
        """`tensor` on the stream that asks for it, which need not be the one that received it."""
        stream = torch.cuda.current_stream(self._device)
        if ready is not None:
            stream.wait_event(ready)
        tensor.record_stream(stream)
        return tensor

    def whole(self, fqn: str) -> torch.Tensor:
        """Where it lies, if it lies in one piece; otherwise put together."""
        rows, shape = self._rows[fqn], self._table[fqn].shape
        if len(rows) == 1 and rows[0][2].is_contiguous():
            return rows[0][2]
        out = torch.empty(shape, dtype=DTYPE, device=self._device)
        for _, region, view in rows:
            out[region.slices_in(Region.whole(shape))] = view
        return out

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


def by_layer(table: TensorTable) -> Iterator[list[str]]:
    """Names in the table's order, those of a layer together."""

    def layer(fqn: str) -> str:
        found = _LAYER.search(fqn)
        return found[0] if found else fqn

    for _, names in groupby(table, layer):
        yield list(names)
