"""`values.py` on a GPU: all cells in one launch."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

COLUMNS = 7
_BLOCK = 4096  # elements of a tile


def tiles_of(fields: np.ndarray) -> np.ndarray:
    """int32 (n, 2): cell and number of the tile in it."""
    count = -(-(fields[:, 1] * fields[:, 2]) // _BLOCK)
    cell = np.repeat(np.arange(len(fields)), count)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(count) - count, count)
    return np.stack([cell, number], axis=1).astype(np.int32)


def run(table: torch.Tensor, tiles: torch.Tensor, num_cells: int, salt: int, check: bool) -> torch.Tensor:
    """int32, one a cell: elements that differ, or zeros where values are written."""
    counts = torch.zeros(num_cells, dtype=torch.int32, device=table.device)
    _tile[(len(tiles),)](table, tiles, counts, salt, check, _BLOCK, COLUMNS, num_warps=4)
    return counts


@triton.jit(do_not_specialize=["salt"])  # type: ignore[untyped-decorator]
def _tile(table, tiles, counts, salt, CHECK: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tiles + tl.program_id(0).to(tl.int64) * 2
    cell = tl.load(at)
    row = table + cell.to(tl.int64) * COLUMNS
    start = tl.load(row).to(tl.pointer_type(tl.int16))
    num_rows, num_cols, stride = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    first, width, seed = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    flat = tl.load(at + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = flat < num_rows * num_cols
    r, c = flat // num_cols, flat % num_cols
    x = (first + r * width + c).to(tl.uint32) * 0x9E3779B1
    x = x ^ (seed + salt).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    want = (x & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    where = start + r * stride + c
    if CHECK:
        got = tl.load(where, mask=inside, other=0)
        tl.atomic_add(counts + cell, tl.sum((inside & (got != want)).to(tl.int32), axis=0))
    else:
        tl.store(where, want, mask=inside)
