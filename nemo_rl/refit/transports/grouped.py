"""Parcels over lanes: the mover of ranks that pass messages, at the speed of large ones.

A transfer that is one contiguous range at an end is sent from there or received there; all others of a parcel are
packed into a slot or spread out of one by one prepared launch. Receivers choose the order of bytes
(`parcels.wire_order`), so that most bytes are packed on one side only. The host posts everything ahead: slots are
guarded by what the stream waits for, and on GPUs the host itself waits only where it is far ahead, and at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.device import aside, follow, rejoin
from nemo_rl.refit.errors import RefitError, TransferError, named_error
from nemo_rl.refit.pipeline import IN_PLACE, Part, Tracker, Traffic
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.strided import Rows, jobs_of
from nemo_rl.refit.transports import parcels
from nemo_rl.refit.transports.lanes import Flight, Lanes, num_lanes
from nemo_rl.refit.transports.loads import End, Load, Views
from nemo_rl.refit.transports.mover import Setting
from nemo_rl.refit.transports.parcels import (
    Ends,
    Limits,
    Order,
    Parcel,
    Rules,
    groups_of,
    parcels_of,
    wire_order,
)

AHEAD = 5
"""Groups that are prepared while lanes are busy: packing is seldom even with the wire."""

STAGING_BYTES = 512 << 20
"""Of all slots of a rank; parcels are so small that each direction has a slot more than lanes."""

DIGEST_BYTES = 256 << 20
"""Of parcels that are looked at together as soon as they landed: each launch takes time of the host's."""

MOST_RUNNING = 128
"""Groups that are posted and not through: the driver makes the host wait without a limit where its queues are full."""

_LOOK_S = 0.1


def staging_bytes(shared: bool) -> int:
    """Of the slots of one direction; where any rank has both (`shared`), each of them has half."""
    return STAGING_BYTES // (2 if shared else 1)


def longest_message(shared: bool) -> int:
    """Bytes; two of them have to fit into the slots of one direction."""
    return staging_bytes(shared) // 2


@dataclass(frozen=True, eq=False)
class _Posted:
    """A group that was posted, and what still has to be done with it."""

    outgoing: Sequence[Load]
    incoming: Sequence[Load]
    flight: Flight | None


class Grouped:
    """The mover of one rank; see the module.

    Args:
        lanes: `num_lanes` of the session's streams; closed with the mover.
        skip: copies of the plan that travel in another way; none where it is None.
    """

    def __init__(self, setting: Setting, lanes: Lanes, skip: np.ndarray | None = None) -> None:
        self._setting, self._lanes = setting, lanes
        self._plan, self._rank, self._world = setting.plan, setting.rank, setting.plan.world
        self._copies = copies = setting.plan.bulk
        mine = copies.touches(self._rank)
        self._mine = np.flatnonzero(mine if skip is None else mine & ~skip)
        self._sent_rows = np.unique(copies.src_row[self._mine][copies.src_rank[self._mine] == self._rank]).tolist()
        self._lands_in_place = bool(self._in_place(self._mine[copies.dst_rank[self._mine] == self._rank]).any())
        self._num_lanes = num_lanes(setting.messages.num_streams)
        self._depth = self._num_lanes + AHEAD  # groups that were posted and not settled
        self._out, self._in = (
            End(setting, out, self._depth, self._staging_bytes, lanes.prepare) for out in (True, False)
        )
        self._groups: list[list[Parcel]] | None = None
        self._wire_bytes = 0, 0  # sent and received
        self._final: dict[int, bool] = {}  # group -> all of its parcel lands in final storage
        self._parts: dict[tuple[int, int], Part] = {}
        self._landed: list[Parcel] = []  # in final storage, not looked at yet
        self._proven = self._apart = False
        self._seen: Callable[[int, Region], object] | None = None

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """Find out where rows lie: what parcels are made of, which is agreed on again wherever any moved."""
        moved = False
        if self._sent_rows and src_view is not self._seen:
            self._seen, layout = src_view, self._setting.sources[self._rank]
            moved = self._out.place({row: src_view(row, layout.region(row)) for row in self._sent_rows}, layout)
        if tracker is not None and self._lands_in_place:
            moved |= self._in.place(tracker.rows(IN_PLACE), tracker.layout)
        return moved or self._groups is None

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """See `Mover.run`; `copies` are the plan's bulk.

        Raises TransferError naming the peers, round and parameter that this rank waited for.
        """
        end = time.monotonic() + deadline_s
        # The same parcels went where they go before, and what landed was looked at behind the last of them: none writes
        # where another one lands. From then on each is looked at as soon as it landed, but where rows share memory:
        # equal bytes hide that one overwrites another.
        self._proven = not news and self._apart
        if news or self._groups is None:
            self._apart = self._lies_apart(tracker)
            self._groups = self._agree(tracker, deadline_s)
            self._fit(self._groups, tracker)
            self._wire_bytes = self._copies.wire_bytes(self._rank)
            self._parts.clear()
        # Sources may be read by others meanwhile; where bytes land, engines work on the stream that they know.
        with self._lanes.ahead() if tracker is None else nullcontext():
            serve = self._meanwhile()
            posted = self._run(self._groups, tracker, end, serve)
            self._finish(posted, end, serve)
        return Traffic(*self._wire_bytes, self._out.staging_bytes + self._in.staging_bytes)

    def _run(
        self,
        groups: Sequence[Sequence[Parcel]],
        tracker: Tracker | None,
        end: float,
        serve: Callable[[], None],
    ) -> list[_Posted]:
        posted: list[_Posted] = []
        settled = 0
        for number, group in enumerate(groups):
            free = self._free_before(number)
            for earlier in range(settled, free):
                self._settle(earlier, posted, tracker, end)
            settled = max(settled, free)
            posted.append(self._post(number, group, tracker, end, serve))
            serve()
            if number >= MOST_RUNNING:
                self._await(posted[number - MOST_RUNNING], end, serve)
        for number in range(settled, len(posted)):
            self._settle(number, posted, tracker, end)
        if tracker is not None:
            self._look_at_landed(tracker)
            rejoin(self._setting.device)
        return posted

    def _await(self, one: _Posted, end: float, look: Callable[[], None]) -> None:
        while one.flight is not None and not one.flight.done():
            if time.monotonic() > end:
                raise self._failed([one], "it was not done within the deadline")
            look()
            time.sleep(0)  # others may run

    def _free_before(self, number: int) -> int:
        """How many groups are to be settled before group `number` is posted."""
        users = [one for end in (self._out, self._in) if (one := end.before(number)) is not None]
        return max(0, number - self._depth + 1, *(one + 1 for one in users))

    def close(self) -> None:
        self._lanes.close()

    # ---- before the first byte

    def _in_place(self, got: np.ndarray) -> np.ndarray:
        """Which of the copies `got`, all of this rank's, land in final storage."""
        landing = self._setting.landings.get(self._rank)
        if landing is None:
            return np.zeros(len(got), bool)
        found: np.ndarray = landing.unit[self._copies.dst_row[got]] == IN_PLACE
        return found

    def _lies_apart(self, tracker: Tracker | None) -> bool:
        """Whether no two rows of final storage share a byte."""
        if tracker is None or not self._lands_in_place:
            return True
        return self._in.rows.apart(tracker.layout.sizes, tracker.layout.item_bytes)

    def _agree(self, tracker: Tracker | None, deadline_s: float) -> list[list[Parcel]]:
        """Tell destinations where their bytes lie, hear it of sources, and tell these in which order bytes come.

        Destinations give up before sources, which wait for them: the first report names who is late.
        """
        num_bytes = self._copies.num_bytes(self._plan.item_bytes)
        rules = Rules(self._world, self._copies, num_bytes, self._mine, self._limits)
        pairs, control = rules.pairs, self._setting.control
        takers = [dst for src, dst in pairs if src == self._rank]
        givers = [src for src, dst in pairs if dst == self._rank]
        lie = {dst: self._out.where(rules.copies_of(self._rank, dst))[1] for dst in takers}
        said = {dst: ends.to_bytes() for dst, ends in lie.items()}
        there = control.exchange("transfer", said, givers, deadline_s=deadline_s)
        orders = {}
        if tracker is not None:
            orders = {(src, self._rank): self._order(rules, src, Ends.from_bytes(there[src])) for src in givers}
        said = {src: order.to_bytes() for (src, _), order in orders.items()}
        for dst, told in control.exchange("transfer", said, takers).items():
            orders[self._rank, dst] = Order.from_bytes(told)
        return groups_of(parcels_of(rules, orders))

    def _order(self, rules: Rules, src: int, there: Ends) -> Order:
        """Of what this rank gets from `src` into final storage; `there` is where it lies."""
        of_pair = rules.copies_of(src, self._rank)
        chosen = np.flatnonzero(self._in_place(of_pair))
        if not len(chosen):
            return Order(chosen, chosen, chosen)
        where, here = self._in.where(of_pair[chosen])
        order = wire_order(here, there.take(chosen), where.num_bytes, where.item, rules.limits)
        return Order(chosen[order.copies], order.cuts, order.ends)

    @property
    def _limits(self) -> Limits:
        """The same on all ranks."""
        most = min(parcels.PACKED_BYTES, self._staging_bytes // (self._num_lanes + 1))
        packed = max(most, self._plan.bucket_bytes)
        return Limits(max(parcels.PARCEL_BYTES, packed), packed, self._num_lanes)

    @property
    def _staging_bytes(self) -> int:
        return staging_bytes(bool(self._world.shared))

    def _fit(self, groups: Sequence[Sequence[Parcel]], tracker: Tracker | None) -> None:
        away = [(n, parcel) for n, group in enumerate(groups) for parcel in group if parcel.src_rank != parcel.dst_rank]
        self._out.fit({n: parcel for n, parcel in away if parcel.src_rank == self._rank}, ())
        incoming = {n: parcel for n, parcel in away if parcel.dst_rank == self._rank}
        if tracker is not None:
            self._final = {n: bool(self._in_place(parcel.copies).all()) for n, parcel in incoming.items()}
            self._in.fit(incoming, [n for n, final in self._final.items() if not final])

    # ---- one group

    def _post(
        self,
        number: int,
        group: Sequence[Parcel],
        tracker: Tracker | None,
        end: float,
        look: Callable[[], None],
    ) -> _Posted:
        """Pack what leaves and start the group, behind all that the current stream was given."""
        outgoing, incoming = [], []
        for parcel in group:
            if parcel.src_rank == parcel.dst_rank:
                assert tracker is not None
                self._copy_locally(parcel, tracker)
            elif parcel.src_rank == self._rank:
                outgoing.append(load := self._out.load(number, parcel))
                if load.copy is not None:
                    load.copy()
            else:
                assert tracker is not None
                incoming.append(self._room(number, parcel, tracker))
        sends = [post for load in outgoing for post in load.posts]
        recvs = [post for load in incoming for post in load.posts]
        try:
            flight = self._lanes.exchange(group[0].lane, sends, recvs, end, look) if sends or recvs else None
        except RefitError:
            raise  # another rank's, which says why its peers wait
        except (TimeoutError, RuntimeError) as error:
            raise self._failed([_Posted(outgoing, incoming, None)], str(error)) from error
        return _Posted(outgoing, incoming, flight)

    def _room(self, number: int, parcel: Parcel, tracker: Tracker) -> Load:
        if self._final[number]:
            return self._in.load(number, parcel)
        return self._in.load_into(number, parcel, self._opened(parcel, tracker), tracker.layout)

    def _opened(self, parcel: Parcel, tracker: Tracker) -> Views:
        units = np.unique(tracker.layout.unit[self._copies.dst_row[parcel.copies]]).tolist()
        return {row: view for unit in units for row, view in tracker.rows(unit).items()}

    def _copy_locally(self, parcel: Parcel, tracker: Tracker) -> None:
        views = self._opened(parcel, tracker)
        there = self._setting.sources[self._rank], self._out.rows
        here = tracker.layout, Rows.of(views, tracker.layout)
        self._lanes.prepare(jobs_of(self._plan, self._copies, parcel.copies, there, here))()
        tracker.arrived(self._part([parcel], tracker), self._proven)

    def _settle(self, number: int, posted: Sequence[_Posted], tracker: Tracker | None, end: float) -> None:
        """What comes next on the current stream finds the group's bytes in place and its slots free."""
        one = posted[number]
        if one.flight is None:
            return
        try:
            one.flight.wait(end - time.monotonic())
        except RuntimeError as error:
            raise self._failed([one], str(error)) from error
        for load in one.incoming:
            assert tracker is not None
            if load.copy is not None:
                load.copy()
            if self._final[number]:
                self._landed.append(load.parcel)
            else:
                tracker.arrived(self._part([load.parcel], tracker), self._proven)
        if tracker is not None and sum(parcel.num_bytes for parcel in self._landed) >= DIGEST_BYTES:
            self._look_at_landed(tracker)

    def _look_at_landed(self, tracker: Tracker) -> None:
        """In one launch, beside what is still to come."""
        landed, self._landed = self._landed, []
        if not landed:
            return
        part = self._part(landed, tracker)
        if self._proven:
            follow(self._setting.device)
            with aside(self._setting.device):
                tracker.digest(part)
        tracker.arrived(part, digested=False)

    def _part(self, landed: Sequence[Parcel], tracker: Tracker) -> Part:
        """What lands with parcels that land together in every refit; kept by the first of them."""
        key = landed[0].src_rank, landed[0].number
        if key not in self._parts:
            copies = np.concatenate([parcel.copies for parcel in landed])
            self._parts[key] = tracker.arrivals.part(copies, digested=True)
        return self._parts[key]

    # ---- the end

    def _finish(self, posted: Sequence[_Posted], end: float, serve: Callable[[], None]) -> None:
        try:
            self._lanes.finish(end, serve)
        except RefitError:
            raise
        except (TimeoutError, RuntimeError) as error:
            late = [one for one in posted if one.flight is not None and not one.flight.done()]
            raise self._failed(late, f"{error}; {len(posted) - len(late)} of {len(posted)} groups were") from error

    def _meanwhile(self) -> Callable[[], None]:
        """What this rank does while it waits: what others asked it to, and a look at who failed, ten times a second."""
        control, looked = self._setting.control, time.monotonic()

        def look() -> None:
            nonlocal looked
            try:
                control.idle()
                if time.monotonic() > looked + _LOOK_S:
                    control.raise_if_aborted("transfer")
                    looked = time.monotonic()
            except RefitError:
                raise
            except Exception as error:  # not of the peer that this rank waits for
                raise named_error(error, self._rank, "transfer") from error

        return look

    def _failed(self, late: Sequence[_Posted], text: str) -> TransferError:
        """Names the first group that is not done."""
        loads = [load.parcel for one in late for load in (*one.outgoing, *one.incoming)][:1]
        waits = "; ".join(self._describe(parcel) for parcel in loads) or "on this device alone"
        peers = {p.dst_rank if p.src_rank == self._rank else p.src_rank for p in loads}
        names = " and ".join(self._world.describe(r) for r in sorted(peers)) or "this rank's device"
        return TransferError(
            f"{waits}: {text}",
            rank=self._rank,
            phase="transfer",
            remedy=f"check whether {names} is alive and reachable; remake the session",
        )

    def _describe(self, parcel: Parcel) -> str:
        sends = parcel.src_rank == self._rank
        peer = self._world.describe(parcel.dst_rank if sends else parcel.src_rank)
        first = self._plan.copy(self._copies, int(parcel.copies[0]))
        return (
            f"{'sending to' if sends else 'receiving from'} {peer} in round {parcel.key[1]}, parcel {parcel.number} "
            f"({len(parcel.copies)} copies, {parcel.num_bytes} bytes, first {first.fqn} {first.region})"
        )
