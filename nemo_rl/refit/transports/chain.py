"""A generator's place in a chain of replicas: each step follows the giver's, and is told to whoever reads from here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nemo_rl.refit.transports.board import Board


class Chain:
    """Runs the steps of one rank, refit after refit; ranks of a chain have as many steps each.

    Attributes:
        giver: generator whose steps this rank's follow; None where it reads from trainers.

    Args:
        board: of the session. A rank posts the steps that it finished in all refits.
        rank: this one.
        num_steps: of a refit.
    """

    def __init__(self, board: Board, rank: int, giver: int | None, num_steps: int) -> None:
        self._board, self._rank, self.giver, self._num_steps = board, rank, giver, num_steps
        self._done = 0
        self._running: deque[Callable[[], bool]] = deque()

    def run(self, start: Callable[[int], None], mark: Callable[[], Callable[[], bool]], end: float) -> None:
        """All steps of one refit.

        Args:
            start: starts what a step reads; called as soon as the giver finished that step.
            mark: what tells whether all that was started before is done.
            end: deadline (monotonic).

        Raises:
            TransferError: the giver ended or did not finish a step in time, by name.
            RefitError: another rank reported a failure; its text.
        """
        first = self._done
        for step in range(self._num_steps):
            if self.giver is not None:
                self._board.wait({self.giver: first + step + 1}, "transfer", end, meanwhile=self._tell)
            start(step)
            self._running.append(mark())
            self._tell()
        self._board.wait({self._rank: first + self._num_steps}, "transfer", end, meanwhile=self._tell)

    def _tell(self) -> None:
        """Post the steps that are done."""
        before = self._done
        while self._running and self._running[0]():
            self._running.popleft()
            self._done += 1
        if self._done > before:
            self._board.post(self._done)
