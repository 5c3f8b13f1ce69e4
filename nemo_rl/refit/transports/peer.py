"""One-sided refits between processes of one host: bytes go from trainers' parameters to where they land, in one pass.

Ranks show where their rows are (once; again when storage moved) and map each other's memory. What lands in place is
written there by whoever has it, where writing is the faster way (`steps.py`), or read by whom it is for; load-format
staging is read into by its owner: no message buffers, and no work on the side that does not move. All sides see the
fences: nobody starts before the weights are complete and the engines closed, and a rank returns when all that was
moved from it or into it is there. Where replicas of generators outnumber what trainers' links feed, generators forward
what landed in them (`relay.py`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from nemo_rl.refit.base import World
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.packed import pack, unpack
from nemo_rl.refit.pipeline import IN_PLACE, Part, Tracker, Traffic
from nemo_rl.refit.plan import CopyTable, Message
from nemo_rl.refit.region import Region
from nemo_rl.refit.relay import relay_of
from nemo_rl.refit.strided import Rows, jobs_of
from nemo_rl.refit.transports.board import Board
from nemo_rl.refit.transports.carry import Carrier
from nemo_rl.refit.transports.mapped import End, Side, Windows, memory_of
from nemo_rl.refit.transports.mover import Facts, Setting
from nemo_rl.refit.transports.steps import Batch, Schedule

log = logging.getLogger(__name__)


def unsupported(rank: int, world: World, facts: Facts) -> str | None:
    """Why this rank cannot read or be read: hosts or devices differ, or the system does not permit it."""
    mine = facts[rank]
    for other, fact in facts.items():
        if fact.host != mine.host or not fact.host:
            return f"rank {other} is on another host"
        if fact.device != mine.device:
            return f"rank {other} has its tensors on {fact.device}, this rank on {mine.device}"
    memory = memory_of(torch.device(mine.device))
    beacons = {r: facts[r].beacon for r in world.trainers if rank in world.generators and r != rank}
    return next((f"{world.describe(r)}: {text}" for r, b in beacons.items() if (text := memory.probe(b))), None)


class Peer:
    """The mover of one rank; see the module."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._plan, self._rank = setting, setting.plan, setting.rank
        self._control, self._world = setting.control, setting.plan.world
        self._memory = memory_of(setting.device)
        sources: dict[End, Layout] = {(rank, "source"): layout for rank, layout in setting.sources.items()}
        landings: dict[End, Layout] = {(rank, "landing"): layout for rank, layout in setting.landings.items()}
        self._layouts: Mapping[End, Layout] = sources | landings
        self._windows = Windows(self._memory, self._rank, self._layouts)
        self._staged = _staged(setting.plan.bulk, setting.landings)
        self._some_staged = bool(self._staged.any())
        self._board = _board(setting)
        self._arrange(setting.landings)
        self._tried = not (self._memory.puts or self._relay.num_steps)
        self._parts: list[Part] | None = None
        self._news: dict[Side, bytes] = {}
        self._proven: tuple[int, Rows] | None = None
        self._apart: tuple[tuple[int, Rows] | None, bool] = None, True  # rows, and whether no two share a byte
        self._starts: tuple[int, list[Callable[[], None]]] = -1, []

    def ready(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bool:
        """See `Mover.ready`: find out where this rank's rows are, and whether others know it."""
        self._try_to_show(tracker)
        before = self._windows.changes
        self._news = self._located(src_view, tracker)
        return self._windows.changes != before

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        news: bool,
        deadline_s: float,
    ) -> Traffic:
        """See `Mover.run`. Raises TransferError naming peer, round and parameter."""
        end = time.monotonic() + deadline_s
        before = self._memory.num_copies, self._memory.num_launches
        if news:
            self._tell_where()
        self._carry(tracker, end)
        if self._some_staged:
            self._take_staged(tracker, end)
        moved = self._memory.num_copies - before[0], self._memory.num_launches - before[1]
        return Traffic(*self._wire_bytes, self._memory.staging_bytes, *moved)

    def close(self) -> None:
        self._starts = -1, []
        self._memory.close()

    # ---- who moves what

    def _arrange(self, able: Mapping[int, Layout]) -> None:
        """Fix who moves what where the generators `able` can show their memory to others; every rank does alike."""
        memory, copies = self._memory, self._plan.bulk
        self._relay = relay = relay_of(self._plan, able, memory.step_bytes)
        self._given = relay.applied(copies)
        written = frozenset(able if memory.puts else ())
        self._schedule = Schedule.of(self._given, self._staged, relay, written, memory.step_bytes)
        self._mine = self._schedule.moved_by(self._rank)
        self._wire_bytes = relay.wire_bytes(copies, self._rank)
        self._tells, self._hears = self._who_needs_whom()
        self._carrier = Carrier(self._board, self._schedule, self._rank)
        if self._rank == self._world.trainers[0] and relay.num_steps:
            log.info("%s", relay.describe(self._world, copies))

    def _who_needs_whom(self) -> tuple[dict[int, set[Side]], dict[int, set[Side]]]:
        """Other rank -> sides of this rank's memory that it moves bytes with, and sides of it that this rank does."""
        tells: defaultdict[int, set[Side]] = defaultdict(set)
        hears: defaultdict[int, set[Side]] = defaultdict(set)
        pairs = [(self._schedule.mover(b), end) for b in self._schedule.batches for end in self._ends(b)]
        staged = np.unique(np.column_stack([self._given.src_rank, self._given.dst_rank])[self._staged], axis=0)
        pairs += [(reader, (giver, "source")) for giver, reader in staged.tolist()]
        for mover, (rank, side) in pairs:
            if mover != rank == self._rank:
                tells[mover].add(side)
            if mover == self._rank != rank:
                hears[rank].add(side)
        return dict(tells), dict(hears)

    def _ends(self, batch: Batch) -> tuple[End, End]:
        side: Side = "source" if batch.giver in self._world.trainers else "landing"
        return (batch.giver, side), (batch.taker, "landing")

    def _try_to_show(self, tracker: Tracker | None) -> None:
        """Before the first transfer: what lands in memory that cannot be shown to others is read by its owner."""
        if self._tried:
            return
        self._tried, mute = True, ""
        if tracker is not None and self._lands_in_place:
            try:
                self._memory.show([view for view in tracker.rows(IN_PLACE).values() if view.numel()])
            except OSError as error:
                mute = str(error)
                log.warning("%s neither forwards nor is written to: %s", self._world.describe(self._rank), mute)
        said = self._control.gather("transfer", mute.encode())
        if any(said.values()):
            self._arrange({r: layout for r, layout in self._setting.landings.items() if not said[r]})

    @property
    def _lands_in_place(self) -> bool:
        return self._rank in self._schedule.num_steps

    # ---- where rows are

    def _located(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> dict[Side, bytes]:
        """What to tell others of where this rank's rows are; empty where they know it."""
        shown = {side for sides in self._tells.values() for side in sides}
        news: dict[Side, bytes] = {}
        if self._rank in self._world.trainers:
            news["source"] = self._windows.locate(
                "source", src_view, lambda: self._source_rows(src_view), "source" in shown
            )
        if tracker is not None and self._lands_in_place:
            held = tracker.rows(IN_PLACE)
            news["landing"] = self._windows.locate("landing", held, lambda: held, "landing" in shown)
        return news

    def _tell_where(self) -> None:
        """Tell others where this rank's rows are, if that is new, and open what they say."""
        self._proven = None  # whoever moves bytes with what moved prepares other copies
        outgoing = {
            rank: _packed({s: self._news[s] for s in sorted(sides) if self._news[s]})
            for rank, sides in self._tells.items()
        }
        said = self._exchange(outgoing, self._hears)
        for rank, told in said.items():
            for side, data in _unpacked(told).items():
                self._open((rank, side), data)

    def _source_rows(self, src_view: Callable[[int, Region], torch.Tensor]) -> dict[int, torch.Tensor]:
        """Views of the rows that travel."""
        layout, copies = self._layouts[self._rank, "source"], self._plan.bulk
        rows = np.unique(copies.src_row[copies.src_rank == self._rank]).tolist()
        return {row: src_view(row, layout.region(row)) for row in rows}

    def _exchange(self, outgoing: Mapping[int, bytes], ranks: Iterable[int]) -> dict[int, bytes]:
        """As `Control.exchange`; a rank whose process ended is named at once, not by who waits for who waits for it."""
        board, awaited = self._board, set(ranks)
        return self._control.exchange("transfer", outgoing, awaited, lambda: board.check_alive(awaited, "transfer"))

    def _open(self, end: End, told: bytes) -> None:
        try:
            self._windows.open(end, told)
        except OSError as error:
            raise self._failed(f"opening the memory of {self._world.describe(end[0])}: {error}", end[0]) from error

    # ---- what lands in place

    def _carry(self, tracker: Tracker | None, end: float) -> None:
        """All steps. Copies into rows that none ran into before are looked at behind the last of them: whether one
        writes where another one landed shows then, and from then on each step is looked at as soon as it landed. Rows
        that share memory are always looked at behind the last step: equal bytes hide that one overwrites another."""
        if self._parts is None and tracker is not None:
            self._parts = [tracker.arrivals.part(indices, digested=True) for indices in self._steps()]
        if self._starts[0] != self._windows.changes:
            self._starts = self._windows.changes, [self._prepared(batch) for batch in self._mine]
        into = self._windows.ends.get((self._rank, "landing"))
        if tracker is not None and into is not None and into is not self._apart[0]:
            self._apart = into, into[1].apart(tracker.layout.sizes, tracker.layout.item_bytes)
        proven, self._proven = into is self._proven and self._apart[1], into

        left = len(self._parts or ())

        def landed(step: int) -> None:
            nonlocal left
            assert tracker is not None and self._parts is not None
            tracker.arrived(self._parts[step], proven)
            left -= 1
            if proven and left <= 1:  # once before the last step, so that nothing of it is new to the driver then
                tracker.ledger.fetch()

        try:
            self._carrier.run(self._starts[1], self._memory.mark, landed, self._control.idle, end)
        except OSError as error:
            others = sorted({batch.giver + batch.taker - self._rank for batch in self._mine})
            names = ", ".join(map(self._world.describe, others))
            raise self._failed(f"moving bytes from or to {names}: {error}", *others) from error

    def _steps(self) -> list[np.ndarray]:
        """Copies of each step that lands here."""
        batches = [b for b in self._schedule.batches if b.taker == self._rank]
        count = self._schedule.num_steps.get(self._rank, 0)
        return [np.concatenate([b.indices for b in batches if b.step == step]) for step in range(count)]

    def _prepared(self, batch: Batch) -> Callable[[], None]:
        """What starts `batch`; it raises TransferError."""
        put, (giver, taker) = batch.giver == self._rank, self._ends(batch)
        start = self._prepare(batch.indices, giver, taker, put, ordered=False)
        far = batch.taker if put else batch.giver

        def begin() -> None:
            try:
                start()
            except OSError as error:
                raise self._failed_copies(batch.indices, far, error) from error

        return begin

    def _prepare(self, indices: np.ndarray, giver: End, taker: End, put: bool, ordered: bool) -> Callable[[], None]:
        windows, layouts = self._windows.ends, self._layouts
        ends = (layouts[giver], windows[giver][1]), (layouts[taker], windows[taker][1])
        process = windows[taker if put else giver][0]
        return self._memory.prepare(process, jobs_of(self._plan, self._given, indices, *ends), put=put, ordered=ordered)

    # ---- what lands in staging

    def _take_staged(self, tracker: Tracker | None, end: float) -> None:
        """Read messages for staging in plan order; givers wait until all is read."""
        messages = self._plan.bulk.messages_of(self._rank)
        mine = [m for m in messages if m.dst_rank == self._rank and self._staged[m.lo]]
        givers = {message.src_rank for message in mine}
        for message in mine:
            assert tracker is not None
            self._read(message, tracker)
        try:
            self._memory.wait(end)
        except (OSError, TimeoutError) as error:
            names = ", ".join(map(self._world.describe, sorted(givers)))
            raise self._failed(f"reading from {names}: {error}", *sorted(givers)) from error
        staged = self._given.dst_rank[self._staged & (self._given.src_rank == self._rank)]
        readers = set(np.unique(staged).tolist()) - {self._rank}
        self._exchange(dict.fromkeys(givers - {self._rank}, b""), readers)

    def _read(self, message: Message, tracker: Tracker) -> None:
        indices = np.arange(message.lo, message.hi)
        units = np.unique(tracker.layout.unit[self._plan.bulk.dst_row[indices]]).tolist()
        views = {row: view for unit in units for row, view in tracker.rows(unit).items()}
        process, rows = self._windows.ends[message.src_rank, "source"]
        ends = (self._layouts[message.src_rank, "source"], rows), (tracker.layout, Rows.of(views, tracker.layout))
        jobs = jobs_of(self._plan, self._given, indices, *ends)
        try:
            self._memory.prepare(process, jobs, put=False, ordered=True)()
        except OSError as error:
            raise self._failed_copies(indices, message.src_rank, error) from error
        tracker.landed(indices)

    # ---- errors

    def _failed_copies(self, indices: np.ndarray, far: int, error: OSError) -> TransferError:
        first, num_bytes = self._plan.copy(self._given, int(indices[0])), self._relay.num_bytes[indices].sum()
        way = "writing to" if self._given.src_rank[indices[0]] == self._rank != far else "reading from"
        return self._failed(
            f"{way} {self._world.describe(far)} ({len(indices)} copies, {num_bytes} bytes, "
            f"first {first.fqn} {first.region}): {error}",
            far,
        )

    def _failed(self, text: str, *peers: int) -> TransferError:
        names = ", ".join(map(self._world.describe, peers))
        return TransferError(
            text, rank=self._rank, phase="transfer", remedy=f"check whether {names} is alive; remake the session"
        )


def _board(setting: Setting) -> Board:
    """The session's, a lane for each taker, with all counters at 0; every rank calls it."""
    board = setting.control.board
    if board is None:
        raise TransferError(
            "'peer' needs memory that all ranks share, and there is none",
            rank=setting.rank,
            phase="agree",
            remedy="see the log for why; choose another transport",
        )
    board.restart("agree")
    return board


def _staged(copies: CopyTable, landings: Mapping[int, Layout]) -> np.ndarray:
    """Which copies belong to messages of which something lands in load-format staging."""
    found = np.zeros(len(copies), bool)
    for rank, layout in landings.items():
        mine = np.flatnonzero(copies.dst_rank == rank)
        found[mine] = layout.unit[copies.dst_row[mine]] != IN_PLACE
    for _, _, _, lo, hi, _ in copies.messages.tolist():
        found[lo:hi] = found[lo:hi].any()
    return found


def _packed(news: Mapping[Side, bytes]) -> bytes:
    return pack(None, {side: np.frombuffer(data, np.uint8) for side, data in news.items()}) if news else b""


def _unpacked(told: bytes) -> dict[Side, bytes]:
    arrays: Sequence[tuple[str, np.ndarray]] = list(unpack(told)[1].items()) if told else []
    return {side: array.tobytes() for side, array in arrays}  # type: ignore[misc]
