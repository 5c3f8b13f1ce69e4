"""How pieces of tensors are cut into planes and tiles for the kernel that digests them; tables of many pieces at once.

A piece is cut into planes of rows and columns, one for each index of its other axes, and planes into tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_FIELDS = 12
"""Of a plane: address of its first element; of rows and then of columns count, stride, first index in the tensor and
seed of the weights; weight of all other axes; number of the piece; 0."""


def odd_weights(axis: int, index: np.ndarray) -> np.ndarray:
    """uint64: weights of global indices along `axis`, splitmix64 of the index, by axis."""
    with np.errstate(over="ignore"):
        z = index.astype(np.uint64) + np.uint64(1)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64((axis + 1) << 56)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@dataclass(frozen=True, eq=False)
class Located:
    """Where pieces of tensors that have one number of axes lie on a device.

    Attributes:
        number: (n,), of each piece.
        address: (n,), of its first element.
        item: (n,), bytes of an element.
        offsets, sizes: (n, axes), the box in its tensor.
        strides: (n, axes), in elements.
    """

    number: np.ndarray
    address: np.ndarray
    item: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    strides: np.ndarray

    def take(self, chosen: np.ndarray) -> Located:
        columns = (self.number, self.address, self.item, self.offsets, self.sizes, self.strides)
        return Located(*(column[chosen] for column in columns))


def planes_of(pieces: Located) -> np.ndarray:
    """int64 (m, NUM_FIELDS). Columns run along the axis of the smallest stride, rows along the longest other one."""
    pieces = pieces.take(np.flatnonzero(pieces.sizes.prod(axis=1) > 0))
    every, axes = np.arange(len(pieces.number)), pieces.sizes.shape[1]
    if not axes:
        pieces = _with_an_axis(pieces)
    wide = pieces.sizes > 1
    col = np.where(wide, pieces.strides, np.iinfo(np.int64).max).argmin(axis=1)
    other = np.where(wide, pieces.sizes, 0)
    other[every, col] = 0
    row = other.argmax(axis=1)
    spans = np.zeros(pieces.sizes.shape, bool)
    spans[every, col] = wide[every, col]
    spans[every, row] |= other[every, row] > 0
    start, scale, of = _outer(pieces, np.where(spans, 1, pieces.sizes), spans, axes)
    rows = _axis(pieces, row, other[every, row] > 0)
    cols = _axis(pieces, col, wide[every, col])
    return np.column_stack([start, rows[of], cols[of], scale.view(np.int64), pieces.number[of], np.zeros_like(of)])


def tiles_of(planes: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """int32 (n, 3): plane, first row, first column of every tile of at most `rows` by `cols`."""
    down, across = -(-planes[:, 1] // rows), -(-planes[:, 5] // cols)
    plane, step = _counted(down * across)
    return np.stack([plane, step // across[plane] * rows, step % across[plane] * cols], axis=1).astype(np.int32)


def _with_an_axis(pieces: Located) -> Located:
    """Scalars, with one axis of one element."""
    one = np.ones((len(pieces.number), 1), np.int64)
    return Located(pieces.number, pieces.address, pieces.item, one * 0, one, one)


def _outer(
    pieces: Located, sizes: np.ndarray, spans: np.ndarray, axes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each plane, one for each index of `sizes`: address, weight of axes that are not in `spans`, and its piece."""
    of, turn = _counted(sizes.prod(axis=1))
    start, scale = pieces.address[of], np.ones(len(of), np.uint64)
    for axis in reversed(range(axes)):
        at, turn = turn % sizes[of, axis], turn // sizes[of, axis]
        start = start + at * pieces.strides[of, axis] * pieces.item[of]
        weight = odd_weights(axis, pieces.offsets[of, axis] + at)
        scale *= np.where(spans[of, axis], np.uint64(1), weight)
    return start, scale, of


def _axis(pieces: Located, axis: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(n, 4): size, stride, first index and seed of each piece's `axis`; where none is `there`, one index, seed -1."""
    every = np.arange(len(axis))
    columns = (pieces.sizes[every, axis], pieces.strides[every, axis], pieces.offsets[every, axis], (axis + 1) << 56)
    none = (1, 0, 0, -1)
    return np.column_stack([np.where(there, column, value) for column, value in zip(columns, none, strict=True)])


def _counted(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number i `count[i]` times, and how often it came before."""
    of = np.repeat(np.arange(len(count)), count)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
