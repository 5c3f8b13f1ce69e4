"""Digests of many pieces of one GPU in one kernel launch for each item size; the numbers are those of `digest.py`.

A tile (`digest_planes.py`) sums its elements times the weights of their columns and rows, which it computes from the
indices, and adds the sum to its piece's number. So every element is read once, and nothing is written but the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from nemo_rl.refit.digest import HIGH_HALF
from nemo_rl.refit.digest_planes import NUM_FIELDS, Located, planes_of, tiles_of
from nemo_rl.refit.repeated import Repeated

_ROWS, _COLS = 64, 512  # of a tile
_STEP = 2  # rows that a program holds in registers at a time
_WARPS = 4


class KernelBatch:
    """The digests of `pieces` on one CUDA device, as often as wanted; tables are made once.

    Args:
        pieces: of 1 to 8 bytes an element. The batch keeps addresses, not tensors: storage must stay where it is.
    """

    def __init__(self, device: torch.device, pieces: Sequence[Located]) -> None:
        self._device = device
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._launches: dict[int, list[Repeated]] = {}  # address of digests -> one for each item size
        for item in sorted({size for some in pieces for size in some.item.tolist()}):
            planes = np.concatenate([planes_of(some.take(np.flatnonzero(some.item == item))) for some in pieces])
            if len(planes):
                self._tables[item] = self._upload(planes), self._upload(tiles_of(planes, _ROWS, _COLS))

    def _upload(self, table: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(table).to(self._device)

    def launch(self, out: torch.Tensor) -> None:
        """Add each piece's digest to `out[number]` (int64, here 0) on the device's current stream; does not wait."""
        if out.data_ptr() not in self._launches:
            self._launches[out.data_ptr()] = [
                self._repeated(item, *tables, out) for item, tables in self._tables.items()
            ]
        with torch.cuda.device(self._device):
            for launch in self._launches[out.data_ptr()]:
                launch()

    def _repeated(self, item: int, planes: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor) -> Repeated:
        constants = item, _ROWS, _STEP, _COLS, NUM_FIELDS, HIGH_HALF
        return Repeated(_digest_tiles, len(tiles), planes, tiles, out, *constants, num_warps=_WARPS)


@triton.jit
def _weights(index, seed):  # type: ignore[no-untyped-def]
    """`odd_weights` of `index` along the axis of `seed`; 1 where there is no axis."""
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
