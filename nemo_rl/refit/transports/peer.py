"""One-sided refits between processes of one host: generators read trainers' parameters from where they lie.

Trainers show where their rows are (once; again when storage moved), generators map that memory and copy strided boxes
straight into their own parameters or load-format staging: no message buffers, no work on the trainers. Both sides see
the fences: a generator starts when its trainers have said that their weights are complete, and a trainer returns when
all generators that read it have said that they are done. Where replicas of generators outnumber what trainers' links
feed, generators read from each other too (`relay.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
from nemo_rl.refit.strided import Jobs, Rows, jobs_of
from nemo_rl.refit.transports.board import Board
from nemo_rl.refit.transports.chain import Chain
from nemo_rl.refit.transports.host_memory import HostMemory
from nemo_rl.refit.transports.mover import Facts, Setting

log = logging.getLogger(__name__)


class Memory(Protocol):
    """How memory of one kind of device is shown to other processes and read by them.

    Attributes:
        staging_bytes: the most that reads took beside their destinations.
        step_bytes: of reads, take a few times as long as telling another process that they are done.
    """

    staging_bytes: int
    step_bytes: int

    def beacon(self) -> str:
        """Where other processes find a piece of this process's memory, and what it says."""

    def probe(self, beacon: str) -> str | None:
        """Why memory of the process that lit `beacon` cannot be read; None where it can."""

    def show(self, views: Sequence[torch.Tensor]) -> tuple[list[str], np.ndarray]:
        """(windows, int64 (n, 2): window and offset of each view's first byte)."""

    def open(self, windows: Sequence[str]) -> tuple[int, np.ndarray]:
        """(what stands for the process in `prepare`, address here of each window's first byte)."""

    def own(self) -> int:
        """What stands for this process itself in `prepare`."""

    def prepare(self, peer: int, jobs: Jobs, ordered: bool = True) -> Callable[[], None]:
        """What starts copying `jobs`, as often as wanted; it raises OSError where the memory is gone.

        Args:
            ordered: copies start behind all that this rank has started on the device, not beside it.
        """

    def mark(self) -> Callable[[], bool]:
        """What tells whether all reads started so far are done; it raises OSError where one failed."""

    def wait(self, end: float) -> None:
        """Until all reads are done. Raises TimeoutError at `end` (monotonic), OSError where one failed."""

    def close(self) -> None:
        """Unmap; idempotent."""


def memory_of(device: torch.device) -> Memory:
    if device.type == "cpu":
        return HostMemory()
    from nemo_rl.refit.transports.cuda_memory import CudaMemory  # its bindings come with CUDA builds of torch only

    return CudaMemory(device)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Copies from one rank that are read in one go."""

    giver: int
    indices: np.ndarray
    part: Part
    start: Callable[[], None]


@dataclass(frozen=True, eq=False)
class _Ready:
    """What lands in place, ready to start again while storage stays at both ends; the batches of each step."""

    views: Mapping[int, torch.Tensor]
    rows: Rows
    opened: Mapping[int, tuple[int, Rows]]
    steps: Sequence[Sequence[_Batch]]


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
        self._layouts = {**setting.landings, **setting.sources}
        self._board: Board | None = None
        self._arrange(setting.landings)
        self._tried = not self._relay.num_steps
        self._shown: Rows | None = None
        self._seen: object = None
        self._opened: dict[int, tuple[int, Rows]] = {}
        self._parts: tuple[list[list[np.ndarray]], list[Message]] | None = None
        self._ready: _Ready | None = None

    def run(
        self,
        copies: CopyTable,
        src_view: Callable[[int, Region], torch.Tensor],
        tracker: Tracker | None,
        deadline_s: float,
    ) -> Traffic:
        """See `Mover.run`. Raises TransferError naming peer, round and parameter."""
        end = time.monotonic() + deadline_s
        self._try_forwarders(tracker)
        self._offer(src_view, tracker)
        if tracker is not None:
            self._take(copies, tracker, end)
        self._control.exchange("transfer", dict.fromkeys(self._sources, b""), self._readers)
        sent, received = self._relay.wire_bytes(copies, self._rank)
        return Traffic(sent, received, self._memory.staging_bytes)

    def close(self) -> None:
        self._opened.clear()
        self._ready = None
        self._memory.close()
        if self._board is not None:
            self._board.close()

    # ---- who reads from whom

    def _arrange(self, forwarders: Mapping[int, Layout]) -> None:
        """Fix who gives what where the generators `forwarders` may read from each other; every rank does alike."""
        copies = self._plan.bulk
        self._relay = relay = relay_of(self._plan, forwarders, self._memory.step_bytes)
        self._given = relay.applied(copies)
        self._sources, self._readers = relay.givers(copies, self._rank), relay.readers(copies, self._rank)
        self._used = np.unique(self._given.src_row[self._given.src_rank == self._rank]).tolist()
        self._chain: Chain | None = None
        if relay.num_steps:
            self._board = self._board or Board.open(self._control)
            giver = next((r for r in self._sources if r not in self._world.trainers), None)
            if self._rank in relay.num_steps:
                self._chain = Chain(self._board, self._rank, giver, relay.num_steps[self._rank])
        if self._rank == self._world.trainers[0] and relay.num_steps:
            log.info("%s", relay.describe(self._world, copies))

    def _try_forwarders(self, tracker: Tracker | None) -> None:
        """Before the first transfer: generators whose memory cannot be shown to others do not forward."""
        if self._tried:
            return
        self._tried, mute = True, ""
        if self._used and self._rank in self._setting.landings and tracker is not None:
            try:
                self._memory.show([tracker.rows(IN_PLACE)[row] for row in self._used])
            except OSError as error:
                mute = str(error)
                log.warning("%s does not forward what it got: %s", self._world.describe(self._rank), mute)
        said = self._control.gather("transfer", mute.encode())
        if any(said.values()):
            self._arrange({r: layout for r, layout in self._setting.landings.items() if not said[r]})

    # ---- the side that is read

    def _offer(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> None:
        """Tell readers that this rank begins, and where its rows are, if that is new; open what the sources say."""
        payload = b""
        if self._used:
            payload = self._show(src_view, tracker)
        said = self._control.exchange("transfer", dict.fromkeys(self._readers, payload), self._sources)
        for rank, told in said.items():
            if told:
                self._opened[rank] = self._open(rank, told)

    def _show(self, src_view: Callable[[int, Region], torch.Tensor], tracker: Tracker | None) -> bytes:
        """Where the rows that others read are; nothing where they are what was shown before."""
        layout, landed = self._layouts[self._rank], None
        if self._rank not in self._world.trainers and tracker is not None:
            landed = tracker.rows(IN_PLACE)
        held: object = src_view if landed is None else landed
        if held is self._seen:
            return b""
        self._seen = held
        views = {row: src_view(row, layout.region(row)) if landed is None else landed[row] for row in self._used}
        rows, shown = Rows.of(views, layout), self._shown
        if shown is not None and rows.equals(shown):
            return b""
        self._shown = rows
        self._opened[self._rank] = self._memory.own(), rows
        windows, where = self._memory.show(list(views.values()))
        return pack(windows, {"row": np.array(self._used, np.int64), "where": where, "strides": rows.strides})

    def _open(self, rank: int, told: bytes) -> tuple[int, Rows]:
        windows, arrays = unpack(told)
        try:
            peer, bases = self._memory.open(windows)
        except OSError as error:
            raise self._failed(f"opening the memory of {self._world.describe(rank)}: {error}", rank) from error
        address = np.zeros(len(self._layouts[rank]), np.int64)
        address[arrays["row"]] = bases[arrays["where"][:, 0]] + arrays["where"][:, 1]
        return peer, Rows(address, arrays["strides"])

    # ---- the generator's side

    def _take(self, copies: CopyTable, tracker: Tracker, end: float) -> None:
        in_place, staged = self._parts or self._split(copies, tracker)
        self._parts = in_place, staged
        before, self._ready = self._ready, self._prepare_in_place(in_place, tracker)
        try:
            self._read_in_place(self._ready, tracker, end, proven=self._ready is before)
            for message in staged:
                units = np.unique(tracker.layout.unit[copies.dst_row[message.lo : message.hi]]).tolist()
                views = {row: view for unit in units for row, view in tracker.rows(unit).items()}
                self._start(self._batch(_copies_of([message]), tracker, Rows.of(views, tracker.layout)), tracker)
            self._memory.wait(end)
        except (OSError, TimeoutError) as error:
            names = ", ".join(map(self._world.describe, self._sources))
            raise self._failed(f"reading from {names}: {error}", *self._sources) from error

    def _read_in_place(self, ready: _Ready, tracker: Tracker, end: float, proven: bool) -> None:
        """All steps of this rank.

        Args:
            proven: the same copies ran before, and what they wrote was looked at behind the last of them: none writes
                where another one lands. From then on each batch is looked at as soon as it landed.
        """

        def start(step: int) -> None:
            for batch in ready.steps[step]:
                self._start(batch, tracker, proven)

        if self._chain is not None:
            self._chain.run(start, self._memory.mark, end)
        else:
            start(0)

    def _split(self, copies: CopyTable, tracker: Tracker) -> tuple[list[list[np.ndarray]], list[Message]]:
        """What lands here: in place, steps of copies that are read in one go each, and other messages in plan order."""
        parts: tuple[list[Message], list[Message]] = [], []
        for message in copies.messages_of(self._rank):
            if message.dst_rank == self._rank:
                units = tracker.layout.unit[copies.dst_row[message.lo : message.hi]]
                parts[int((units != IN_PLACE).any())].append(message)
        groups = [_copies_of(group) for group in by_pairing(copies, parts[0])]
        if self._chain is None:
            return [groups], parts[1]
        if self._chain.giver is not None:
            groups = [np.concatenate(groups)]
        step = self._relay.step
        steps = [[g[step[g] == n] for g in groups] for n in range(self._relay.num_steps[self._rank])]
        return [[part for part in parts if len(part)] for parts in steps], parts[1]

    def _prepare_in_place(self, steps: Sequence[Sequence[np.ndarray]], tracker: Tracker) -> _Ready:
        views, ready = tracker.rows(IN_PLACE) if any(steps) else {}, self._ready
        same = ready is not None and ready.opened == self._opened
        if same and ready is not None and ready.views is views:
            return ready
        rows = Rows.of(views, tracker.layout)
        if same and ready is not None and rows.equals(ready.rows):
            return ready
        batches = [[self._batch(indices, tracker, rows, ordered=False) for indices in parts] for parts in steps]
        return _Ready(views, rows, dict(self._opened), batches)

    def _batch(self, indices: np.ndarray, tracker: Tracker, rows: Rows, ordered: bool = True) -> _Batch:
        giver = int(self._given.src_rank[indices[0]])
        peer, there = self._opened[giver]
        ends = (self._layouts[giver], there), (tracker.layout, rows)
        jobs = jobs_of(self._plan, self._given, indices, *ends)
        part = tracker.arrivals.part(indices, digested=not ordered)
        return _Batch(giver, indices, part, self._memory.prepare(peer, jobs, ordered))

    def _start(self, batch: _Batch, tracker: Tracker, digested: bool = False) -> None:
        try:
            batch.start()
        except OSError as error:
            first = self._plan.copy(self._given, int(batch.indices[0]))
            text = (
                f"reading from {self._world.describe(batch.giver)} ({len(batch.indices)} copies, "
                f"{self._relay.num_bytes[batch.indices].sum()} bytes, first {first.fqn} {first.region}): {error}"
            )
            raise self._failed(text, batch.giver) from error
        tracker.arrived(batch.part, digested)

    def _failed(self, text: str, *peers: int) -> TransferError:
        names = ", ".join(map(self._world.describe, peers))
        return TransferError(
            text, rank=self._rank, phase="transfer", remedy=f"check whether {names} is alive; remake the session"
        )


def _copies_of(messages: Sequence[Message]) -> np.ndarray:
    """Numbers of the copies that `messages` carry."""
    return np.concatenate([np.arange(m.lo, m.hi) for m in messages])


def by_pairing(copies: CopyTable, messages: Sequence[Message]) -> list[list[Message]]:
    """Messages of one receiver, those of one source in rounds that pair all ranks alike together.

    Receivers change their source as seldom as the rounds allow, and at the same time.
    """
    rounds: dict[int, list[tuple[int, int]]] = {}
    for number, src, dst in copies.messages[:, :3].tolist():
        rounds.setdefault(number, []).append((src, dst))
    pairing: Mapping[int, tuple[tuple[int, int], ...]] = {n: tuple(sorted(pairs)) for n, pairs in rounds.items()}
    groups: dict[tuple[int, tuple[tuple[int, int], ...]], list[Message]] = {}
    order = {pairs: i for i, pairs in enumerate(dict.fromkeys(pairing[n] for n in sorted(pairing)))}
    for message in sorted(messages, key=lambda m: (order[pairing[m.round]], m.index)):
        groups.setdefault((message.src_rank, pairing[message.round]), []).append(message)
    return list(groups.values())
