"""Digests of many pieces of one GPU in one kernel launch for each item size; the numbers are those of `digest.py`.

A piece is cut into planes of rows and columns, one for each index of its other axes, and planes into tiles. A tile sums
its elements times the weights of their columns and rows, which it computes from the indices, and adds the sum to its
piece's number. So every element is read once, and nothing is written but the numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from nemo_rl.refit.digest import HIGH_HALF, axis_weight
from nemo_rl.refit.region import Region

_ROWS, _COLS = 64, 512  # of a tile
_STEP = 2  # rows that a program holds in registers at a time
_WARPS = 4
_NUM_FIELDS = 12  # of a plane
_POINTERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KernelBatch:
    """The digests of `pieces` on one device, as often as wanted; tables are made once.

    Args:
        pieces: numbers, and views with the regions that they hold, all on one CUDA device, of 1 to 8 bytes an element.
            The batch keeps addresses, not tensors: storage must stay where it is.

    Raises:
        ValueError: devices differ.
    """

    def __init__(self, pieces: Sequence[tuple[int, torch.Tensor, Region]]) -> None:
        devices = {view.device for _, view, _ in pieces}
        if len(devices) != 1:
            raise ValueError(f"a batch is of one device, got pieces on {sorted(map(str, devices))}")
        self._device = devices.pop()
        planes: dict[int, list[tuple[int, ...]]] = {}
        for number, view, region in pieces:
            planes.setdefault(view.element_size(), []).extend(_planes(number, view, region))
        self._tables = {item: self._upload(np.array(rows, np.int64)) for item, rows in planes.items() if rows}

    def _upload(self, planes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(planes).to(self._device), torch.from_numpy(_tiles(planes)).to(self._device)

    def launch(self, out: torch.Tensor) -> None:
        """Add each piece's digest to `out[number]` (int64, here 0) on the device's current stream; does not wait."""
        with torch.cuda.device(self._device):
            for item, (planes, tiles) in self._tables.items():
                _digest_tiles[(len(tiles),)](
                    planes, tiles, out, item, _ROWS, _STEP, _COLS, _NUM_FIELDS, HIGH_HALF, num_warps=_WARPS
                )


def _planes(number: int, view: torch.Tensor, region: Region) -> Iterator[tuple[int, ...]]:
    """Rows of the plane table; columns run along the axis of the smallest stride, rows along the longest other one."""
    if region.volume == 0:
        return
    axes = sorted((a for a in range(view.ndim) if view.shape[a] > 1), key=view.stride)
    col = axes[0] if axes else None
    row = max(axes[1:], key=lambda a: int(view.shape[a]), default=None)
    outer = [a for a in range(view.ndim) if a not in (col, row)]
    size = view.element_size()
    for index in itertools.product(*(range(view.shape[a]) for a in outer)):
        scale, start = 1, view.data_ptr()
        for axis, at in zip(outer, index, strict=True):
            scale = scale * axis_weight(axis, region.offsets[axis] + at) % (1 << 64)
            start += at * view.stride(axis) * size
        yield (start, *_axis(view, region, row), *_axis(view, region, col), scale - ((scale >> 63) << 64), number, 0)


def _axis(view: torch.Tensor, region: Region, axis: int | None) -> tuple[int, int, int, int]:
    """Size, stride, first global index and seed of an axis; a missing one has one index and seed -1."""
    if axis is None:
        return 1, 0, 0, -1
    return view.shape[axis], view.stride(axis), region.offsets[axis], (axis + 1) << 56


def _tiles(planes: np.ndarray) -> np.ndarray:
    """int32 (n, 3): plane, first row, first column of every tile."""
    down, across = -(-planes[:, 1] // _ROWS), -(-planes[:, 5] // _COLS)
    count = down * across
    plane = np.repeat(np.arange(len(planes)), count)
    step = np.arange(len(plane)) - np.repeat(np.cumsum(count) - count, count)
    row, col = step // across[plane] * _ROWS, step % across[plane] * _COLS
    return np.stack([plane, row, col], axis=1).astype(np.int32)


@triton.jit
def _weights(index, seed):  # type: ignore[no-untyped-def]
    """`axis_weight` of `index` along the axis of `seed`; 1 where there is no axis."""
    z = (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = ((z ^ (z >> 31)) | 1).to(tl.int64)
    return tl.where(seed == -1, 1, z)


@triton.jit  # type: ignore[untyped-decorator]
def _digest_tiles(  # type: ignore[no-untyped-def]
    planes,
    tiles,
    out,
    ITEM: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLS: tl.constexpr,
    FIELDS: tl.constexpr,
    HIGH: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    plane = planes + tl.load(tile).to(tl.int64) * FIELDS
    first = tl.load(tile + 1).to(tl.int64)
    num_rows, row_stride = tl.load(plane + 1), tl.load(plane + 2)
    row_index, row_seed = tl.load(plane + 3), tl.load(plane + 4)
    cols = tl.load(tile + 2).to(tl.int64) + tl.arange(0, COLS)
    here, across = cols < tl.load(plane + 5), cols * tl.load(plane + 6)
    start = tl.load(plane)
    total = tl.zeros((STEP, COLS), tl.int64)
    for step in range(0, tl.minimum(num_rows - first, ROWS), STEP):
        rows = first + step + tl.arange(0, STEP)
        inside = (rows < num_rows)[:, None] & here[None, :]
        at = rows[:, None] * row_stride + across[None, :]
        if ITEM == 1:
            bits = tl.load(start.to(tl.pointer_type(tl.uint8)) + at, mask=inside, other=0).to(tl.int64)
        elif ITEM == 2:
            bits = tl.load(start.to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0).to(tl.int64)
        elif ITEM == 4:
            bits = tl.load(start.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0).to(tl.int64)
        else:
            bits = tl.load(start.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
            bits = (bits & 0xFFFFFFFF) + (bits >> 32) * HIGH
        total += bits * _weights(rows + row_index, row_seed)[:, None]
    total = total * _weights(cols + tl.load(plane + 7), tl.load(plane + 8))[None, :]
    tl.atomic_add(out + tl.load(plane + 10), tl.sum(tl.sum(total, axis=1), axis=0) * tl.load(plane + 9))
