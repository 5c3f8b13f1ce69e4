"""Which pieces of a refit arrived as the trainers hold them: digests of both ends, compared copy by copy.

What is compared:
- every copy that landed, with what its trainer held when the refit began;
- what a trainer holds after the transfer, with what it held when the refit began: a source that changes meanwhile
  would hand out pieces of two versions;
- trainer replicas with each other: where they differ, no generator can be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.layout import Holding, Layout
from nemo_rl.refit.packed import pack, unpack
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


@dataclass(frozen=True, eq=False)
class Replicas:
    """Source rows whose box an earlier trainer (`first_rank`, `first_row`) holds too."""

    first_rank: np.ndarray
    first_row: np.ndarray
    rank: np.ndarray
    row: np.ndarray

    @classmethod
    def of(cls, plan: RefitPlan, sources: Mapping[int, Layout]) -> Replicas:
        """Boxes that are equal; boxes that merely overlap are not compared."""
        index = {name: i for i, name in enumerate(plan.table)}
        ndim = max((len(m.shape) for m in plan.table.values()), default=0)
        held = Boxes.of(sources, index, ndim)
        key = np.column_stack([held.tensor, held.offsets, held.sizes])
        _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
        first = first[group.reshape(-1)]
        rows = np.flatnonzero(first != np.arange(len(held)))
        first = first[rows]
        return cls(held.rank[first], held.row[first], held.rank[rows], held.row[rows])


@dataclass(frozen=True, eq=False)
class _Sent:
    """Copies that one rank sends, in the plan's order: number of the piece, receiving rank."""

    number: np.ndarray
    to: np.ndarray


class Verifier:
    """One rank's part in the comparison of one plan's refits."""

    def __init__(self, plan: RefitPlan, rank: int, sources: Mapping[int, Layout]) -> None:
        self._plan, self._rank, self._source = plan, rank, sources.get(rank)
        self._replicas = Replicas.of(plan, sources)
        self._pieces: list[tuple[int, Region]] = []  # of the source: row and region; equal ones are read once
        self._numbers: dict[tuple[int, Region], int] = {}
        self._bulk, self._misc = self._note_copies(plan.bulk), self._note_copies(plan.misc)
        self._rows = {row: self._note(row, sources[rank].region(row)) for row in self._shared_rows()}

    def _note(self, row: int, region: Region) -> int:
        if (row, region) not in self._numbers:
            self._numbers[row, region] = len(self._pieces)
            self._pieces.append((row, region))
        return self._numbers[row, region]

    def _note_copies(self, copies: CopyTable) -> _Sent:
        mine = np.flatnonzero(copies.src_rank == self._rank)
        numbers = [self._note(int(copies.src_row[i]), self._plan.region(copies, i)) for i in mine.tolist()]
        return _Sent(np.array(numbers, np.int64), copies.dst_rank[mine])

    def _shared_rows(self) -> list[int]:
        own, first = self._replicas.rank == self._rank, self._replicas.first_rank == self._rank
        rows: list[int] = [*self._replicas.row[own].tolist(), *self._replicas.first_row[first].tolist()]
        return rows

    def look(self, holdings: Sequence[Holding]) -> np.ndarray:
        """Digests of all that this rank sends or shares with other trainers; int64, one a piece."""
        ledger = Ledger(len(self._pieces))
        for number, (row, region) in enumerate(self._pieces):
            holding = holdings[row]
            ledger.take(number, holding.view[region.slices_in(holding.region)], region)
        return ledger.read()

    def changes(self, before: np.ndarray, after: np.ndarray) -> list[str]:
        """Pieces of this rank's source that are not what they were when the refit began."""
        assert self._source is not None
        return [
            f"{self._source.fqn(row)} {region}: {self._plan.world.describe(self._rank)} held digest {before[n]} when "
            f"the refit began and {after[n]} after the transfer"
            for n, (row, region) in enumerate(self._pieces)
            if before[n] != after[n]
        ]

    def statements(self, held: np.ndarray) -> dict[int, bytes]:
        """What this trainer says to each rank that compares something with it."""
        world, replicas = self._plan.world, self._replicas
        readers = {*replicas.rank[replicas.first_rank == self._rank].tolist(), *self._bulk.to.tolist()}
        readers |= {*world.generators} if len(self._misc.number) else set()
        said = {}
        for peer in sorted(readers):
            shared = replicas.first_row[(replicas.first_rank == self._rank) & (replicas.rank == peer)]
            arrays = {
                "bulk": held[self._bulk.number[self._bulk.to == peer]],
                "misc": held[self._misc.number] if peer in world.generators else held[:0],
                "shared": held[[self._rows[row] for row in shared.tolist()]],
            }
            said[peer] = pack(None, arrays)
        return said

    @property
    def peers(self) -> tuple[int, ...]:
        """Trainers whose statements this rank compares with what it has."""
        plan = self._plan
        ranks = {*plan.bulk.src_rank[plan.bulk.dst_rank == self._rank].tolist()}
        ranks |= {*self._replicas.first_rank[self._replicas.rank == self._rank].tolist()}
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
        wrong = []
        for peer in self.peers:
            _, theirs = unpack(said[peer])
            wrong += self._unequal_replicas(peer, theirs["shared"], held)
            wrong += self._unequal(peer, self._plan.bulk, self._plan.bulk.dst_rank == self._rank, theirs["bulk"], bulk)
            if self._rank in self._plan.world.generators:
                everything = np.ones(len(self._plan.misc), bool)
                wrong += self._unequal(peer, self._plan.misc, everything, theirs["misc"], misc)
        return wrong

    def _unequal(self, peer: int, copies: CopyTable, due: np.ndarray, want: np.ndarray, landed: Ledger) -> list[str]:
        """Copies `due` on this rank, those from `peer`: one digest of `want` for each, in the plan's order."""
        mine = np.flatnonzero(due)
        numbers = np.flatnonzero(copies.src_rank[mine] == peer)
        if len(numbers) != len(want):
            return [f"{self._plan.world.describe(peer)} sent {len(want)} digests for {len(numbers)} copies"]
        got, taken = landed.read()[numbers], landed.taken[numbers]
        wrong = []
        for i in np.flatnonzero((got != want) | ~taken).tolist():
            copy = self._plan.copy(copies, int(mine[numbers[i]]))
            wrong.append(
                f"{copy.fqn} {copy.region}: {self._plan.world.describe(peer)} holds digest {want[i]}, "
                f"{self._plan.world.describe(self._rank)} has {got[i] if taken[i] else 'none'}"
            )
        return wrong

    def _unequal_replicas(self, peer: int, want: np.ndarray, held: np.ndarray | None) -> list[str]:
        rows = self._replicas.row[(self._replicas.rank == self._rank) & (self._replicas.first_rank == peer)]
        if len(rows) != len(want):
            return [f"{self._plan.world.describe(peer)} sent {len(want)} digests for {len(rows)} shared boxes"]
        if not len(rows):
            return []
        assert held is not None and self._source is not None
        got = held[[self._rows[row] for row in rows.tolist()]]
        return [
            f"{self._source.fqn(rows[i])} {self._source.region(rows[i])}: {self._plan.world.describe(peer)} holds "
            f"digest {want[i]}, its replica {self._plan.world.describe(self._rank)} {got[i]}"
            for i in np.flatnonzero(got != want).tolist()
        ]
