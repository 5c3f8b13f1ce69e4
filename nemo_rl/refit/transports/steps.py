"""The steps in which copies between mapped memories go: who moves what, in which order, and who waits for it.

What lands in place at a rank (its taker) comes in numbered steps. Of each step, every giver has a batch, moved in one
go by its mover: the giver, where memory is written faster than read and the taker's memory can be shown to others, else
the taker. Givers that are generators forward what landed in them in the step of the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.relay import Relay

MOST_STEPS = 16
"""Of a group, but for the taker's last steps: what landed is digested step by step."""
_LESS = 4
"""The last steps are each so many times smaller than the one before, as digests are faster than links: when the last
one landed, only its own digests are left."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Copies that one rank gives another in one step; `turn` is the place among all that their mover moves."""

    giver: int
    taker: int
    step: int
    turn: tuple[int, int, int]
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class Schedule:
    """All batches of one plan that concern one rank.

    Attributes:
        written: takers that givers write to; all others read.
        batches: of the takers of this rank and of the takers that it waits for; in order of turns.
        num_steps: taker -> steps of one refit.
        forwarders: generators that give what landed in them.
    """

    written: Set[int]
    batches: tuple[Batch, ...]
    num_steps: Mapping[int, int]
    forwarders: Set[int]

    @classmethod
    def of(cls, copies: CopyTable, staged: np.ndarray, relay: Relay, written: Set[int], step_bytes: int) -> Schedule:
        """Of all takers, from what all ranks know.

        Args:
            copies: with givers for senders.
            staged: which copies do not land in place; their messages go otherwise.
        """
        pairing, message = _pairings(copies), copies.message_of
        plain = np.flatnonzero(np.bincount(message, staged, len(copies.messages))[message] == 0)
        found = [
            batch
            for taker in np.unique(copies.dst_rank[plain]).tolist()
            for batch in _of_taker(
                copies, plain[copies.dst_rank[plain] == taker], taker, relay, pairing, message, step_bytes
            )
        ]
        num_steps: dict[int, int] = {}
        for batch in found:
            num_steps[batch.taker] = max(num_steps.get(batch.taker, 0), batch.step + 1)
        return cls(written, tuple(sorted(found, key=lambda batch: batch.turn)), num_steps, frozenset(relay.num_steps))

    def mover(self, batch: Batch) -> int:
        return batch.giver if batch.taker in self.written else batch.taker

    def moved_by(self, rank: int) -> list[Batch]:
        return [batch for batch in self.batches if self.mover(batch) == rank]

    def movers_to(self, taker: int) -> list[int]:
        """Who tells of steps that landed in `taker`."""
        return sorted({self.mover(batch) for batch in self.batches if batch.taker == taker})


def _of_taker(
    copies: CopyTable,
    mine: np.ndarray,
    taker: int,
    relay: Relay,
    pairing: np.ndarray,
    message: np.ndarray,
    step_bytes: int,
) -> list[Batch]:
    """Batches of one taker: rounds that pair all ranks alike go together, so that ranks seldom change their peer."""
    order = np.lexsort((mine, pairing[message[mine]]))
    mine = mine[order]
    step = relay.step[mine]
    if taker not in relay.num_steps:
        step = _cut(pairing[message[mine]], relay.num_bytes[mine], step_bytes)
    key = np.column_stack([step, copies.src_rank[mine]])
    found = []
    for number, giver in np.unique(key, axis=0).tolist():
        indices = mine[(key == (number, giver)).all(axis=1)]
        first = 0 if taker in relay.num_steps else int(pairing[message[indices[0]]])
        found.append(Batch(giver, taker, number, (first, number, taker), indices))
    return found


def _cut(group: np.ndarray, num_bytes: np.ndarray, step_bytes: int) -> np.ndarray:
    """Number of the step of each copy: runs of one group, each in at most `MOST_STEPS` parts of about equal bytes, of
    which the last run's last part is cut once more, as `_LESS` says."""
    step = np.zeros(len(group), np.int64)
    first, numbers = 0, np.unique(group)
    for number in numbers:
        here = np.flatnonzero(group == number)
        middle = np.cumsum(num_bytes[here]) - num_bytes[here] // 2
        ends = _ends(int(num_bytes[here].sum()), step_bytes, last=number == numbers[-1])
        part = np.searchsorted(ends, middle, side="right")
        step[here] = first + np.unique(part, return_inverse=True)[1].reshape(-1)
        first = int(step[here].max()) + 1
    return step


def _ends(total: int, step_bytes: int, last: bool) -> list[float]:
    """Bytes at which all but the last of a run's steps end."""
    count = min(MOST_STEPS, max(1, total // step_bytes))
    size = total / count
    ends = [size * i for i in range(1, count)]
    while last and size > 2 * step_bytes:
        size /= _LESS
        ends.append(total - size)
    return ends


def _pairings(copies: CopyTable) -> np.ndarray:
    """Of each message, the number of its round's pairing: rounds that pair all ranks alike have one number."""
    rounds: dict[int, list[tuple[int, int]]] = {}
    for number, src, dst in copies.messages[:, :3].tolist():
        rounds.setdefault(number, []).append((src, dst))
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    known = {n: numbers.setdefault(tuple(sorted(rounds[n])), len(numbers)) for n in sorted(rounds)}
    return np.array([known[n] for n in copies.messages[:, 0].tolist()], np.int64)
