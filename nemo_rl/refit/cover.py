"""Which bytes of a storage strided views reach, and whether a set of writes reaches each byte once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

ByteRange = tuple[int, int]
"""First byte and the byte after the last, counted from the start of a storage."""


def view_ranges(view: torch.Tensor) -> np.ndarray:
    """Byte ranges `(n, 2)` of the storage that `view` reaches: as few as its strides allow, in no order.

    Ranges may repeat where the view is expanded.
    """
    size = view.element_size()
    return strided_ranges(view.storage_offset() * size, tuple(view.shape), view.stride(), size)


def strided_ranges(start: int, sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> np.ndarray:
    """As `view_ranges`, from byte `start`, sizes, strides in elements and bytes per element."""
    if 0 in sizes:
        return np.zeros((0, 2), np.int64)
    dims = sorted(((step * itemsize, n) for n, step in zip(sizes, strides, strict=True) if n > 1), reverse=True)
    run = itemsize
    while dims and dims[-1][0] == run:
        run *= dims.pop()[1]
    starts = np.array([start], np.int64)
    for step, n in dims:
        starts = (starts[:, None] + np.arange(n, dtype=np.int64) * step).reshape(-1)
    return np.stack([starts, starts + run], axis=1)


def join(parts: Iterable[np.ndarray]) -> np.ndarray:
    """All ranges of `parts` in one array."""
    return np.concatenate([np.zeros((0, 2), np.int64), *parts])


@dataclass(frozen=True, eq=False)
class Account:
    """What becomes of the bytes of one storage; ranges are merged and in order.

    Attributes:
        holes: parameter bytes that nothing writes.
        twice: bytes that two copies write, or a copy and a computed value.
        padding: parameter bytes that only a constant fills.
    """

    holes: list[ByteRange]
    twice: list[ByteRange]
    padding: list[ByteRange]


def account(target: np.ndarray, copied: np.ndarray, computed: np.ndarray, filled: np.ndarray) -> Account:
    """Compare the bytes of `target` with what is written; all four are ranges `(n, 2)` of one storage."""
    edges = np.unique(join([target, copied, computed, filled]))
    wanted, rows, values, fills = (_counts(edges, r) for r in (target, copied, computed, filled))
    return Account(
        holes=_merged(edges, (wanted > 0) & (rows == 0) & (values == 0) & (fills == 0)),
        twice=_merged(edges, (rows > 1) | ((rows > 0) & (values > 0))),
        padding=_merged(edges, (wanted > 0) & (fills > 0) & (rows == 0) & (values == 0)),
    )


def common(a: np.ndarray, b: np.ndarray) -> list[ByteRange]:
    """Bytes in both sets of ranges."""
    edges = np.unique(join([a, b]))
    return _merged(edges, (_counts(edges, a) > 0) & (_counts(edges, b) > 0))


def _counts(edges: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """How many ranges hold each of the segments between consecutive `edges`."""
    delta = np.zeros(len(edges) + 1, np.int64)
    np.add.at(delta, np.searchsorted(edges, ranges[:, 0]), 1)
    np.add.at(delta, np.searchsorted(edges, ranges[:, 1]), -1)
    return np.cumsum(delta)[: max(len(edges) - 1, 0)]


def _merged(edges: np.ndarray, chosen: np.ndarray) -> list[ByteRange]:
    """The chosen segments, neighbours joined."""
    turns = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return [(int(edges[a]), int(edges[b])) for a, b in zip(turns[::2], turns[1::2], strict=True)]
