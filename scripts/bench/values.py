"""Values of a benchmark's weights, which any rank makes again from names: written and compared in one launch on GPUs.

The 16 bits of element i of a tensor are a hash of i and of the tensor's name and version. On the CPU the same numbers
are made with torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.region import Region

_M1, _M2, _M3, _MASK = 0x9E3779B1, 0x7FEB352D, 0x846CA68B, 0xFFFFFFFF  # odd; the kernel has the same


@dataclass(frozen=True, slots=True)
class Cell:
    """A view of 2-byte elements of at most two dims that holds `region` of tensor `fqn` of `shape`."""

    fqn: str
    shape: tuple[int, ...]
    region: Region
    view: torch.Tensor


class Values:
    """The values of `cells`, all on one device.

    Raises:
        ValueError: a cell has more than two dims, elements that are not two bytes, or columns with gaps.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        good = [len(c.shape) in (1, 2) and c.view.element_size() == 2 and c.view.stride(-1) == 1 for c in cells]
        bad = [cell.fqn for cell, fits in zip(cells, good, strict=True) if not fits]
        if bad:
            raise ValueError(f"rows of 2-byte elements in one or two dims are needed, not {', '.join(bad[:5])}")
        self._cells = list(cells)
        self._device = cells[0].view.device
        self._table: torch.Tensor | None = None
        self._tiles: torch.Tensor | None = None

    def write(self, version: int) -> None:
        """Every cell gets its values of `version`."""
        self._run(version, check=False)

    def wrong(self, version: int) -> list[str]:
        """Names of cells with an element that is not that of `version`; waits for the device."""
        counts = self._run(version, check=True)
        return [self._cells[i].fqn for i in np.flatnonzero(counts.cpu().numpy()).tolist()]

    def _run(self, version: int, check: bool) -> torch.Tensor:
        if self._device.type == "cuda":
            return self._launch(version, check)
        counts = torch.zeros(len(self._cells), dtype=torch.int32)
        for number, cell in enumerate(self._cells):
            want = expected(cell, version)
            if check:
                counts[number] = int((_bits(cell.view) != want).sum())
            else:
                _bits(cell.view).copy_(want)
        return counts

    def _launch(self, version: int, check: bool) -> torch.Tensor:
        from scripts.bench.values_kernel import COLUMNS, run, tiles_of

        if self._table is None or self._tiles is None:
            fields = np.array([_fields(cell) for cell in self._cells], np.int64).reshape(-1, COLUMNS)
            self._table = torch.from_numpy(fields).to(self._device)
            self._tiles = torch.from_numpy(tiles_of(fields)).to(self._device)
        return run(self._table, self._tiles, len(self._cells), salt_of(version), check)


def expected(cell: Cell, version: int) -> torch.Tensor:
    """int16 of the cell's region, on the CPU."""
    width = cell.shape[-1]
    rows, cols = (cell.region.sizes[0], cell.region.sizes[1]) if len(cell.shape) == 2 else (1, cell.region.sizes[0])
    row, col = (cell.region.offsets[0], cell.region.offsets[1]) if len(cell.shape) == 2 else (0, cell.region.offsets[0])
    index = (row + torch.arange(rows))[:, None] * width + (col + torch.arange(cols))[None, :]
    x = (index & _MASK) * _M1 & _MASK
    x = x ^ (seed(cell.fqn) + salt_of(version) & _MASK)
    x = (x ^ (x >> 16)) * _M2 & _MASK
    x = (x ^ (x >> 15)) * _M3 & _MASK
    x = (x ^ (x >> 16)) & 0xFFFF
    return torch.where(x > 0x7FFF, x - 0x10000, x).to(torch.int16).view(cell.region.sizes)


def salt_of(version: int) -> int:
    return version * _M2 & 0x7FFFFFFF


def seed(fqn: str) -> int:
    return zlib.crc32(fqn.encode())


def _bits(view: torch.Tensor) -> torch.Tensor:
    return view.view(torch.int16)


def _fields(cell: Cell) -> tuple[int, ...]:
    """A row of the kernel's table: address, rows, columns, elements from row to row, first index, width, seed."""
    two = len(cell.shape) == 2
    rows, cols = (cell.region.sizes[0] if two else 1), cell.region.sizes[-1]
    first = (cell.region.offsets[0] if two else 0) * cell.shape[-1] + cell.region.offsets[-1]
    return cell.view.data_ptr(), rows, cols, cell.view.stride(0) if two else 0, first, cell.shape[-1], seed(cell.fqn)
