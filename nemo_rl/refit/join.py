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
    """Cut the sources' boxes into disjoint cells. Equal boxes (replicas) become one cell with several owners."""
    key = np.column_stack([held.tensor, held.offsets, held.sizes])
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    unique = held.take(first)
    rows_a, rows_b, _, _ = overlaps(unique, unique)
    crossing = np.unique(unique.tensor[rows_a[rows_a != rows_b]])
    if len(crossing):
        return _refined_cells(held, crossing)
    order = np.argsort(inverse, kind="stable")
    start = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
    return _Cells(unique, start, order)


def _refined_cells(held: Boxes, crossing: np.ndarray) -> _Cells:
    """As `_cells`, where boxes of the tensors in `crossing` overlap without being equal: cut along every border."""
    plain = np.flatnonzero(~np.isin(held.tensor, crossing))
    parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    for tensor in crossing:
        rows = np.flatnonzero(held.tensor == tensor)
        low, high = held.offsets[rows], held.offsets[rows] + held.sizes[rows]
        cuts = [np.unique(np.concatenate([low[:, d], high[:, d]])) for d in range(low.shape[1])]
        grid = np.stack(np.meshgrid(*[np.arange(max(len(c) - 1, 0)) for c in cuts], indexing="ij"), -1)
        for cell in grid.reshape(-1, low.shape[1]):
            start = np.array([cuts[d][i] for d, i in enumerate(cell)])
            end = np.array([cuts[d][i + 1] for d, i in enumerate(cell)])
            owners = rows[((low <= start) & (end <= high)).all(axis=1)]
            if len(owners):
                parts.append((int(tensor), start, end - start, owners))
    cut = Boxes(
        np.array([p[0] for p in parts], np.int64),
        np.stack([p[1] for p in parts]),
        np.stack([p[2] for p in parts]),
        *(np.array([getattr(held, f)[p[3][0]] for p in parts], np.int64) for f in ("rank", "row", "unit")),
    )
    if not len(plain):
        sizes = np.array([len(p[3]) for p in parts])
        return _Cells(cut, np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([p[3] for p in parts]))
    rest = _cells(held.take(plain))
    counts = np.concatenate([np.diff(rest.start), [len(p[3]) for p in parts]])
    boxes = Boxes(*(np.concatenate([getattr(rest.boxes, f), getattr(cut, f)]) for f in Boxes.__dataclass_fields__))
    owners = np.concatenate([plain[rest.owner_rows], *(p[3] for p in parts)])
    return _Cells(boxes, np.concatenate([[0], np.cumsum(counts)]), owners)


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
