"""Runs one rank's part of a plan: bounded messages out of source views and into landing units."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from nemo_rl.refit.digest import Ledger, Piece, Pieces
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import CopyTable, Message, RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.base import Channel, Pending, Slots, as_bytes

IN_PLACE = -1
"""The landing unit of rows whose bytes land in the storage that kernels read."""


class Sink(Protocol):
    """Where bytes land: opens a unit's views, takes the unit back when all its bytes are there."""

    def open(self, unit: int) -> Mapping[int, torch.Tensor]: ...

    def close(self, unit: int) -> None: ...


@dataclass(frozen=True, eq=False)
class Part:
    """Copies that land together.

    Attributes:
        counts: landing unit -> how many of them land there.
        pieces: what digests them as soon as they landed; None where their digests wait.
    """

    counts: Mapping[int, int]
    pieces: Pieces | None


class Arrivals:
    """The copies of one table that land on `rank`, with what their digests need; kept from refit to refit.

    Attributes:
        layout: of this rank's destinations (row -> region and unit).
        mine: numbers of the copies in the table.
        unit: landing unit of each of `mine`.
        counts: landing unit -> how many land there.
        empty: landing units that have no bytes on this rank.
        device: where all of it lands.
        final: nothing writes behind what lands in place, neither a unit's processing nor the engine's own loader:
            what landed may be digested at once. Hooks of `Landing.finish` run behind all digests in any case.
    """

    def __init__(self, plan: RefitPlan, copies: CopyTable, rank: int, layout: Layout, device: torch.device) -> None:
        self._plan, self._copies, self._rank, self._device = plan, copies, rank, device
        self.layout = layout
        self.mine = np.flatnonzero(copies.dst_rank == rank)
        self.unit = layout.unit[copies.dst_row[self.mine]]
        self.counts = self._counts(self.mine)
        self.empty = self._empty()
        self.final = not plan.misc_fqns and bool((layout.unit == IN_PLACE).all())
        self._in_place: Pieces | None = None
        self._ledger: Ledger | None = None
        self._fitting: Mapping[int, torch.Tensor] | None = None

    def checked(self, unit: int, views: Mapping[int, torch.Tensor]) -> Mapping[int, torch.Tensor]:
        """`views`, opened for `unit`, as they are; the same mapping for what lands in place is looked at once.

        Raises:
            TransferError: a row has no view, or one of another shape, type or device; a write would go astray.
        """
        if views is not self._fitting and (text := self.layout.misfit(unit, views, self._device)):
            remedy = "make a new session after the engine changed its parameters"
            raise TransferError(f"the engine opened {text}", rank=self._rank, phase="transfer", remedy=remedy)
        if unit == IN_PLACE:
            self._fitting = views
        return views

    def ledger(self) -> Ledger:
        """Room for the digests of one refit, numbered by the place in `mine`; one object, empty again each time."""
        if self._ledger is None:
            self._ledger = Ledger(len(self.mine))
        self._ledger.clear()
        return self._ledger

    def tidy(self) -> None:
        """Nobody reads the digests of this refit any more: the next one finds room for its own."""
        if self._ledger is not None:
            self._ledger.clear()

    def pieces(self, unit: int) -> Pieces:
        """What lands in `unit`, numbered by its place in `mine`; one object for what lands in place."""
        if unit != IN_PLACE:
            return self._pieces(np.flatnonzero(self.unit == unit))
        self._in_place = self._in_place or self._pieces(np.flatnonzero(self.unit == IN_PLACE))
        return self._in_place

    def part(self, indices: Sequence[int] | np.ndarray, digested: bool) -> Part:
        """Copies `indices` of the table, to be kept by who lands them again and again.

        Args:
            digested: digest them as soon as they landed, where they are `final`.
        """
        pieces = None
        if digested and self.final:
            pieces = self._pieces(np.searchsorted(self.mine, indices))
        return Part(self._counts(indices), pieces)

    def _counts(self, indices: Sequence[int] | np.ndarray) -> dict[int, int]:
        units, counts = np.unique(self.layout.unit[self._copies.dst_row[indices]], return_counts=True)
        return dict(zip(units.tolist(), counts.tolist(), strict=True))

    def _empty(self) -> list[int]:
        layout = self.layout
        rows = np.flatnonzero(layout.sizes.prod(axis=1) > 0)
        misc = [i for i, name in enumerate(layout.names) if name in self._plan.misc_reasons]
        used = set(layout.unit[np.union1d(rows, np.flatnonzero(np.isin(layout.tensor, misc)))].tolist())
        return sorted(set(layout.unit.tolist()) - used)

    def _pieces(self, numbers: np.ndarray) -> Pieces:
        found = []
        for number in numbers.tolist():
            index = int(self.mine[number])
            row = int(self._copies.dst_row[index])
            found.append(Piece(number, row, self._plan.region(self._copies, index), self.layout.region(row)))
        return Pieces(found)


class Tracker:
    """Which landing units of this rank are open, what still has to land in them, and the digests of what landed.

    Args:
        plan, copies: the plan and the table of it that lands here.
        arrivals: of that table, on this rank.
        sink: opens and closes units.
        verify: take digests of load-format bytes before a unit closes.

    Attributes:
        arrivals, layout: as given, and of this rank's destinations.
        ledger: digests of the copies that land here, numbered in the order of `copies`.
    """

    def __init__(self, plan: RefitPlan, copies: CopyTable, arrivals: Arrivals, sink: Sink, verify: bool) -> None:
        self._plan, self._copies, self._sink, self._verify = plan, copies, sink, verify
        self.arrivals, self.layout = arrivals, arrivals.layout
        self._left = dict(arrivals.counts)
        self._postponed: list[Pieces] = []
        self._views: dict[int, Mapping[int, torch.Tensor]] = {}
        self.ledger = arrivals.ledger()

    def view(self, index: int) -> torch.Tensor:
        """Destination view of copy `index`."""
        row = int(self._copies.dst_row[index])
        region = self._plan.region(self._copies, index)
        return self.row_view(row)[region.slices_in(self.layout.region(row))]

    def row_view(self, row: int) -> torch.Tensor:
        return self.rows(int(self.layout.unit[row]))[row]

    def rows(self, unit: int) -> Mapping[int, torch.Tensor]:
        """Views of all rows of `unit`, which this opens. Raises TransferError as `Arrivals.checked`."""
        if unit not in self._views:
            self._views[unit] = self.arrivals.checked(unit, self._sink.open(unit))
        return self._views[unit]

    def landed(self, indices: Sequence[int] | np.ndarray) -> None:
        """Copies `indices` are in place; closes every unit that is whole."""
        self.arrived(self.arrivals.part(indices, digested=False), digested=False)

    def arrived(self, part: Part, digested: bool) -> None:
        """`part` is in place; closes every unit that is whole.

        Args:
            digested: nothing that is still to come writes where `part` landed: digest it if it has what does so.
        """
        if digested:
            self.digest(part)
        elif self._verify and part.pieces is not None:
            part.pieces.prepare(self.rows(IN_PLACE))  # while bytes move
            self._postponed.append(part.pieces)
        for unit, count in part.counts.items():
            self._left[unit] -= count
            if self._left[unit] == 0:
                self._close(unit)

    def digest(self, part: Part) -> None:
        """Read `part` on the current stream if it has what does so; nothing that is still to come writes there."""
        if self._verify and part.pieces is not None:
            part.pieces.take(self.rows(IN_PLACE), self.ledger)

    def _close(self, unit: int) -> None:
        if unit != IN_PLACE:
            self._digest(unit)
            self._views.pop(unit)
        self._sink.close(unit)

    def pass_empty_units(self) -> None:
        """Open and close the units that have no bytes on this rank, so that their modules are processed too."""
        for unit in self.arrivals.empty:
            self._sink.open(unit)
            self._sink.close(unit)

    def digest_in_place(self) -> None:
        """Read what landed in final storage, once this version writes no more; nothing if all of it was read."""
        for pieces in self._postponed:
            if not pieces.all_taken(self.ledger):
                pieces.take(self.rows(IN_PLACE), self.ledger)
        if not self.ledger.taken.all():
            if self.arrivals.final:  # kernels add digests to what stands there: what was read is read again
                self.ledger.clear()
            self._digest(IN_PLACE)
            self.ledger.fetch()
        self._views.clear()

    def _digest(self, unit: int) -> None:
        if self._verify and unit in self._left:
            self.arrivals.pieces(unit).take(self.rows(unit), self.ledger)

    @property
    def unfinished(self) -> dict[int, int]:
        """unit -> copies that did not land."""
        return {u: n for u, n in self._left.items() if n}


@dataclass
class Traffic:
    """What one rank moved over the wire, and the memory that it took beside the pipeline's slots.

    Copies of engines and launches of kernels are those that moved it, where its mover counts them.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    staging_bytes: int = 0
    engine_copies: int = 0
    kernel_launches: int = 0


@dataclass
class _Flight:
    message: Message
    pending: Pending
    slot: torch.Tensor | None
    buffer: torch.Tensor


@dataclass
class Pipeline:
    """Moves tables of copies over a channel, with at most `num_streams` messages in flight each way.

    Every rank starts its messages in plan order and waits for its oldest one before it starts one too many, so a wait
    only ever depends on messages of earlier rounds: no cycle, no deadlock.
    """

    plan: RefitPlan
    rank: int
    channel: Channel
    num_streams: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._out = Slots(self.num_streams, self.device)
        self._in = Slots(self.num_streams, self.device)

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """Messages say all that others have to know."""
        return False

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """Send and receive this rank's messages of `copies`.

        Args:
            src_view: (source row, region) -> view of exactly that region in this rank's storage.
            tracker: where copies land; None for a rank that receives nothing.
            news: of no use here.
            deadline_s: for the whole run.

        Raises:
            TransferError: naming round, peer and parameter.
        """
        end = time.monotonic() + deadline_s
        traffic = Traffic()
        sending: deque[_Flight] = deque()
        receiving: deque[_Flight] = deque()
        for message in copies.messages_of(self.rank):
            if message.src_rank == message.dst_rank:
                assert tracker is not None
                while receiving:  # units close in plan order, whoever their bytes come from
                    self._received(receiving.popleft(), copies, tracker, end)
                self._copy_locally(copies, message, src_view, tracker)
            elif message.src_rank == self.rank:
                if len(sending) == self.num_streams:
                    self._sent(sending.popleft(), copies, end)
                sending.append(self._send(copies, message, src_view))
                traffic.sent_bytes += message.num_bytes
            else:
                assert tracker is not None
                if len(receiving) == self.num_streams:
                    self._received(receiving.popleft(), copies, tracker, end)
                receiving.append(self._recv(copies, message, tracker))
                traffic.received_bytes += message.num_bytes
        for flight in receiving:
            assert tracker is not None
            self._received(flight, copies, tracker, end)
        for flight in sending:
            self._sent(flight, copies, end)
        return traffic

    @property
    def staging_bytes(self) -> int:
        """Message buffers that all runs so far took; they are kept and reused."""
        return self._out.num_bytes + self._in.num_bytes

    def close(self) -> None:
        """Nothing of its own: the channel belongs to the session."""

    def _send(self, copies: CopyTable, message: Message, src_view: Callable[[int, Region], torch.Tensor]) -> _Flight:
        views = [src_view(int(copies.src_row[i]), self.plan.region(copies, i)) for i in range(message.lo, message.hi)]
        if len(views) == 1 and views[0].is_contiguous():
            slot, buffer = None, as_bytes(views[0])
        else:
            slot = self._out.take(message.num_bytes)
            buffer = slot[: message.num_bytes]
            for part, view in zip(_parts(buffer, views), views, strict=True):
                part.copy_(view)
        return _Flight(message, self.channel.send(buffer, message.dst_rank, message.index), slot, buffer)

    def _recv(self, copies: CopyTable, message: Message, tracker: Tracker) -> _Flight:
        slot = None
        if message.hi - message.lo == 1 and (view := tracker.view(message.lo)).is_contiguous():
            buffer = as_bytes(view)
        else:
            slot = self._in.take(message.num_bytes)
            buffer = slot[: message.num_bytes]
        return _Flight(message, self.channel.recv(buffer, message.src_rank, message.index), slot, buffer)

    def _sent(self, flight: _Flight, copies: CopyTable, end: float) -> None:
        self._wait(flight, copies, end)
        if flight.slot is not None:
            self._out.give(flight.slot)

    def _received(self, flight: _Flight, copies: CopyTable, tracker: Tracker, end: float) -> None:
        self._wait(flight, copies, end)
        indices = range(flight.message.lo, flight.message.hi)
        if flight.slot is not None:
            views = [tracker.view(i) for i in indices]
            for part, view in zip(_parts(flight.buffer, views), views, strict=True):
                view.copy_(part)
            self._in.give(flight.slot)
        tracker.landed(indices)

    def _copy_locally(
        self,
        copies: CopyTable,
        message: Message,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker,
    ) -> None:
        for i in range(message.lo, message.hi):
            tracker.view(i).copy_(src_view(int(copies.src_row[i]), self.plan.region(copies, i)))
        tracker.landed(range(message.lo, message.hi))

    def _wait(self, flight: _Flight, copies: CopyTable, end: float) -> None:
        try:
            flight.pending.wait(end - time.monotonic())
        except RuntimeError as error:
            message = flight.message
            sends = message.src_rank == self.rank
            peer = self.plan.world.describe(message.dst_rank if sends else message.src_rank)
            first = self.plan.copy(copies, message.lo)
            raise TransferError(
                f"{'sending to' if sends else 'receiving from'} {peer} in round {message.round} "
                f"({message.hi - message.lo} copies, {message.num_bytes} bytes, first {first.fqn} {first.region}): "
                f"{error}",
                rank=self.rank,
                phase="transfer",
                remedy=f"check whether {peer} is alive and reachable; remake the session",
            ) from error


def _parts(buffer: torch.Tensor, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The buffer cut into one dense tensor for each view, of its dtype and shape."""
    sizes = [v.numel() * v.element_size() for v in views]
    return [part.view(view.dtype).view(view.shape) for part, view in zip(buffer.split(sizes), views, strict=True)]
