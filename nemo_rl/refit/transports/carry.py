"""Carries out the batches of one rank, refit after refit, and follows those that others move on its behalf."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from nemo_rl.refit.transports.board import Board
from nemo_rl.refit.transports.steps import Batch, Schedule

Done = Callable[[], bool]
_MOST_RUNNING = 4  # batches: enough to keep links full, few enough for calls that start copies never to wait
_ENOUGH = 2  # batches under way that leave time for something else
_CLOSELY_S = 1e-3  # of a refit: looks without a pause, once only the last step is left


class Carrier:
    """One rank's part in a schedule.

    A mover counts on the board, in the lane of each taker, the steps that are done as far as it is concerned, over all
    refits. A step landed where all that move a batch of it have counted it, however far others are.

    Args:
        board: with a lane for each rank.
        schedule: of all takers.
        rank: this one.
    """

    def __init__(self, board: Board, schedule: Schedule, rank: int) -> None:
        self._board, self._schedule, self._rank = board, schedule, rank
        self._mine = schedule.moved_by(rank)
        self._begins = {batch.taker: batch.step for batch in reversed(self._mine)}.items()  # first step for each taker
        self._after = _steps_after(schedule, self._mine)
        self._movers = {taker: schedule.movers_to(taker) for taker in schedule.num_steps}
        self._forwarders = {b.giver for b in self._mine} & schedule.forwarders
        self._refits = 0
        self._end = 0.0
        self._waiting: deque[int] = deque()
        self._running: deque[tuple[int, Done]] = deque()
        self._movers_of = [
            {schedule.mover(b) for b in schedule.batches if (b.taker, b.step) == (rank, step)}
            for step in range(schedule.num_steps.get(rank, 0))
        ]
        self._left: list[int] = []  # steps that are to land here
        self._counted: dict[int, int] = {}  # mover -> steps, when it was looked last

    def run(
        self,
        starts: Sequence[Callable[[], None]],
        mark: Callable[[], Done],
        landed: Callable[[int], None],
        idle: Callable[[], None],
        end: float,
    ) -> None:
        """One refit.

        Args:
            starts: start the batches that this rank moves, one each, in their order.
            mark: what tells whether all that was started before is done.
            landed: called with the number of each step that landed here, once each; those of one mover in order.
            idle: called while nothing can be started, and between two batches where starting one moves it.
            end: deadline (monotonic).

        Raises:
            TransferError: a rank ended or did not move its part in time, by name.
            RefitError: another rank reported a failure; its text.
        """
        self._end = end
        self._waiting, self._left, self._counted = deque(range(len(self._mine))), [*range(len(self._movers_of))], {}
        for taker, step in self._begins:
            self._board.post(self._first(taker) + step, taker)
        self._start(starts, mark, idle)  # before anything else: the link has nothing to do yet
        awaited = self._awaited()

        def done() -> bool:
            self._start(starts, mark, idle)
            self._tell()
            over = not self._waiting and not self._running and not self._late(awaited)
            self._take(landed)  # behind the look that ends it: what is said in between lands too
            if not over:
                idle()
            return over

        self._board.until(self._closely(done), awaited, "transfer", end)
        self._refits += 1

    def _closely(self, done: Done) -> Done:
        """`done`, looked at again and again where all but the last step is: what is seen late delays all ranks."""
        left_s = _CLOSELY_S

        def look() -> bool:
            nonlocal left_s
            started = time.monotonic()
            while not (over := done()) and self._last_step_left and time.monotonic() < started + left_s:
                os.sched_yield()
            if self._last_step_left:
                left_s -= time.monotonic() - started
            return over

        return look

    @property
    def _last_step_left(self) -> bool:
        return not self._waiting and len(self._running) <= 1 and len(self._left) <= 1

    def _start(self, starts: Sequence[Callable[[], None]], mark: Callable[[], Done], idle: Callable[[], None]) -> None:
        """Whatever the givers of the next batches have; batches keep their order.

        Nothing behind the deadline: a process that was stopped must not write into engines that others gave up.
        """
        while self._waiting and len(self._running) < _MOST_RUNNING and time.monotonic() < self._end:
            number = self._waiting[0]
            batch = self._mine[number]
            if batch.giver in self._forwarders and self._seen(batch.giver) <= batch.step:
                return
            starts[number]()
            self._running.append((self._waiting.popleft(), mark()))
            self._tell()
            if not 0 < len(self._running) < _ENOUGH:  # otherwise the link is what has nothing to do soon
                idle()

    def _tell(self) -> None:
        while self._running and self._running[0][1]():
            number, _ = self._running.popleft()
            taker = self._mine[number].taker
            self._board.post(self._first(taker) + self._after[number], taker)

    def _take(self, landed: Callable[[int], None]) -> None:
        if not self._left:
            return
        first = self._first(self._rank)
        counted = {mover: self._board.seen(mover, self._rank) - first for mover in self._movers[self._rank]}
        if counted == self._counted:
            return
        self._counted = counted
        there = [step for step in self._left if all(counted[mover] > step for mover in self._movers_of[step])]
        for step in there:
            landed(step)
            self._left.remove(step)

    def _first(self, taker: int) -> int:
        return self._refits * self._schedule.num_steps[taker]

    def _seen(self, taker: int) -> int:
        """Steps of this refit that landed in `taker` with all before them."""
        counts = [self._board.seen(mover, taker) for mover in self._movers[taker]]
        return min(min(counts) - self._first(taker), self._schedule.num_steps[taker])

    def _late(self, awaited: Mapping[int, Mapping[int, int]]) -> bool:
        return any(
            self._board.seen(rank, lane) < value for lane, values in awaited.items() for rank, value in values.items()
        )

    def _awaited(self) -> Mapping[int, Mapping[int, int]]:
        """Lane -> mover -> what it says in the end: of steps that land here, and of those that are read from here."""
        lanes = {self._rank} & set(self._movers) | self._forwarders
        lanes |= {b.taker for b in self._schedule.batches if b.giver == self._rank != self._schedule.mover(b)}
        return {
            lane: {m: self._first(lane) + self._schedule.num_steps[lane] for m in self._movers[lane]}
            for lane in sorted(lanes)
        }


def _steps_after(schedule: Schedule, mine: Sequence[Batch]) -> list[int]:
    """Steps of its taker that are done, as far as the mover is concerned, once each of `mine` and those before are."""
    following = dict(schedule.num_steps)
    found = []
    for batch in reversed(mine):
        found.append(following[batch.taker])
        following[batch.taker] = batch.step
    return found[::-1]
