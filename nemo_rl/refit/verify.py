"""Which pieces of a refit arrived as the trainers hold them: digests of both ends, compared copy by copy.

Trainers look at their sources twice in a refit, and no trainer begins its second look before all have ended their
first. What is compared:
- every copy that landed, with what the first look saw;
- the second look with the first;
- whatever several trainers hold, with each other: where they differ, no generator can be right.
So there is a moment, between all first looks and all second ones, at which all trainers held exactly what all
generators got. The looks may be taken while bytes move: a source that changes before a piece is read differs from what
landed, or from itself; one that changes behind the second look and behind the last read changed nothing that landed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nemo_rl.refit.boxes import Boxes, overlaps
from nemo_rl.refit.device import aside, follow
from nemo_rl.refit.digest import Ledger, Piece, Pieces
from nemo_rl.refit.layout import Holding, Layout
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


@dataclass(frozen=True, eq=False)
class Shared:
    """Boxes of travelling tensors that two rows of trainers hold: `row` of `rank` and `first_row` of `first_rank`.

    Columnar. Of rows with equal boxes, each is paired with the first; rows whose boxes meet without being equal are
    paired over what they have in common.
    """

    first_rank: np.ndarray
    first_row: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, plan: RefitPlan, sources: Mapping[int, Layout], rank: int) -> Shared:
        """What trainer `rank` shares, and what others share of the tensors that it holds; nothing for other ranks."""
        own = set(sources[rank].names) if rank in sources else set()
        near = {id(layout): not own.isdisjoint(layout.names) for layout in sources.values()}  # replicas are one object
        index = {name: i for i, name in enumerate(plan.table)}
        ndim = max((len(m.shape) for m in plan.table.values()), default=0)
        held = Boxes.of({r: layout for r, layout in sources.items() if near[id(layout)]}, index, ndim)
        travelling = np.union1d(plan.bulk.tensor, plan.misc.tensor)
        mine = np.array([index[name] for name in own], np.int64)
        held = held.take(np.flatnonzero(np.isin(held.tensor, np.intersect1d(travelling, mine))))
        key = np.column_stack([held.tensor, held.offsets, held.sizes])
        _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
        same = first[group.reshape(-1)]
        again = np.flatnonzero(same != np.arange(len(held)))
        distinct = held.take(first)
        a, b, offsets, sizes = overlaps(distinct, distinct)
        crossing = a < b
        one = np.concatenate([same[again], first[a[crossing]]])
        two = np.concatenate([again, first[b[crossing]]])
        offsets = np.concatenate([held.offsets[again], offsets[crossing]])
        sizes = np.concatenate([held.sizes[again], sizes[crossing]])
        return cls(held.rank[one], held.row[one], held.rank[two], held.row[two], held.tensor[one], offsets, sizes)


@dataclass(frozen=True, eq=False)
class _Own:
    """Pieces of this rank that a comparison takes, in an order that both ends know: number, and the other end."""

    number: np.ndarray
    peer: np.ndarray

    def with_peer(self, rank: int) -> np.ndarray:
        chosen: np.ndarray = self.number[self.peer == rank]
        return chosen


@dataclass(frozen=True, eq=False)
class _Landed:
    """Copies of a table that land here: numbers in the table; and peer -> which of them are from it."""

    copies: CopyTable
    index: np.ndarray
    of_peer: Mapping[int, np.ndarray]

    @classmethod
    def of(cls, copies: CopyTable, here: np.ndarray, peers: Iterable[int]) -> _Landed:
        index = np.flatnonzero(here)
        return cls(copies, index, {peer: np.flatnonzero(copies.src_rank[index] == peer) for peer in peers})


@dataclass(frozen=True, slots=True)
class Statement:
    """The digests that a trainer has for one rank, int64, each part in an order that both know: of bulk copies and of
    whole tensors that it sent, and of boxes that both hold. As bytes: how many of each, then the digests."""

    bulk: np.ndarray
    misc: np.ndarray
    shared: np.ndarray

    @staticmethod
    def head(*parts: np.ndarray) -> bytes:
        """What comes before the digests of `parts`."""
        return np.array([len(part) for part in parts], np.int64).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Statement:
        """Raises ValueError where the bytes are truncated or too many."""
        counts = np.frombuffer(data[: len(data) // 8 * 8], np.int64)[:3].tolist()
        if len(counts) != 3 or min(counts) < 0 or len(data) != 8 * (3 + sum(counts)):
            raise ValueError(f"{len(data)} bytes of digests do not decode")
        return cls(*np.split(np.frombuffer(data, np.int64, offset=24), np.cumsum(counts[:2])))


class Verifier:
    """One rank's part in the comparison of one plan's refits."""

    def __init__(self, plan: RefitPlan, rank: int, sources: Mapping[int, Layout], device: torch.device) -> None:
        self._plan, self._rank, self._source, self._device = plan, rank, sources.get(rank), device
        self._pieces: list[tuple[int, Region]] = []  # of the source: row and region; equal ones are read once
        self._numbers: dict[tuple[int, Region], int] = {}
        self._bulk, self._misc = self._note_copies(plan.bulk), self._note_copies(plan.misc)
        shared = Shared.of(plan, sources, rank)
        self._told = self._note_shared(shared, shared.first_rank, shared.first_row, shared.rank)
        self._asked = self._note_shared(shared, shared.rank, shared.row, shared.first_rank)
        self._looked: tuple[Sequence[Holding], dict[int, torch.Tensor]] | None = None
        self._ledgers: deque[Ledger] = deque(maxlen=2)
        layout = sources.get(rank)
        held = {} if layout is None else {row: layout.region(row) for row, _ in self._pieces}
        self._digests = Pieces([Piece(n, row, region, held[row]) for n, (row, region) in enumerate(self._pieces)])

    def _note(self, row: int, region: Region) -> int:
        if (row, region) not in self._numbers:
            self._numbers[row, region] = len(self._pieces)
            self._pieces.append((row, region))
        return self._numbers[row, region]

    def _note_copies(self, copies: CopyTable) -> _Own:
        mine = np.flatnonzero(copies.src_rank == self._rank)
        numbers = [self._note(int(copies.src_row[i]), self._plan.region(copies, i)) for i in mine.tolist()]
        return _Own(np.array(numbers, np.int64), copies.dst_rank[mine])

    def _note_shared(self, shared: Shared, rank: np.ndarray, row: np.ndarray, peer: np.ndarray) -> _Own:
        mine = np.flatnonzero(rank == self._rank)
        numbers = [self._note(int(row[i]), self._region(shared, i)) for i in mine.tolist()]
        return _Own(np.array(numbers, np.int64), peer[mine])

    def _region(self, shared: Shared, index: int) -> Region:
        ndim = len(self._plan.table[self._plan.names[shared.tensor[index]]].shape)
        return Region(tuple(shared.offsets[index, :ndim].tolist()), tuple(shared.sizes[index, :ndim].tolist()))

    def look(self, holdings: Sequence[Holding]) -> Ledger:
        """Start to digest all that this rank sends or holds like another row, and to bring it to the host, aside."""
        if self._looked is None or self._looked[0] is not holdings:
            self._looked = holdings, {row: holdings[row].view for row, _ in self._pieces}
        with aside(self._device):
            ledger = self._empty_ledger()
            self._digests.take(self._looked[1], ledger)
            ledger.fetch()
        return ledger

    def follow(self) -> None:
        """Looks from now on see all that the current stream was given."""
        follow(self._device)

    def tidy(self) -> None:
        """Nobody reads looks of this refit any more: the next one finds room for its own."""
        with aside(self._device):
            for ledger in self._ledgers:
                ledger.clear()

    def _empty_ledger(self) -> Ledger:
        """One of two, by turns, so that a look stands until the next but one."""
        if len(self._ledgers) < 2:
            ledger = Ledger(len(self._pieces))
        else:
            ledger = self._ledgers.popleft()
            ledger.clear()
        self._ledgers.append(ledger)
        return ledger

    def expected(self, said: Mapping[int, bytes], held: np.ndarray | None) -> np.ndarray | None:
        """The digests of bulk that shows no difference; None where a rank has more to compare, or a difference shows.

        Args:
            said, held: as for `differences`, which then tells.
        """
        bulk, misc = self._landing
        if len(misc.index):
            return None
        found = np.zeros(len(bulk.index), np.int64)
        for peer in self.peers:
            try:
                want = Statement.from_bytes(said[peer])
            except ValueError:
                return None
            numbers = bulk.of_peer[peer]
            if len(want.bulk) != len(numbers) or len(want.misc) or self._unequal_shared(peer, want.shared, held):
                return None
            found[numbers] = want.bulk
        return found

    def changes(self, before: np.ndarray, after: np.ndarray) -> list[str]:
        """Pieces of this rank's source that are not what they were when the refit began."""
        assert self._source is not None
        here, wrong = self._plan.world.describe(self._rank), []
        for n in np.flatnonzero(before != after).tolist():
            row, region = self._pieces[n]
            wrong.append(
                f"{self._source.fqn(row)} {region}: {here} held digest {before[n]} when the refit began and "
                f"{after[n]} later"
            )
        return wrong

    def statements(self, held: np.ndarray) -> dict[int, bytes]:
        """What this trainer says to each rank that compares something with it: a `Statement`."""
        return {peer: head + held[numbers].tobytes() for peer, (head, numbers) in self._addressed.items()}

    @property
    def statement_bytes(self) -> int:
        """Of all that this rank says in one refit."""
        return sum(len(head) + numbers.nbytes for head, numbers in self._addressed.values())

    @cached_property
    def _addressed(self) -> Mapping[int, tuple[bytes, np.ndarray]]:
        """Peer -> head of what this rank says to it, and the pieces whose digests follow."""
        everyone = self._plan.world.generators
        peers = np.union1d(self._bulk.peer, self._told.peer)
        if len(self._misc.number):
            peers = np.union1d(peers, everyone)
        addressed = {}
        for peer in peers.tolist():
            misc = self._misc.number if peer in everyone else self._misc.number[:0]
            parts = self._bulk.with_peer(peer), misc, self._told.with_peer(peer)
            addressed[peer] = Statement.head(*parts), np.concatenate(parts)
        return addressed

    @property
    def trainers(self) -> tuple[int, ...]:
        return self._plan.world.trainers

    @cached_property
    def _landing(self) -> tuple[_Landed, _Landed]:
        """Bulk and misc. What is gathered at the root is for all generators."""
        plan = self._plan
        whole = np.full(len(plan.misc), self._rank in plan.world.generators)
        return _Landed.of(plan.bulk, plan.bulk.dst_rank == self._rank, self.peers), _Landed.of(
            plan.misc, whole, self.peers
        )

    @cached_property
    def peers(self) -> tuple[int, ...]:
        """Trainers whose statements this rank compares with what it has."""
        plan = self._plan
        ranks = {*plan.bulk.src_rank[plan.bulk.dst_rank == self._rank].tolist()}
        ranks |= {*self._asked.peer.tolist()}
        if self._rank in plan.world.generators:
            ranks |= {*plan.misc.src_rank.tolist()}
        return tuple(sorted(ranks))

    def differences(self, said: Mapping[int, bytes], held: np.ndarray | None, bulk: Ledger, misc: Ledger) -> list[str]:
        """What differs on this rank from what `peers` say, each with parameter, region and both ranks.

        Args:
            said: trainer -> its statement to this rank.
            held: what this rank's own source held when the refit began; None on a rank that is no trainer.
            bulk, misc: what landed here, numbered by the copies of the plan that land here; one without a digest
                differs.
        """
        wrong: list[str] = []
        landed = (
            (self._landing[0], bulk.read(), bulk.taken),
            (self._landing[1], misc.read(), misc.taken),
        )
        for peer in self.peers:
            want = Statement.from_bytes(said[peer])
            wrong += self._unequal_shared(peer, want.shared, held)
            for sent, (mine, got, taken) in zip((want.bulk, want.misc), landed, strict=True):
                wrong += self._unequal(peer, sent, mine, got, taken)
        return wrong

    def _unequal(self, peer: int, want: np.ndarray, mine: _Landed, got: np.ndarray, taken: np.ndarray) -> list[str]:
        """Of copies `mine`, with digests `got`, those from `peer`; `want` has one digest for each, in order."""
        numbers = mine.of_peer[peer]
        if len(numbers) != len(want):
            return [f"{self._plan.world.describe(peer)} sent {len(want)} digests for {len(numbers)} copies"]
        got, taken = got[numbers], taken[numbers]
        wrong = []
        for i in np.flatnonzero((got != want) | ~taken).tolist():
            copy = self._plan.copy(mine.copies, int(mine.index[numbers[i]]))
            wrong.append(
                f"{copy.fqn} {copy.region}: {self._plan.world.describe(peer)} holds digest {want[i]}, "
                f"{self._plan.world.describe(self._rank)} has {got[i] if taken[i] else 'none'}"
            )
        return wrong

    def _unequal_shared(self, peer: int, want: np.ndarray, held: np.ndarray | None) -> list[str]:
        numbers = self._asked.with_peer(peer)
        if len(numbers) != len(want):
            return [f"{self._plan.world.describe(peer)} sent {len(want)} digests for {len(numbers)} shared boxes"]
        if held is None or self._source is None:
            return []
        got, wrong = held[numbers], []
        for i in np.flatnonzero(got != want).tolist():
            row, region = self._pieces[numbers[i]]
            wrong.append(
                f"{self._source.fqn(row)} {region}: {self._plan.world.describe(peer)} holds digest {want[i]}, its "
                f"replica {self._plan.world.describe(self._rank)} {got[i]}"
            )
        return wrong
