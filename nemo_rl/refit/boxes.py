"""Rows of many layouts as one set of boxes, and the pairs of boxes that meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.layout import Layout

_CHUNK = 1 << 21  # candidate pairs that are formed at a time


@dataclass(frozen=True, eq=False)
class Boxes:
    """Rows of several ranks' layouts in one index space: tensor ids are those of one global table."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(
        cls, layouts: Mapping[int, Layout], index: Mapping[str, int], ndim: int, keep: np.ndarray | None = None
    ) -> Boxes:
        """Stack `layouts` by rank. Rows with no bytes are left out, and those of tensors t where `keep[t]` is false."""
        ids: dict[int, np.ndarray] = {}
        parts = []
        for rank, layout in sorted(layouts.items()):
            if id(layout.names) not in ids:
                ids[id(layout.names)] = _ids(layout, index, keep)
            parts.append(cls._of_rank(rank, layout, ids[id(layout.names)], ndim))
        return cls.stack([p for p in parts if len(p)], ndim)

    @classmethod
    def _of_rank(cls, rank: int, layout: Layout, ids: np.ndarray, ndim: int) -> Boxes:
        tensor = ids[layout.tensor]
        rows = np.flatnonzero((tensor >= 0) & (layout.sizes > 0).all(axis=1))
        pad = ((0, 0), (0, ndim - layout.offsets.shape[1]))
        return cls(
            tensor[rows],
            np.pad(layout.offsets[rows], pad),
            np.pad(layout.sizes[rows], pad, constant_values=1),
            np.full(len(rows), rank, np.int64),
            rows,
            layout.unit[rows].astype(np.int64),
        )

    @classmethod
    def stack(cls, parts: list[Boxes], ndim: int) -> Boxes:
        """All rows of `parts`, in order."""
        flat, box = np.zeros(0, np.int64), np.zeros((0, ndim), np.int64)
        parts = parts or [cls(flat, box, box, flat, flat, flat)]
        return cls(*(np.concatenate(c) for c in zip(*map(cls._columns, parts), strict=True)))

    def _columns(self) -> list[np.ndarray]:
        return [getattr(self, f) for f in self.__dataclass_fields__]

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: np.ndarray) -> Boxes:
        return Boxes(*(column[rows] for column in self._columns()))


def _ids(layout: Layout, index: Mapping[str, int], keep: np.ndarray | None) -> np.ndarray:
    """Global id of each name of a layout; -1 where the name is unknown or not kept."""
    ids = np.array([index.get(n, -1) for n in layout.names], np.int64)
    return ids if keep is None or not len(ids) else np.where((ids >= 0) & keep[ids], ids, -1)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Per row of b, the rows of a that it may meet: `order[first : first + count]`."""

    order: np.ndarray
    first: np.ndarray
    count: np.ndarray


def overlaps(a: Boxes, b: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows of the same tensor whose boxes meet: (row of a, row of b, offsets, sizes).

    Pairs are ordered by row of b, then of a. Work and memory go with the pairs that meet along one axis, which is
    chosen per tensor to be the one that separates best; memory beyond the result is bounded.
    """
    rows_a, rows_b = [], []
    for candidates_a, candidates_b in _candidate_pairs(a, b):
        meet = np.ones(len(candidates_a), bool)
        for low_a, size_a, low_b, size_b in zip(a.offsets.T, a.sizes.T, b.offsets.T, b.sizes.T, strict=True):
            start_a, start_b = low_a[candidates_a], low_b[candidates_b]
            meet &= (start_a < start_b + size_b[candidates_b]) & (start_b < start_a + size_a[candidates_a])
        rows_a.append(candidates_a[meet])
        rows_b.append(candidates_b[meet])
    found_a, found_b = (np.concatenate(r) if r else np.zeros(0, np.int64) for r in (rows_a, rows_b))
    if ((found_b[1:] == found_b[:-1]) & (found_a[1:] < found_a[:-1])).any():
        order = np.lexsort((found_a, found_b))
        found_a, found_b = found_a[order], found_b[order]
    low = np.maximum(a.offsets[found_a], b.offsets[found_b])
    high = np.minimum(a.offsets[found_a] + a.sizes[found_a], b.offsets[found_b] + b.sizes[found_b])
    return found_a, found_b, low, high - low


def _candidate_pairs(a: Boxes, b: Boxes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs that meet along their tensor's best axis, a bounded number at a time."""
    if not len(a) or not len(b):
        return
    ways = [_along(a, b, axis) for axis in _cut_axes(a)]
    num = int(max(a.tensor.max(), b.tensor.max())) + 1
    cost = np.stack([np.bincount(b.tensor, way.count, num) for way in ways])
    best = cost.argmin(axis=0)[b.tensor]
    first, count = (np.choose(best, [getattr(w, f) for w in ways]) for f in ("first", "count"))
    ends = np.cumsum(count)
    start = 0
    while start < len(b):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, "right")))
        rows = np.repeat(np.arange(start, stop), count[start:stop])
        at = first[rows] + np.arange(len(rows)) - (ends[rows] - count[rows] - done)
        found = np.empty(len(rows), np.int64)
        for i, way in enumerate(ways):
            mine = slice(None) if len(ways) == 1 else best[rows] == i
            found[mine] = way.order[at[mine]]
        yield found, rows
        start = stop


def _cut_axes(boxes: Boxes) -> list[int]:
    """Axes along which some box does not start at 0; at least one axis (any, where there are none)."""
    return np.flatnonzero((boxes.offsets > 0).any(axis=0)).tolist() or [0]


def _along(a: Boxes, b: Boxes, axis: int) -> _Candidates:
    """Sort a along `axis`; a row of b may meet those that reach beyond its low end and start before its high end."""
    low_a, high_a, low_b, high_b = (*_ends(a, axis), *_ends(b, axis))
    width = int(max(high_a.max(), high_b.max())) + 1
    start, end = a.tensor * width + low_a, a.tensor * width + high_a
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(end[order])
    first = np.searchsorted(reach, b.tensor * width + low_b, "right")
    stop = np.searchsorted(start[order], b.tensor * width + high_b, "left")
    return _Candidates(order, first, np.maximum(stop - first, 0))


def _ends(boxes: Boxes, axis: int) -> tuple[np.ndarray, np.ndarray]:
    if not boxes.offsets.shape[1]:
        return np.zeros(len(boxes), np.int64), np.ones(len(boxes), np.int64)
    return boxes.offsets[:, axis], boxes.offsets[:, axis] + boxes.sizes[:, axis]


def colliding(boxes: Boxes) -> np.ndarray:
    """Tensor ids, ascending, of which two boxes meet (equal boxes included)."""
    left = np.ones(int(boxes.tensor.max()) + 1 if len(boxes) else 0, bool)
    for axis in _cut_axes(boxes) if len(boxes) else ():
        low, high = _ends(boxes, axis)
        width = int(high.max()) + 1
        order = np.argsort(boxes.tensor * width + low, kind="stable")
        tensor, low, high = boxes.tensor[order], low[order], high[order]
        meets = (tensor[1:] == tensor[:-1]) & (low[1:] < high[:-1])
        left &= np.bincount(tensor[1:][meets], minlength=len(left)) > 0
    rows = np.flatnonzero(left[boxes.tensor]) if left.any() else np.zeros(0, np.int64)
    suspects = boxes.take(rows)
    a, b, _, _ = overlaps(suspects, suspects)
    found: np.ndarray = np.unique(suspects.tensor[a[a < b]])
    return found
