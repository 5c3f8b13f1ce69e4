"""Parcels at one end: sent or received where the bytes lie, or through a slot, with what packs or spreads them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.layout import Layout
from nemo_rl.refit.strided import Jobs, Places, Rows, places
from nemo_rl.refit.transports.lanes import Post
from nemo_rl.refit.transports.mover import Setting
from nemo_rl.refit.transports.parcels import ALIGNMENT, Ends, Parcel

Views = Mapping[int, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Load:
    """A parcel at one end: its transfers in order, and what packs their bytes before or spreads them after."""

    parcel: Parcel
    posts: tuple[Post, ...]
    copy: Callable[[], None] | None


class End:
    """One direction of one rank: where its rows lie, reusable slots, and the loads that were prepared for both.

    A transfer whose copies are one contiguous range goes from there or lands there; others have room in a slot, and
    groups of which any has take turns with the slots.

    Args:
        outgoing: parcels leave from rows of the source; otherwise they land in rows of the destination.
        depth: number of slots at most.
        most_bytes: of all of them; they are no fewer than two.
        prepare: as `Lanes.prepare`.
    """

    def __init__(
        self,
        setting: Setting,
        outgoing: bool,
        depth: int,
        most_bytes: int,
        prepare: Callable[[Jobs], Callable[[], None]],
    ):
        self._plan, self._copies = setting.plan, setting.plan.bulk
        self._outgoing, self._prepare = outgoing, prepare
        self._depth, self._most_bytes, self._device = depth, most_bytes, setting.device
        self._slots: list[torch.Tensor] = []
        self._users: list[int] = []  # groups that have a slot, in order
        self._turns: dict[int, int] = {}  # group -> its position among them
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
        """Rows lie in `views`; whether that is news."""
        if views is self._views:
            return False
        rows, self._views, self._layout = Rows.of(views, layout), views, layout
        if self._rows is not None and rows.equals(self._rows):
            return False
        self._rows = rows
        return True

    def where(self, chosen: np.ndarray) -> tuple[Places, Ends]:
        """Where copies `chosen` of the plan's bulk lie, and the same as it matters to parcels."""
        assert self._layout is not None and self._views is not None
        row = self._row(chosen)
        found = places(self._plan, self._copies, chosen, row, self._layout, self.rows)
        return found, _ends(found, self._views, row)

    def fit(self, groups: Mapping[int, Parcel], opens_later: Container[int]) -> None:
        """Slots take the parcels of `groups` (by number) that need one; comes before all loads, none of which stays.

        Args:
            opens_later: groups that land in what is open for a while only, all in a slot.
        """
        self._loads.clear()
        needs = {
            number: parcel.num_bytes if number in opens_later else self._strewn_bytes(parcel)
            for number, parcel in groups.items()
        }
        self._users = [number for number, need in needs.items() if need]
        self._turns = {number: turn for turn, number in enumerate(self._users)}
        self._make_slots([needs[number] for number in self._users])

    def _make_slots(self, needs: Sequence[int]) -> None:
        """As many as may be, for groups that take turns and need as many bytes."""
        for count in range(max(self._depth, 2), 1, -1):
            sizes = [max(needs[i::count], default=0) for i in range(count)]
            if sum(sizes) <= self._most_bytes:
                break
        if [slot.numel() for slot in self._slots] != sizes:
            self._slots.clear()  # before others take the memory
            self._slots += [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]

    def before(self, number: int) -> int | None:
        """The group that had the slot of group `number` before; None where there is none."""
        turn = self._turns.get(number, -1) - len(self._slots)
        return self._users[turn] if turn >= 0 else None

    def load(self, number: int, parcel: Parcel) -> Load:
        """Of the parcel of group `number`, kept until groups are fitted again."""
        if number not in self._loads:
            assert self._views is not None
            self._loads[number] = self._make(number, parcel, self._views, *self.where(parcel.copies))
        return self._loads[number]

    def load_into(self, number: int, parcel: Parcel, views: Views, layout: Layout) -> Load:
        """Of a parcel that lands in what is open for a while."""
        row = self._row(parcel.copies)
        where = places(self._plan, self._copies, parcel.copies, row, layout, Rows.of(views, layout))
        return self._make(number, parcel, views, where, _ends(where, views, row))

    def _row(self, chosen: np.ndarray) -> np.ndarray:
        row: np.ndarray = (self._copies.src_row if self._outgoing else self._copies.dst_row)[chosen]
        return row

    def _strewn_bytes(self, parcel: Parcel) -> int:
        """Of transfers that are not one contiguous range."""
        (where, ends), used = self.where(parcel.copies), 0
        for part in parcel.transfers:
            if not ends.take(part).whole(where.num_bytes[part]):
                used = _aligned(used) + int(where.num_bytes[part].sum())
        return used

    def _slot(self, number: int) -> torch.Tensor:
        return self._slots[self._turns[number] % len(self._slots)]

    def _make(self, number: int, parcel: Parcel, views: Views, where: Places, ends: Ends) -> Load:
        row, used = self._row(parcel.copies), 0
        buffers, jobs = [], []
        for part in parcel.transfers:
            size = int(where.num_bytes[part].sum())
            if ends.take(part).whole(where.num_bytes[part]):
                buffers.append(_range_of(views[int(row[part[0]])], int(where.address[part[0]]), size))
                continue
            buffers.append(room := self._slot(number)[_aligned(used) :][:size])
            used = _aligned(used) + size
            strewn, base = where.take(part), room.data_ptr()
            jobs.append(strewn.into(base) if self._outgoing else strewn.out_of(base))
        peer = parcel.dst_rank if self._outgoing else parcel.src_rank
        posts = tuple(Post(buffer, peer, parcel.first + i) for i, buffer in enumerate(buffers))
        return Load(parcel, posts, self._prepare(Jobs.all_of(jobs)) if jobs else None)


def _range_of(view: torch.Tensor, address: int, num_bytes: int) -> torch.Tensor:
    """Bytes of the storage of `view`."""
    storage = view.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, address - storage.data_ptr(), (num_bytes,), (1,))


def _ends(where: Places, views: Views, row: np.ndarray) -> Ends:
    found = {i: views[i].untyped_storage().data_ptr() for i in set(row.tolist())}
    return Ends(where.address, np.array([found[i] for i in row.tolist()], np.int64), where.dense)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
