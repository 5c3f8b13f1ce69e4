"""Parcels at one end: sent or received where the bytes lie, or through a slot, with what packs or spreads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.strided import Jobs, Places, Rows, places
from nemo_rl.refit.transports.mover import Setting
from nemo_rl.refit.transports.parcels import Parcel

Views = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Load:
    """A parcel at one end: the bytes that go over the wire, and what packs them before or spreads them after."""

    parcel: Parcel
    buffer: torch.Tensor
    copy: Callable[[], None] | None


class End:
    """One direction of one rank: where its rows lie, reusable slots, and the loads that were prepared for both.

    Args:
        outgoing: parcels leave from rows of the source; otherwise they land in rows of the destination.
        depth: number of slots.
        prepare: as `Lanes.prepare`.
    """

    def __init__(self, setting: Setting, outgoing: bool, depth: int, prepare: Callable[[Jobs], Callable[[], None]]):
        self._plan, self._outgoing, self._prepare = setting.plan, outgoing, prepare
        self._slots = [torch.empty(0, dtype=torch.uint8, device=setting.device) for _ in range(depth)]
        self._views: Views | None = None
        self._rows: Rows | None = None
        self._layout: Layout | None = None
        self._loads: dict[int, Load] = {}

    @property
    def staging_bytes(self) -> int:
        return sum(slot.numel() for slot in self._slots)

    @property
    def rows(self) -> Rows:
        assert self._rows is not None
        return self._rows

    def place(self, views: Views, layout: Layout) -> bool:
        """Rows lie in `views`; whether that is news, and nothing is prepared any more."""
        if views is self._views:
            return False
        rows, self._views, self._layout = Rows.of(views, layout), views, layout
        if self._rows is not None and rows.equals(self._rows):
            return False
        self._rows = rows
        self._loads.clear()
        return True

    def places(self, copies: CopyTable, chosen: np.ndarray) -> Places:
        """Where copies `chosen` lie."""
        assert self._layout is not None
        return places(self._plan, copies, chosen, self._row(copies, chosen), self._layout, self.rows)

    def rooms(self, copies: CopyTable, chosen: np.ndarray) -> np.ndarray:
        """The storage in which each of copies `chosen` lies."""
        assert self._views is not None
        return _rooms(self._views, self._row(copies, chosen))

    def fit(self, number: int, copies: CopyTable, parcel: Parcel, opens_later: bool) -> None:
        """The slot of group `number` takes `parcel`, if it needs one; comes before all loads."""
        if not opens_later and _whole(self.places(copies, parcel.copies), self.rooms(copies, parcel.copies)):
            return
        slot = self._slots[number % len(self._slots)]
        if slot.numel() < parcel.num_bytes:
            slot = torch.empty(parcel.num_bytes, dtype=torch.uint8, device=slot.device)
            self._slots[number % len(self._slots)] = slot

    def load(self, number: int, copies: CopyTable, parcel: Parcel) -> Load:
        """Of the parcel of group `number`, kept while rows stay."""
        if number not in self._loads:
            assert self._views is not None
            where, row = self.places(copies, parcel.copies), self._row(copies, parcel.copies)
            self._loads[number] = self._make(number, parcel, self._views, where, row)
        return self._loads[number]

    def load_into(self, number: int, copies: CopyTable, parcel: Parcel, views: Views, layout: Layout) -> Load:
        """Of a parcel that lands in what is open for a while."""
        row = self._row(copies, parcel.copies)
        where = places(self._plan, copies, parcel.copies, row, layout, Rows.of(views, layout))
        return self._make(number, parcel, views, where, row)

    def _row(self, copies: CopyTable, chosen: np.ndarray) -> np.ndarray:
        row: np.ndarray = (copies.src_row if self._outgoing else copies.dst_row)[chosen]
        return row

    def _make(self, number: int, parcel: Parcel, views: Views, where: Places, row: np.ndarray) -> Load:
        if _whole(where, _rooms(views, row)):
            storage = views[int(row[0])].untyped_storage()
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
            first = int(where.address[0]) - storage.data_ptr()
            return Load(parcel, flat.set_(storage, first, (parcel.num_bytes,), (1,)), None)
        buffer = self._slots[number % len(self._slots)][: parcel.num_bytes]
        jobs = where.into(buffer.data_ptr()) if self._outgoing else where.out_of(buffer.data_ptr())
        return Load(parcel, buffer, self._prepare(jobs))


def _rooms(views: Views, row: np.ndarray) -> np.ndarray:
    found = {i: views[i].untyped_storage().data_ptr() for i in set(row.tolist())}
    return np.array([found[i] for i in row.tolist()], np.int64)


def _whole(where: Places, room: np.ndarray) -> bool:
    """Whether the copies are one contiguous range of one storage, in their order."""
    ends = where.address + where.num_bytes
    return bool(where.dense.all() and (room == room[0]).all() and (ends[:-1] == where.address[1:]).all())
