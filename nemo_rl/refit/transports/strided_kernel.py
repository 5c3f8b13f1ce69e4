"""Strided boxes by one kernel launch for each item size and tile shape: for rows too short for copy engines.

A box is cut into planes of rows and columns, one for each index of its other axes, and planes into tiles of a program
each. Addresses may be those of another GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from nemo_rl.refit.repeated import Repeated
from nemo_rl.refit.strided import Axis, Form, Jobs, offsets_of

_SHAPES = ((512, 8), (128, 32), (32, 128), (4, 1024))  # rows and columns of a tile, for few and for many columns
_WIDE = _SHAPES[-1][1]
_NUM_FIELDS = 8  # of a plane


class StridedBatch:
    """Copies `numbers` of `jobs`, as often as wanted; tables are made once and lie on `device`.

    Args:
        programs: how many work on the copies of one launch at a time, to leave the device to others; None for all at
            once, which is fastest.
    """

    def __init__(self, jobs: Jobs, numbers: Sequence[int], device: torch.device, programs: int | None = None) -> None:
        self._device = device
        planes: dict[tuple[int, bool, int, int], list[tuple[int, ...]]] = {}
        for i in numbers:
            src, dst, form = int(jobs.src[i]), int(jobs.dst[i]), jobs.forms[i]
            item = widest_item(src, dst, form)
            for plane in _planes(src, dst, form, min(item, 8)):
                shape = next((s for s in _SHAPES if plane[5] <= s[1]), _SHAPES[-1])
                planes.setdefault((item, plane[6:] == (1, 1), *shape), []).append(plane)
        self._launches = [self._repeated(np.array(rows, np.int64), key, programs) for key, rows in planes.items()]

    def _repeated(self, planes: np.ndarray, key: tuple[int, bool, int, int], programs: int | None) -> Repeated:
        tiles = _tiles(planes, *key[2:])
        tables = [torch.from_numpy(table).to(self._device) for table in (planes, tiles)]
        return Repeated(_copy_tiles, min(len(tiles), programs or len(tiles)), *tables, len(tiles), *key, _NUM_FIELDS)

    @property
    def num_launches(self) -> int:
        return len(self._launches)

    def launch(self, stream: torch.cuda.Stream) -> None:
        """Start on `stream`."""
        with torch.cuda.device(self._device):
            for launch in self._launches:
                launch(stream)


def widest_item(src: int, dst: int, form: Form) -> int:
    """The widest of 16, 8, 4, 2, 1 bytes that divides addresses, strides and runs."""
    numbers = [src, dst, form.run, *(step for axis in form.axes for step in (axis.src, axis.dst))]
    return next(item for item in (16, 8, 4, 2, 1) if all(n % item == 0 for n in numbers))


def _planes(src: int, dst: int, form: Form, item: int) -> Iterator[tuple[int, ...]]:
    """(src, dst, rows, src stride, dst stride, columns, src stride, dst stride), strides in items."""
    axes = [*form.axes, Axis(form.run // item, item, item)]
    col = min((a for a in axes if a.size > 1), key=lambda a: (a.dst, a.src), default=axes[-1])
    rest = [a for a in axes if a is not col]
    row = max(rest, key=lambda a: a.size, default=Axis(1, 0, 0))
    outer = [a for a in rest if a is not row]
    if not rest and col.size > _WIDE:  # one long range: rows of it fill a tile
        whole = col.size // _WIDE * _WIDE
        step = _WIDE * col.src // item, _WIDE * col.dst // item
        yield src, dst, whole // _WIDE, *step, _WIDE, col.src // item, col.dst // item
        src, dst, col = src + whole * col.src, dst + whole * col.dst, Axis(col.size - whole, col.src, col.dst)
        if not col.size:
            return
    strides = (row.size, row.src // item, row.dst // item, col.size, col.src // item, col.dst // item)
    for there, here in offsets_of(outer).tolist():
        yield (src + there, dst + here, *strides)


def _tiles(planes: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """int32 (n, 3): plane, first row, first column of every tile."""
    down, across = -(-planes[:, 2] // rows), -(-planes[:, 5] // cols)
    count = down * across
    plane = np.repeat(np.arange(len(planes)), count)
    step = np.arange(len(plane)) - np.repeat(np.cumsum(count) - count, count)
    row, col = step // across[plane] * rows, step % across[plane] * cols
    return np.stack([plane, row, col], axis=1).astype(np.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_tiles(  # type: ignore[no-untyped-def]
    planes,
    tiles,
    num_tiles,
    ITEM: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    for number in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = tiles + number * 3
        plane = planes + tl.load(tile).to(tl.int64) * FIELDS
        src, dst = tl.load(plane), tl.load(plane + 1)
        src_step, dst_step, num_cols = tl.load(plane + 3), tl.load(plane + 4), tl.load(plane + 5)
        if ITEM == 16:  # two items of 8 bytes, known to lie together
            src, dst = tl.multiple_of(src, 16), tl.multiple_of(dst, 16)
            src_step, dst_step = tl.multiple_of(src_step, 2), tl.multiple_of(dst_step, 2)
            num_cols = tl.multiple_of(num_cols, 2)
        rows = tl.load(tile + 1).to(tl.int64) + tl.arange(0, ROWS)
        first = tl.multiple_of(tl.load(tile + 2), COLS).to(tl.int64)
        cols = first + tl.arange(0, COLS)
        inside = (rows < tl.load(plane + 2))[:, None] & (cols < num_cols)[None, :]
        there, here = cols, cols
        if not UNIT:
            there, here = cols * tl.load(plane + 6), cols * tl.load(plane + 7)
        there = rows[:, None] * src_step + there[None, :]
        here = rows[:, None] * dst_step + here[None, :]
        if ITEM == 1:
            bits8 = tl.load(src.to(tl.pointer_type(tl.uint8)) + there, mask=inside)
            tl.store(dst.to(tl.pointer_type(tl.uint8)) + here, bits8, mask=inside)
        elif ITEM == 2:
            bits16 = tl.load(src.to(tl.pointer_type(tl.int16)) + there, mask=inside)
            tl.store(dst.to(tl.pointer_type(tl.int16)) + here, bits16, mask=inside)
        elif ITEM == 4:
            bits32 = tl.load(src.to(tl.pointer_type(tl.int32)) + there, mask=inside)
            tl.store(dst.to(tl.pointer_type(tl.int32)) + here, bits32, mask=inside)
        else:
            bits64 = tl.load(src.to(tl.pointer_type(tl.int64)) + there, mask=inside)
            tl.store(dst.to(tl.pointer_type(tl.int64)) + here, bits64, mask=inside)
