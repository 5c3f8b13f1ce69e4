"""The join: every destination box cut along the sources' cells, each piece with the owner that sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.boxes import Boxes, overlaps
from nemo_rl.refit.layout import Layout


@dataclass(frozen=True, eq=False)
class Takers:
    """Destinations: `ranks[i]` takes the boxes whose `rank` column is `kind[i]`; replicas are of one kind."""

    ranks: np.ndarray
    kind: np.ndarray
    boxes: Boxes
    own: Mapping[int, int]
    """kind -> rank, of kinds that one rank has for itself because it holds sources too"""

    @classmethod
    def of(
        cls,
        layouts: Mapping[int, Layout],
        shared: tuple[int, ...],
        index: Mapping[str, int],
        ndim: int,
        keep: np.ndarray,
    ) -> Takers:
        """Layouts that are one object are one kind, except on ranks in `shared`, which are trainers too."""
        kinds: dict[tuple[int, int], int] = {}
        ranks = sorted(layouts)
        keys = [(id(layouts[r]), r if r in shared else -1) for r in ranks]
        kind = np.array([kinds.setdefault(key, len(kinds)) for key in keys], np.int64)
        distinct = {k: layouts[r] for k, r in zip(kind.tolist(), ranks, strict=True)}
        own = {kinds[key]: key[1] for key in keys if key[1] >= 0}
        return cls(np.array(ranks, np.int64), kind, Boxes.of(distinct, index, ndim, keep), own)

    def only(self, rows: np.ndarray) -> Takers:
        return Takers(self.ranks, self.kind, self.boxes.take(rows), self.own)

    def num_bytes(self, item: np.ndarray) -> np.ndarray:
        """Bytes that each destination takes."""
        volume = self.boxes.sizes.prod(axis=1) * item[self.boxes.tensor]
        by_kind = np.bincount(self.boxes.rank, volume, int(self.kind.max(initial=0)) + 1)
        total: np.ndarray = by_kind.astype(np.int64)[self.kind]
        return total


@dataclass(frozen=True, eq=False)
class Cells:
    """Disjoint boxes of the sources and who owns each: rows `owner[start[i] : start[i + 1]]` of `held` own cell i.

    Ordered by tensor, then by place; owners by rank, each rank once.
    """

    held: Boxes
    boxes: Boxes
    start: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, held: Boxes) -> Cells:
        """Cut the sources' boxes along every border of their tensor."""
        rows, places, low, sizes = _cut_everywhere(held)
        order = np.lexsort((rows, held.rank[rows], *places.T[::-1], held.tensor[rows]))
        rows, places = rows[order], places[order]
        new = np.ones(len(rows), bool)
        new[1:] = (held.tensor[rows[1:]] != held.tensor[rows[:-1]]) | (places[1:] != places[:-1]).any(axis=1)
        first = np.flatnonzero(new)
        b = held.take(rows[first])
        boxes = Boxes(b.tensor, low[order][first], sizes[order][first], b.rank, b.row, b.unit)
        again = np.flatnonzero(~new[1:] & (held.rank[rows[1:]] == held.rank[rows[:-1]])) + 1
        kept = np.ones(len(rows), bool)
        kept[again] = False
        start = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([first, [len(rows)]])]
        return cls(held, boxes, start, rows[kept])

    def take(self, cells: np.ndarray) -> Cells:
        count = np.diff(self.start)[cells]
        start = np.concatenate([[0], np.cumsum(count)])
        return Cells(self.held, self.boxes.take(cells), start, self.owner[runs(self.start[cells], count)])

    def groups(self) -> np.ndarray:
        """Number of each cell's set of owners, -1 where there is one owner."""
        count, ranks = np.diff(self.start), self.held.rank[self.owner]
        group, known = np.full(len(count), -1, np.int64), 0
        for num in np.unique(count[count > 1]).tolist():
            cells = np.flatnonzero(count == num)
            sets = ranks[self.start[cells][:, None] + np.arange(num)]
            order = np.lexsort(sets.T)
            new = np.concatenate([[False], (sets[order][1:] != sets[order][:-1]).any(axis=1)])
            group[cells[order]] = known + np.cumsum(new)
            known = int(group.max()) + 1
        return group

    def owned_by(self, cell: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Position in `owner` of each (cell, rank), or -1 where the rank does not own the cell."""
        width = int(max(self.held.rank.max(initial=0), rank.max(initial=0))) + 1
        cells = np.repeat(np.arange(len(self.boxes)), np.diff(self.start))
        key, want = cells * width + self.held.rank[self.owner], cell * width + rank
        at = np.minimum(np.searchsorted(key, want), len(key) - 1)
        return np.where(key[at] == want, at, -1) if len(key) else np.full(len(want), -1)


def runs(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`start[0], start[0] + 1, ...` (count[0] of them), then those of the next run."""
    numbers: np.ndarray = np.repeat(start - np.cumsum(count) + count, count) + np.arange(int(count.sum()))
    return numbers


def _cut_everywhere(held: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, index of the interval between borders on each axis, offsets, sizes) of every part of every box."""
    rows, ends = np.arange(len(held)), held.offsets + held.sizes
    columns: list[np.ndarray] = []
    for axis in range(held.offsets.shape[1]):
        width = int(ends[:, axis].max(initial=0)) + 1
        start, end = (held.tensor * width + x[:, axis] for x in (held.offsets, ends))
        borders = np.unique(np.concatenate([start, end]))
        first = np.searchsorted(borders, start)
        count = np.searchsorted(borders, end) - first
        again = np.repeat(np.arange(len(rows)), count[rows])
        place = runs(first[rows], count[rows])
        rows = rows[again]
        columns = [c[again] for c in columns] + [place, borders[place] % width, borders[place + 1] % width]
    place, low, high = (np.stack(columns[i::3], 1) if columns else np.zeros((len(rows), 0), np.int64) for i in range(3))
    return rows, place, low, high - low


@dataclass(frozen=True, eq=False)
class Pieces:
    """Copies before they are packed into messages; `dst` is the position of the destination among the takers."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    src_rank: np.ndarray
    src_row: np.ndarray
    dst: np.ndarray
    dst_row: np.ndarray

    def take(self, rows: np.ndarray) -> Pieces:
        return Pieces(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    @classmethod
    def stack(cls, a: Pieces, b: Pieces) -> Pieces:
        return cls(*(np.concatenate([getattr(a, f), getattr(b, f)]) for f in cls.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class Join:
    """What each kind of destination takes from which cell, ordered by kind, row and cell, at most a bucket a piece.

    Which owner of a cell sends a piece: the destination itself where it owns the cell. Otherwise the owners share by
    bytes: what all destinations take of the cells that one set of ranks owns, destination after destination, is cut
    into one run of equal bytes for each owner, so that an owner serves few destinations. All of it depends on the cells
    of one set of owners alone, so that a rank can find out for itself.
    """

    takers: Takers
    cells: Cells
    kind_start: np.ndarray
    cell: np.ndarray
    tensor: np.ndarray
    row: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    num_bytes: np.ndarray
    fixed: np.ndarray
    """position in `cells.owner` of the one possible sender, or -1"""
    group: np.ndarray
    before: np.ndarray
    """bytes of the same kind and group in earlier pieces"""
    group_start: np.ndarray
    """bytes of (group, destination) that destinations with earlier turns take; the last column is the total"""

    @classmethod
    def of(cls, cells: Cells, takers: Takers, turns: np.ndarray, item: np.ndarray, bucket_bytes: int) -> Join:
        """`turns`: destinations in the order in which owners share them out. What no cell covers is left out."""
        cell, at, offsets, sizes = overlaps(cells.boxes, takers.boxes)
        again, offsets, sizes = _split(offsets, sizes, bucket_bytes // item[takers.boxes.tensor[at]])
        cell, at = cell[again], at[again]
        tensor, kind = takers.boxes.tensor[at], takers.boxes.rank[at]
        num_bytes = sizes.prod(axis=1) * item[tensor]
        fixed = np.where(np.diff(cells.start)[cell] == 1, cells.start[cell], -1)
        for own, rank in takers.own.items():
            rows = np.flatnonzero(kind == own)
            local = cells.owned_by(cell[rows], np.full(len(rows), rank))
            fixed[rows] = np.where(local >= 0, local, fixed[rows])
        group = np.where(fixed < 0, cells.groups()[cell], -1)
        num_kinds = int(takers.kind.max(initial=-1)) + 1
        before, taken = _running(group, kind, num_bytes, num_kinds)
        ends = np.cumsum(taken[:, takers.kind[turns]], axis=1)
        starts = np.pad(ends, ((0, 0), (0, 1)), "edge")
        starts[:, turns] = ends - taken[:, takers.kind[turns]]
        kind_start = np.searchsorted(kind, np.arange(num_kinds + 1))
        row = takers.boxes.row[at]
        return cls(
            takers, cells, kind_start, cell, tensor, row, offsets, sizes, num_bytes, fixed, group, before, starts
        )

    def count(self) -> np.ndarray:
        """Pieces of each destination."""
        number: np.ndarray = np.diff(self.kind_start)[self.takers.kind]
        return number

    def pieces(self, destinations: np.ndarray, src_rank: int | None = None) -> Pieces:
        """What `destinations` (positions among the takers) receive, from `src_rank` alone where one is given."""
        kind, count = self.takers.kind[destinations], self.count()[destinations]
        rows, dst = runs(self.kind_start[kind], count), np.repeat(destinations, count)
        owner = self._owners(rows, dst)
        sender = self.cells.held.rank[owner]
        if src_rank is not None:
            mine = np.flatnonzero(sender == src_rank)
            rows, dst, owner, sender = rows[mine], dst[mine], owner[mine], sender[mine]
        src_row = self.cells.held.row[owner]
        return Pieces(self.tensor[rows], self.offsets[rows], self.sizes[rows], sender, src_row, dst, self.row[rows])

    def _owners(self, rows: np.ndarray, dst: np.ndarray) -> np.ndarray:
        """Row of `cells.held` that sends each piece to its destination."""
        at, open_ = self.fixed[rows], np.flatnonzero(self.fixed[rows] < 0)
        rows, dst = rows[open_], dst[open_]
        group, cell = self.group[rows], self.cell[rows]
        twice = 2 * (self.group_start[group, dst] + self.before[rows]) + self.num_bytes[rows]
        num = np.diff(self.cells.start)[cell]
        at[open_] = self.cells.start[cell] + twice * num // (2 * self.group_start[group, -1])
        owner: np.ndarray = self.cells.owner[at]
        return owner


def _running(group: np.ndarray, kind: np.ndarray, num_bytes: np.ndarray, num_kinds: int) -> tuple[np.ndarray, ...]:
    """Bytes of the same kind and group in earlier pieces, and the total of every (group, kind)."""
    num_groups = int(group.max(initial=-1)) + 1
    before = np.zeros(len(group), np.int64)
    rows = np.flatnonzero(group >= 0)
    key = kind[rows] * num_groups + group[rows]
    order = np.argsort(key, kind="stable")
    rows, key = rows[order], key[order]
    ends = np.cumsum(num_bytes[rows])
    new = np.concatenate([[True], key[1:] != key[:-1]])[: len(key)]
    base = (ends - num_bytes[rows])[new]
    before[rows] = ends - num_bytes[rows] - base[np.cumsum(new) - 1]
    total = np.zeros(num_groups * num_kinds, np.int64)
    total[key[new]] = np.diff(np.append(base, ends[-1:]))
    return before, total.reshape(num_kinds, num_groups).T


def _split(offsets: np.ndarray, sizes: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes cut to at most `limit` elements along their outermost axes: (index of the whole one, offsets, sizes)."""
    rows = np.arange(len(offsets))
    for axis in range(offsets.shape[1]):
        volume, length = sizes.prod(axis=1), sizes[:, axis]
        step = np.where(volume > limit[rows], np.maximum(1, limit[rows] * length // volume), length)
        count = -(-length // step)
        if (count == 1).all():
            continue
        again = np.repeat(np.arange(len(rows)), count)
        start = runs(np.zeros_like(count), count) * step[again]
        rows, offsets, sizes = rows[again], offsets[again], sizes[again]
        offsets[:, axis] += start
        sizes[:, axis] = np.minimum(step[again], sizes[:, axis] - start)
    return rows, offsets, sizes
