"""A progress board of one host: memory that all ranks of a session map, so that they meet without a message.

Each rank writes its own counters and reads those of all others. A counter that grew says that what its rank did before
is done: work on a device is waited for before it is posted, and stores of x86-64 processors stay in order.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.transports import shared_file

_LINE = 8  # words of a cache line, so that no two ranks write to the same one
MOST_WORDS = 4  # that a rank brings to a meeting
# Words before the text of a decision (its question's number, its bytes, the last question in dispute); most bytes of it
_DECISION, _MOST_TEXT = 3, 1024
_RECORD = _DECISION + _MOST_TEXT // 8  # words of a decision and its text
# Looking on without a pause sees at once what is due soon. It takes the interpreter from other threads, so only a
# process without any does it, and a processor: for long only where this host has some to spare.
_SPIN_S, _SPARE_S = 5e-5, 20e-3
_PAUSE_S, _MOST_S = 20e-6, 1e-4
_CHECK_S = 0.05  # between two looks at what tells of failures


class Board:
    """One rank's view of the counters of all ranks, each of which starts at 0 and never falls between two `restart`.

    Args:
        control: of the session, which outlives the board; names ranks, has the deadline and the abort flag.
        file: the shared memory, opened by this rank alone, which `close` closes.
        processes: (pid, time of its start) of each rank, by rank.
        lanes: counters a rank.

    Attributes:
        meetings: that this rank came to.
        room: bytes that a rank's letters may have in all, those for all others together; see `make_room`.
    """

    def __init__(
        self, control: Control, file: BinaryIO, processes: Sequence[tuple[int, int | None]], lanes: int
    ) -> None:
        self._control: Control = weakref.proxy(control)  # which holds this board: its store goes when it goes
        self._file, self._processes = file, processes
        self._width, self._lanes = _width(lanes), lanes
        self._everyone = range(control.world.size)
        self._letters = _size(control, lanes)  # byte of the first one
        self.room = 0
        self._show(self._letters)
        self._eager_s = _SPARE_S if len(os.sched_getaffinity(0)) >= 2 * control.world.size else _SPIN_S
        self.meetings = 0
        self._fence = threading.Lock()  # taking it orders this rank's stores before its loads, as x86-64 alone does not

    @classmethod
    def open(cls, control: Control, lanes: int = 0) -> Board:
        """The board of a session; every rank calls it. Nothing of it has a name that would outlive the ranks.

        Raises:
            OSError: ranks cannot share memory, on all of them; the first one by name, and why.
            TransferError: a rank did not come within the deadline.
        """
        first = control.world.trainers[0]
        made, problem = shared_file.made(_size(control, lanes)) if control.rank == first else (-1, "")
        board: Board | None = None
        try:
            pid = os.getpid()
            mine = [(pid, shared_file.born(pid)), made, made >= 0 and os.fstat(made).st_ino]
            told = {r: json.loads(b) for r, b in control.gather("connect", json.dumps(mine).encode()).items()}
            processes = [(told[r][0][0], told[r][0][1]) for r in range(control.world.size)]
            file, found = shared_file.opened(processes, processes[first][0], *told[first][1:])
            if file is not None:
                board, found = cls._mapped(control, file, processes, lanes)
            said = control.gather("connect", (problem or found).encode())
        except Exception:
            if board is not None:
                board.close()
            raise
        finally:
            if made >= 0:
                os.close(made)
        wrong = next((f"{control.world.describe(r)}: {text.decode()}" for r, text in said.items() if text), None)
        if board is None or wrong is not None:
            if board is not None:
                board.close()
            raise OSError(wrong)
        return board

    @classmethod
    def _mapped(
        cls, control: Control, file: BinaryIO, processes: Sequence[tuple[int, int | None]], lanes: int
    ) -> tuple[Board | None, str]:
        """The board in `file`, or why there is none."""
        try:
            return cls(control, file, processes, lanes), ""
        except (OSError, ValueError) as error:
            file.close()
            return None, f"the board cannot be mapped: {error}"

    def _show(self, size: int) -> None:
        self._map = mmap.mmap(self._file.fileno(), size)
        self._words = memoryview(self._map).cast("q")

    # ---- counters

    def post(self, value: int, lane: int = 0) -> None:
        """Say `value`, at least what this rank said last. Raises ValueError where it is less."""
        at = self._at(self._control.rank, lane)
        if value < self._words[at]:
            raise ValueError(f"rank {self._control.rank} posts {value} in lane {lane} after {self._words[at]}")
        self._words[at] = value

    def seen(self, rank: int, lane: int = 0) -> int:
        """What `rank` said last."""
        return self._words[self._at(rank, lane)]

    def restart(self, phase: str) -> None:
        """All counters start at 0 again; every rank calls it, with nothing under way. Raises as `wait`."""
        self.meet(phase)
        for lane in range(self._lanes):
            self._words[self._at(self._control.rank, lane)] = 0
        self.meet(phase)

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

        late: Mapping[int, int] = values

        def done() -> bool:
            nonlocal late
            if late := self._late(late, lane):
                meanwhile()
            return not late

        self.until(done, {lane: values}, phase, end)

    def until(self, done: Callable[[], bool], awaited: Mapping[int, Mapping[int, int]], phase: str, end: float) -> None:
        """Until `done`, which may do what can be done without waiting, or `end` (monotonic).

        Args:
            awaited: lane -> rank -> what it says in the end, which `done` waits for.

        Raises:
            TransferError, RefitError: as `wait`.
        """
        now = time.monotonic()
        check, pause = now + _CHECK_S, _PAUSE_S
        eager = now + (self._eager_s if threading.active_count() == 1 else 0.0)
        while not done():
            now = time.monotonic()
            if now > check or now > end:
                for lane, values in awaited.items():
                    self.look(values, phase, lane)
                check = now + _CHECK_S
            if now > end:
                lane, late = next(((n, late) for n, v in awaited.items() if (late := self._late(v, n))), (0, {}))
                if not late and done():  # they came between the two looks
                    return
                self._give_up("waited until the deadline for", late, phase, lane)
            if now < eager:
                os.sched_yield()
            else:
                time.sleep(pause)
                pause = min(2 * pause, _MOST_S)

    # ---- meetings and decisions

    def meet(
        self, phase: str, words: Sequence[int] = (), meanwhile: Callable[[], None] = lambda: None
    ) -> list[tuple[int, ...]]:
        """See `Control.meet`."""
        assert len(words) <= MOST_WORDS
        self.meetings += 1
        # Two places in turn: who comes to the next meeting but one has seen that all have left this one.
        place = self._lanes + 2 + MOST_WORDS * (self.meetings % 2)
        number, shared = self.meetings, self._words
        starts = [rank * self._width + place for rank in self._everyone]
        counts = [rank * self._width + self._lanes for rank in self._everyone]
        for i, word in enumerate(words, starts[self._control.rank]):
            shared[i] = word
        shared[counts[self._control.rank]] = number
        meanwhile()
        awaited = {self._lanes: dict.fromkeys(self._everyone, number)}
        end = time.monotonic() + self._control.deadline_s
        self.until(lambda: all(shared[i] >= number for i in counts), awaited, phase, end)
        return [tuple(shared[start : start + len(words)]) for start in starts]

    def undisputed(self, question: int) -> bool:
        """Right behind a meeting that decides `question`, once all came: whether that holds. If not, ask `decide`.

        Who gives up says so before it counts who came; who leaves counts before it asks whether any gave up. So where
        one that leaves knows of no dispute, all that give up will count all ranks.
        """
        with self._fence:
            return self._words[self._decision(question) + 2] < question

    def dispute(self, question: int, meeting: int) -> bool:
        """This rank gives up on others in `meeting`, which decides `question`. Whether all came nevertheless: ask
        `decide`, with a yes if so."""
        self._words[self._decision(question) + 2] = question
        with self._fence:
            return all(self.seen(rank, self._lanes) >= meeting for rank in self._everyone)

    def decide(self, question: int, answer: str, phase: str) -> str:
        """The answer that the first rank gave to `question`; every rank gets the same, whatever it wanted itself.

        Questions are numbered one after the other, and who has this answer asks no question but the next one before all
        have it. A process that ends on the way holds up nobody.

        Raises:
            TransferError: another rank was about to answer until the deadline.
        """
        at, asked = self._decision(question), time.monotonic()
        while self._words[at] < question and not self._decided(question, answer):
            waited = time.monotonic() - asked
            if waited > self._control.deadline_s:
                raise TransferError(
                    f"another rank was about to decide for {self._control.deadline_s:g} s",
                    rank=self._control.rank,
                    phase=phase,
                    remedy="look for a process of this session that is stopped; remake the session",
                )
            if waited < _SPIN_S:  # whoever decides is done within microseconds
                os.sched_yield()
            else:
                time.sleep(_PAUSE_S)
        assert self._words[at] == question, f"question {self._words[at]} is decided, {question} was asked"
        start = 8 * (at + _DECISION)
        return self._map[start : start + self._words[at + 1]].decode(errors="replace")

    def _decided(self, question: int, answer: str) -> bool:
        """Decide by `answer`, unless another rank did; False where another one is about to."""
        at = self._decision(question)
        with self._locked() as locked:
            if locked and self._words[at] < question:
                start, text = 8 * (at + _DECISION), answer.encode()[:_MOST_TEXT]
                self._map[start : start + len(text)] = text
                self._words[at + 1] = len(text)
                self._words[at] = question  # last: until then, nothing is decided
            return locked

    def _decision(self, question: int) -> int:
        """The first word of its record, behind what each rank says. Two records take turns: some ranks may ask for an
        answer while others, who have it, give up on the next question."""
        return self._width * len(self._everyone) + question % 2 * _RECORD

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Whether no other rank holds the lock, which the kernel gives up for a process that ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    # ---- letters

    def make_room(self, phase: str, num_bytes: int) -> None:
        """All ranks come here, each with the most that its letters have, and have room for that. Raises as `wait`."""
        said = self.meet(phase, (num_bytes,))
        self.room = max(self.room, *(-(-num_bytes // 8) * 8 for (num_bytes,) in said))
        size = self._letters + len(self._everyone) * self._letters_size
        os.ftruncate(self._file.fileno(), size)  # all ranks to the same
        self._words.release()
        self._map.close()
        self._show(size)

    def write(self, ticket: int, letters: Mapping[int, bytes]) -> None:
        """Put letters (reader -> bytes) where readers find them, in place of those before. Tickets grow.

        Raises:
            ValueError: there is no room for them.
        """
        rank = self._control.rank
        if (total := sum(map(len, letters.values()))) > self.room:
            raise ValueError(f"rank {rank} has letters of {total} bytes, and there is room for {self.room}")
        at = self._letters + rank * self._letters_size
        table, start = at // 8, at + 16 * len(self._everyone)
        for reader in self._everyone:
            letter = letters.get(reader, b"")
            self._words[table + 2 * reader], self._words[table + 2 * reader + 1] = start, len(letter)
            self._map[start : start + len(letter)] = letter
            start += len(letter)
        self.post(ticket, self.written)  # last: until then, there are none

    def letter(self, writer: int) -> bytes:
        """What `writer` wrote to this rank, empty if nothing, once it has posted its ticket in the lane `written`."""
        table = (self._letters + writer * self._letters_size) // 8 + 2 * self._control.rank
        start = self._words[table]
        return self._map[start : start + self._words[table + 1]]

    @property
    def written(self) -> int:
        """The lane of the tickets of letters."""
        return self._lanes + 1

    @property
    def _letters_size(self) -> int:
        """Of one rank: place and bytes of each of its letters, then these."""
        return 16 * len(self._everyone) + self.room

    # ---- failures

    def look(self, values: Mapping[int, int], phase: str, lane: int = 0) -> None:
        """Whether waiting for `values` still makes sense, for who waits by other means. Raises as `wait`."""
        self._control.raise_if_aborted(phase)
        ended = self._ended(self._late(values, lane))
        # Read again: a rank may say its last word and end between two looks.
        if late := self._late({rank: values[rank] for rank in ended}, lane):
            self._give_up("the process ended of", late, phase, lane)

    def check_alive(self, ranks: Iterable[int], phase: str) -> None:
        """For who waits for `ranks` by other means. Raises TransferError where the process of one ended."""
        if ended := self._ended(sorted(ranks)):
            names = ", ".join(map(self._control.world.describe, ended))
            raise TransferError(
                f"the process ended of {names}",
                rank=self._control.rank,
                phase=phase,
                remedy="look at those ranks' logs; remake the session",
            )

    def _ended(self, ranks: Iterable[int]) -> list[int]:
        """Those whose process ended; each process is looked at once."""
        processes = {self._processes[rank] for rank in ranks}
        gone = {(pid, since): shared_file.born(pid) != since for pid, since in processes}
        return [rank for rank in ranks if gone[self._processes[rank]]]

    def _late(self, values: Mapping[int, int], lane: int) -> dict[int, int]:
        return {rank: value for rank, value in values.items() if self.seen(rank, lane) < value}

    def close(self) -> None:
        """Unmap; idempotent."""
        self._words.release()
        self._map.close()
        self._file.close()

    def _at(self, rank: int, lane: int) -> int:
        """Behind the lanes of a rank: the number of meetings that it came to, the ticket of its letters, and two places
        for words that it brought to meetings."""
        assert 0 <= lane <= self.written, f"lane {lane} of {self._lanes}"
        return rank * self._width + lane

    def _give_up(self, what: str, late: Mapping[int, int], phase: str, lane: int) -> None:
        world = self._control.world
        names = ", ".join(
            f"{world.describe(rank)}, which said {self.seen(rank, lane)} of {value}" for rank, value in late.items()
        )
        raise TransferError(
            f"{what} {names or 'what this rank does itself'}",
            rank=self._control.rank,
            phase=phase,
            remedy="look at those ranks' logs: they died, hang, or never called this refit; remake the session",
        )


def _width(lanes: int) -> int:
    """Words from one rank's first to the next one's."""
    return -(-(lanes + 2 + 2 * MOST_WORDS) // _LINE) * _LINE


def _size(control: Control, lanes: int) -> int:
    """Bytes without letters: what each rank says, then what they decided."""
    return (control.world.size * _width(lanes) + 2 * _RECORD) * 8
