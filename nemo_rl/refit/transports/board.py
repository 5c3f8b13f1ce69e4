"""A progress board of one host: counters in memory that all ranks of a session map, read without a message.

Each rank writes its own counters and reads those of all others. A counter that grew says that what its rank did before
is done: work on a device is waited for before it is posted, and stores of x86-64 processors stay in order.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import TransferError

_LINE = 8  # counters of a cache line, so that no two ranks write to the same one
_SPINS = 100  # looks without a pause: what is due within microseconds is seen at once
_PAUSE_S, _MOST_S = 20e-6, 1e-4
_CHECK_S = 0.05  # between two looks at what tells of failures


class Board:
    """One rank's view of the counters of all ranks, each of which starts at 0 and never falls.

    Args:
        control: of the session; names ranks, has the deadline and the abort flag.
        words: the shared counters, `lanes` rounded up to a cache line for each rank.
        pids: process of each rank, by rank.
        lanes: counters a rank.
    """

    def __init__(self, control: Control, words: mmap.mmap, pids: Sequence[int], lanes: int) -> None:
        self._control, self._map, self._pids, self._lanes = control, words, pids, lanes
        self._words = memoryview(words).cast("q")
        self._width = _width(lanes)
        self._meetings = 0

    @classmethod
    def open(cls, control: Control, lanes: int = 1) -> Board:
        """The board of a session; every rank calls it. Nothing of it has a name that would outlive the ranks.

        Raises:
            TransferError: ranks are not processes of one host and user, or one did not come within the deadline.
        """
        size, first = control.world.size * _width(lanes) * 8, control.world.trainers[0]
        made = os.memfd_create("refit-board") if control.rank == first else -1
        try:
            if made >= 0:
                os.ftruncate(made, size)
            told = control.gather("connect", json.dumps([os.getpid(), made]).encode())
            pids, files = zip(*(json.loads(told[rank]) for rank in range(control.world.size)), strict=True)
            words = _map(control, pids[first], files[first], size)
            control.meet("connect")
        finally:
            if made >= 0:
                os.close(made)
        return cls(control, words, pids, lanes)

    def post(self, value: int, lane: int = 0) -> None:
        """Say `value`, at least what this rank said last. Raises ValueError where it is less."""
        at = self._at(self._control.rank, lane)
        if value < self._words[at]:
            raise ValueError(f"rank {self._control.rank} posts {value} in lane {lane} after {self._words[at]}")
        self._words[at] = value

    def seen(self, rank: int, lane: int = 0) -> int:
        """What `rank` said last."""
        return self._words[self._at(rank, lane)]

    def wait(
        self,
        values: Mapping[int, int],
        phase: str,
        end: float,
        lane: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Until every rank of `values` has said at least its value, or `end` (monotonic).

        Args:
            meanwhile: called between looks; may post.

        Raises:
            TransferError: ranks that did not in time, or whose process ended, by name and with what they said.
            RefitError: another rank reported a failure; its text.
        """

        def done() -> bool:
            if not self._late(values, lane):
                return True
            meanwhile()
            return False

        self.until(done, {lane: values}, phase, end)

    def meet(self, phase: str, lane: int) -> None:
        """All ranks come here within the session's deadline; `lane` is for nothing else. Raises as `wait`."""
        self._meetings += 1
        self.post(self._meetings, lane)
        everyone = dict.fromkeys(range(self._control.world.size), self._meetings)
        self.wait(everyone, phase, time.monotonic() + self._control.deadline_s, lane, self._control.idle)

    def until(self, done: Callable[[], bool], awaited: Mapping[int, Mapping[int, int]], phase: str, end: float) -> None:
        """Until `done`, which may do what can be done without waiting, or `end` (monotonic).

        Args:
            awaited: lane -> rank -> what it says in the end, which `done` waits for.

        Raises:
            TransferError, RefitError: as `wait`.
        """
        spins, pause, check = _SPINS, _PAUSE_S, time.monotonic() + _CHECK_S
        while not done():
            if spins:
                spins -= 1
                continue
            now = time.monotonic()
            if now > check or now > end:
                for lane, values in awaited.items():
                    self.look(values, phase, lane)
                check = now + _CHECK_S
            if now > end:
                lane, late = next(((n, late) for n, v in awaited.items() if (late := self._late(v, n))), (0, {}))
                self._give_up("waited until the deadline for", late, phase, lane)
            time.sleep(pause)
            pause = min(2 * pause, _MOST_S)

    def look(self, values: Mapping[int, int], phase: str, lane: int = 0) -> None:
        """Whether waiting for `values` still makes sense, for who waits by other means. Raises as `wait`."""
        self._control.raise_if_aborted(phase)
        ended = [rank for rank in self._late(values, lane) if _ended(self._pids[rank])]
        # Read again: a rank may say its last word and end between two looks.
        if late := self._late({rank: values[rank] for rank in ended}, lane):
            self._give_up("the process ended of", late, phase, lane)

    def check_alive(self, ranks: Iterable[int], phase: str) -> None:
        """For who waits for `ranks` by other means. Raises TransferError where the process of one ended."""
        ended = [rank for rank in sorted(ranks) if _ended(self._pids[rank])]
        if ended:
            names = ", ".join(map(self._control.world.describe, ended))
            raise TransferError(
                f"the process ended of {names}",
                rank=self._control.rank,
                phase=phase,
                remedy="look at those ranks' logs; remake the session",
            )

    def _late(self, values: Mapping[int, int], lane: int) -> dict[int, int]:
        return {rank: value for rank, value in values.items() if self.seen(rank, lane) < value}

    def close(self) -> None:
        """Unmap; idempotent."""
        self._words.release()
        if not self._map.closed:
            self._map.close()

    def _at(self, rank: int, lane: int) -> int:
        assert 0 <= lane < self._lanes, f"lane {lane} of {self._lanes}"
        return rank * self._width + lane

    def _give_up(self, what: str, late: Mapping[int, int], phase: str, lane: int) -> None:
        world = self._control.world
        names = ", ".join(
            f"{world.describe(rank)}, which said {self.seen(rank, lane)} of {value}" for rank, value in late.items()
        )
        raise TransferError(
            f"{what} {names}",
            rank=self._control.rank,
            phase=phase,
            remedy="look at those ranks' logs: they died, hang, or never called this refit; remake the session",
        )


def _width(lanes: int) -> int:
    """Counters from one rank's first to the next one's."""
    return -(-lanes // _LINE) * _LINE


def _map(control: Control, pid: int, number: int, size: int) -> mmap.mmap:
    """`size` bytes of the file that process `pid` has open under `number`."""
    try:
        opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    except OSError as error:
        raise TransferError(
            f"the board of process {pid} cannot be opened: {error}",
            rank=control.rank,
            phase="connect",
            remedy="run all ranks of a host as one user and with common process ids, or choose another transport",
        ) from error
    try:
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)


def _ended(pid: int) -> bool:
    """Whether the process is gone, or dead and not yet waited for by its parent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"
