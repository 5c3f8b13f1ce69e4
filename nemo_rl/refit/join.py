"""The join: every destination box cut along the sources' cells, each piece with the owner that sends it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.boxes import Boxes, overlaps


@dataclass(frozen=True, eq=False)
class _Cells:
    """Disjoint boxes of the sources and who owns each: owners of cell i are `owner_rows[start[i]:start[i + 1]]`."""

    boxes: Boxes
    start: np.ndarray
    owner_rows: np.ndarray


def _cells(held: Boxes) -> _Cells:
    """Cut the sources' boxes along every border of their tensor. A cell that several boxes cover has several owners."""
    rows, places, low, sizes = _cut_everywhere(held)
    order = np.lexsort((rows, *places.T[::-1], held.tensor[rows]))
    rows, places = rows[order], places[order]
    new = np.ones(len(rows), bool)
    new[1:] = (held.tensor[rows[1:]] != held.tensor[rows[:-1]]) | (places[1:] != places[:-1]).any(axis=1)
    first = np.flatnonzero(new)
    boxes = held.take(rows[first])
    boxes = Boxes(boxes.tensor, low[order][first], sizes[order][first], boxes.rank, boxes.row, boxes.unit)
    return _Cells(boxes, np.concatenate([first, [len(rows)]]), rows)


def _cut_everywhere(held: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, index of the interval between borders on each axis, offsets, sizes) of every part of every box."""
    rows, ends = np.arange(len(held)), held.offsets + held.sizes
    places: list[np.ndarray] = []
    lows: list[np.ndarray] = []
    highs: list[np.ndarray] = []
    for axis in range(held.offsets.shape[1]):
        width = int(ends[:, axis].max(initial=0)) + 1
        start, end = (held.tensor * width + x[:, axis] for x in (held.offsets, ends))
        borders = np.unique(np.concatenate([start, end]))
        first = np.searchsorted(borders, start)
        count = np.searchsorted(borders, end) - first
        again = np.repeat(np.arange(len(rows)), count[rows])
        step = np.arange(len(again)) - np.repeat(np.cumsum(count[rows]) - count[rows], count[rows])
        rows = rows[again]
        place = first[rows] + step
        places = [p[again] for p in places] + [place]
        lows = [x[again] for x in lows] + [borders[place] % width]
        highs = [x[again] for x in highs] + [borders[place + 1] % width]
    low, high, place = (np.stack(x, 1) if x else np.zeros((len(rows), 0), np.int64) for x in (lows, highs, places))
    return rows, place, low, high - low


@dataclass(frozen=True, eq=False)
class Pieces:
    """The join before it is cut into messages: one row a copy."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    src_rank: np.ndarray
    src_row: np.ndarray
    dst_rank: np.ndarray
    dst_row: np.ndarray

    def take(self, rows: np.ndarray) -> Pieces:
        return Pieces(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def num_bytes(self, item: np.ndarray) -> np.ndarray:
        total: np.ndarray = self.sizes.prod(axis=1) * item[self.tensor]
        return total


def join(held: Boxes, taken: Boxes, item: np.ndarray) -> Pieces:
    """Every destination box cut along the sources' cells, each piece with the owner that sends it."""
    used = np.isin(held.tensor, np.unique(taken.tensor))
    held = held.take(np.flatnonzero(used))
    cells = _cells(held)
    cell, dst, offsets, sizes = overlaps(cells.boxes, taken)
    nbytes = sizes.prod(axis=1) * item[taken.tensor[dst]]
    owner = _choose_owners(cells, cell, held.rank, taken.rank[dst], nbytes)
    return Pieces(taken.tensor[dst], offsets, sizes, held.rank[owner], held.row[owner], taken.rank[dst], taken.row[dst])


def _choose_owners(
    cells: _Cells, cell: np.ndarray, rank_of: np.ndarray, dst_rank: np.ndarray, nbytes: np.ndarray
) -> np.ndarray:
    """The row that sends each piece: the destination's own where it has one, else replicas share by bytes.

    Pieces of one set of replicas, ordered by destination, are cut into one run of equal bytes for each replica, so
    that a replica serves as few destinations as it can.
    """
    sets: dict[bytes, int] = {}
    set_of_cell = np.empty(len(cells.boxes), np.int64)
    for i in range(len(cells.boxes)):
        owners = rank_of[cells.owner_rows[cells.start[i] : cells.start[i + 1]]]
        set_of_cell[i] = sets.setdefault(owners.tobytes(), len(sets))
    group = set_of_cell[cell]
    order = np.lexsort((cell, dst_rank, group))
    total = np.bincount(group, nbytes, minlength=len(sets)) if len(group) else np.zeros(len(sets))
    running = np.cumsum(nbytes[order])
    starts = np.concatenate([[0], np.cumsum(total)])[group[order]]
    middle = running - starts - nbytes[order] / 2
    count = (cells.start[1:] - cells.start[:-1])[cell[order]]
    pick = np.minimum((middle * count / np.maximum(total[group[order]], 1)).astype(np.int64), count - 1)
    chosen = np.empty(len(cell), np.int64)
    chosen[order] = cells.owner_rows[cells.start[cell[order]] + pick]
    for i in np.flatnonzero(np.isin(dst_rank, rank_of)):
        own = cells.owner_rows[cells.start[cell[i]] : cells.start[cell[i] + 1]]
        local = own[rank_of[own] == dst_rank[i]]
        chosen[i] = local[0] if len(local) else chosen[i]
    return chosen
