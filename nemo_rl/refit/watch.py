"""What a rank does of the comparison of one refit (`verify.py`) while bytes move."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from nemo_rl.refit.control import Control
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import VerificationError
from nemo_rl.refit.layout import Holding
from nemo_rl.refit.verify import Verifier

_ASK_S, _ASK_SHARE = 1e-4, 1 / 16
"""Between two questions to the store whether all trainers ended their first look: at least so long, and a share of what
the transfer took so far."""


class Watch:
    """One rank's looks at sources in one refit, and what trainers say of them; every rank makes one each time.

    Args:
        verifier: of the plan.
        control: of the session.
        holdings: what this rank looks at; None on a rank that is no trainer.
        first: its first look; None where it has not looked yet.

    Attributes:
        expected: see `Verifier.expected`; None until trainers were heard.
    """

    def __init__(
        self, verifier: Verifier, control: Control, holdings: Sequence[Holding] | None, first: Ledger | None = None
    ) -> None:
        self._verifier, self._control, self._holdings = verifier, control, holdings
        if holdings is not None:
            verifier.follow()  # whatever changed the source before this refit, the second look sees it
        self._first = first
        self._second: Ledger | None = None
        self._held: np.ndarray | None = None  # what the first look saw
        self._again: np.ndarray | None = None  # and the second
        self._said: Mapping[int, bytes] | None = None
        self.expected: np.ndarray | None = None
        self._ticket, self._started_s, self._next_s = control.ticket(), time.monotonic(), 0.0

    def look(self) -> None:
        """Take the first look, if it was not taken; does not wait."""
        if self._first is None and self._holdings is not None:
            self._first = self._verifier.look(self._holdings)

    def step(self) -> None:
        """Go on as far as is possible without waiting; called as often as one likes, it seldom asks the store."""
        if self._said is not None:
            if self._second is not None and self._again is None and self._second.fetched:
                self._again = self._second.read()
            return
        self.look()
        if self._first is not None and self._held is None:
            if not self._first.fetched:
                return
            self._say(self._first)
        if self._control.board is None:
            if (now := time.monotonic()) < self._next_s:
                return
            self._next_s = now + max(_ASK_S, (now - self._started_s) * _ASK_SHARE)
        if self._control.posted(self._ticket, self._verifier.trainers):
            self._go_on()

    def check(self, bulk: Ledger, misc: Ledger) -> None:
        """Compare; every rank calls it after the transfer, with ledgers as for `Verifier.differences`.

        Raises:
            VerificationError: what changed in this rank's source or differs on this rank.
        """
        looks, said = self.finish()
        wrong = [] if looks is None or np.array_equal(*looks) else self._verifier.changes(*looks)
        if self.expected is None or not bulk.taken.all() or not np.array_equal(bulk.read(), self.expected):
            wrong += self._verifier.differences(said, looks and looks[0], bulk, misc)
        if wrong:
            shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise VerificationError(
                f"{len(wrong)} pieces differ: {shown}",
                rank=self._control.rank,
                phase="verify",
                remedy="the version was not committed; find what wrote these bytes, then remake the session and refit",
            )

    def finish(self) -> tuple[tuple[np.ndarray, np.ndarray] | None, Mapping[int, bytes]]:
        """What both looks of this rank saw, None on a rank that is no trainer; and what trainers say to this rank.

        Raises as `Control.gather`.
        """
        self.look()
        if self._first is not None:
            self._say(self._first)
        if self._said is None:
            self._control.await_posts(self._ticket, "verify", self._verifier.trainers)  # where `step` may go on already
        if self._said is None:
            self._go_on()
        assert self._said is not None
        self._control.end(self._ticket)
        if self._held is None or self._second is None:
            return None, self._said
        if self._again is None:
            self._again = self._second.read(self._control.deadline_s)
        return (self._held, self._again), self._said

    def _go_on(self) -> None:
        """All trainers have said what their first look saw: look again, and hear them."""
        if self._holdings is not None:
            self._second = self._verifier.look(self._holdings)
        self._said = self._control.collect(self._ticket, "verify", self._verifier.peers)
        self.expected = self._verifier.expected(self._said, self._held)

    def _say(self, first: Ledger) -> None:
        """What the first look saw, told once to all ranks that compare something with it."""
        if self._held is None:
            self._held = first.read(self._control.deadline_s)
            self._control.post(self._ticket, self._verifier.statements(self._held))
