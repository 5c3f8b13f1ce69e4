"""Rows of many layouts as one set of boxes, and the pairs of boxes that meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.layout import Layout


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
    def of(cls, layouts: Mapping[int, Layout], index: Mapping[str, int], ndim: int, skip: Iterable[str] = ()) -> Boxes:
        """Stack `layouts` by rank; rows of tensors in `skip` or with no bytes are left out."""
        skipped = set(skip)
        parts = [
            cls._of_rank(rank, layout, index, ndim, skipped) for rank, layout in sorted(layouts.items()) if len(layout)
        ]
        if not parts:
            empty = np.zeros(0, np.int64)
            return cls(empty, np.zeros((0, ndim), np.int64), np.zeros((0, ndim), np.int64), empty, empty, empty)
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in cls.__dataclass_fields__))

    @classmethod
    def _of_rank(cls, rank: int, layout: Layout, index: Mapping[str, int], ndim: int, skip: set[str]) -> Boxes:
        ids = np.array([-1 if n in skip else index.get(n, -1) for n in layout.names], np.int64)[layout.tensor]
        keep = np.flatnonzero((ids >= 0) & (layout.sizes.prod(axis=1) > 0))
        pad = ((0, 0), (0, ndim - layout.offsets.shape[1]))
        return cls(
            ids[keep],
            np.pad(layout.offsets[keep], pad),
            np.pad(layout.sizes[keep], pad, constant_values=1),
            np.full(len(keep), rank, np.int64),
            keep,
            layout.unit[keep].astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: np.ndarray) -> Boxes:
        return Boxes(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))


def overlaps(a: Boxes, b: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows of the same tensor whose boxes meet: (row of a, row of b, offsets, sizes)."""
    order = np.argsort(a.tensor, kind="stable")
    sorted_ids = a.tensor[order]
    first = np.searchsorted(sorted_ids, b.tensor, "left")
    count = np.searchsorted(sorted_ids, b.tensor, "right") - first
    rows_b = np.repeat(np.arange(len(b)), count)
    step = np.arange(len(rows_b)) - np.repeat(np.cumsum(count) - count, count)
    rows_a = order[np.repeat(first, count) + step]
    low = np.maximum(a.offsets[rows_a], b.offsets[rows_b])
    high = np.minimum(a.offsets[rows_a] + a.sizes[rows_a], b.offsets[rows_b] + b.sizes[rows_b])
    meet = (high > low).all(axis=1)
    return rows_a[meet], rows_b[meet], low[meet], (high - low)[meet]
