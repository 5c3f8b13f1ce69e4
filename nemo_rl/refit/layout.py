"""What one rank holds of every tensor: holdings with their storage, and the columnar layout that travels."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from nemo_rl.refit.packed import pack, unpack
from nemo_rl.refit.region import Region

_COLUMNS = ("tensor", "offsets", "sizes", "unit")


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape and dtype of one whole Hugging Face tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


TensorTable = dict[str, TensorMeta]
"""fqn -> meta of every tensor that a side knows; iteration order is `natural_order`."""


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """This rank holds `region` of `fqn` in `view`: a strided view of its own storage.

    `view.shape == region.sizes`, axes in the Hugging Face tensor's order.  Equal to itself alone.

    Raises:
        ValueError: the view's shape is not the region's.
    """

    fqn: str
    region: Region
    view: torch.Tensor

    def __post_init__(self) -> None:
        if tuple(self.view.shape) != self.region.sizes:
            raise ValueError(
                f"{self.fqn}: the view has shape {tuple(self.view.shape)} but its region {self.region} has sizes "
                f"{self.region.sizes}"
            )


def departure(now: Sequence[Holding], declared: Sequence[Holding]) -> str | None:
    """How `now` differs from what was declared in more than where it lies; None where it does not."""
    if len(now) != len(declared):
        return f"{len(now)} of them instead of {len(declared)}"
    forms = [[(h.fqn, h.region, h.view.dtype) for h in side] for side in (now, declared)]
    first = next(((a, b) for a, b in zip(*forms, strict=True) if a != b), None)
    return None if first is None else " instead of ".join(" ".join(map(str, form)) for form in first)


class SourceViews:
    """Views of what is held, by row and region; another object where holdings are other objects."""

    def __init__(self, holdings: Sequence[Holding]) -> None:
        self._holdings = holdings

    def __call__(self, row: int, region: Region) -> torch.Tensor:
        """Exactly `region`, which lies in what row `row` holds."""
        holding = self._holdings[row]
        return holding.view[region.slices_in(holding.region)]


def natural_order(fqns: Iterable[str]) -> list[str]:
    """Names sorted with their numbers as numbers (`layers.2` before `layers.10`)."""
    return sorted(fqns, key=_natural_key)


@lru_cache(maxsize=1 << 17)
def _natural_key(name: str) -> list[int | str]:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


@lru_cache(maxsize=64)
def _one_of_equal(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same object for equal names: layouts of many ranks share them."""
    return names


@lru_cache(maxsize=4096)
def meta_of(shape: tuple[int, ...], dtype: str) -> TensorMeta:
    """The same object for equal arguments; `dtype` as `float32`. Raises AttributeError for a dtype unknown to torch."""
    return TensorMeta(shape, getattr(torch, dtype))


def _columns(regions: Sequence[Region]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of all regions, padded to the most dims."""
    dims = np.fromiter((r.ndim for r in regions), np.int64, len(regions))
    most = int(dims.max(initial=0))
    offsets, sizes = np.zeros((len(regions), most), np.int64), np.ones((len(regions), most), np.int64)
    for ndim in np.unique(dims[dims > 0]).tolist():
        rows = np.flatnonzero(dims == ndim)
        offsets[rows, :ndim] = [regions[i].offsets for i in rows.tolist()]
        sizes[rows, :ndim] = [regions[i].sizes for i in rows.tolist()]
    return offsets, sizes


@dataclass(frozen=True, eq=False)
class Layout:
    """One rank's holdings without their views, columnar and cheap to send.

    Row i says: the rank holds the box `offsets[i], sizes[i]` of tensor `names[tensor[i]]`. Boxes are padded to the
    layout's number of dims with offset 0 and size 1. `unit[i]` is the landing unit of the row (a module whose loader
    must see all its bytes at once), or -1 where bytes land in their final storage.
    """

    names: tuple[str, ...]
    metas: tuple[TensorMeta, ...]
    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    unit: np.ndarray

    @classmethod
    def from_regions(
        cls, rows: Sequence[tuple[str, Region]], table: TensorTable, units: Sequence[int] | None = None
    ) -> Layout:
        """Build from `(fqn, region)` rows in any order; row i stays row i.

        Raises:
            ValueError: a name is not in the table or a region leaves its tensor; all violations at once.
        """
        found = [table.get(fqn) for fqn, _ in rows]
        bad = [f"{fqn}: not in the tensor table" for (fqn, _), meta in zip(rows, found, strict=True) if meta is None]
        bad += [
            f"{fqn}: region {region} leaves shape {meta.shape}"
            for (fqn, region), meta in zip(rows, found, strict=True)
            if meta is not None and not region.fits(meta.shape)
        ]
        if bad:
            raise ValueError("layout refused: " + "; ".join(bad))
        used = {fqn for fqn, _ in rows}
        names = _one_of_equal(tuple(name for name in table if name in used))
        index = {name: i for i, name in enumerate(names)}
        tensor = np.fromiter((index[f] for f, _ in rows), np.int32, len(rows))
        unit = np.full(len(rows), -1, np.int32) if units is None else np.asarray(units, np.int32)
        if len(unit) != len(rows):
            raise ValueError(f"{len(rows)} rows but {len(unit)} landing units")
        offsets, sizes = _columns([region for _, region in rows])
        return cls(names, tuple(table[n] for n in names), tensor, offsets, sizes, unit)

    @classmethod
    def from_holdings(
        cls, holdings: Sequence[Holding], table: TensorTable, units: Sequence[int] | None = None
    ) -> Layout:
        """The layout of `holdings`; row i is holding i.

        Raises:
            ValueError: as `from_regions`, and where a view's dtype is not the declared one.
        """
        bad = [
            f"{h.fqn}: held as {h.view.dtype}, declared {table[h.fqn].dtype}"
            for h in holdings
            if h.fqn in table and h.view.dtype != table[h.fqn].dtype
        ]
        if bad:
            raise ValueError("layout refused: " + "; ".join(bad))
        return cls.from_regions([(h.fqn, h.region) for h in holdings], table, units)

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def table(self) -> TensorTable:
        return dict(zip(self.names, self.metas, strict=True))

    def region(self, row: int) -> Region:
        ndim = len(self.metas[self.tensor[row]].shape)
        return Region(tuple(self.offsets[row, :ndim].tolist()), tuple(self.sizes[row, :ndim].tolist()))

    def fqn(self, row: int) -> str:
        return self.names[int(self.tensor[row])]

    @cached_property
    def item_bytes(self) -> np.ndarray:
        """Of each row, bytes of an element."""
        item: np.ndarray = np.array([m.dtype.itemsize for m in self.metas], np.int64)[self.tensor]
        return item

    def misfit(self, unit: int, views: Mapping[int, torch.Tensor], device: torch.device) -> str | None:
        """What is wrong with `views`, row -> view of the rows of `unit` on `device`; None where they fit."""
        for row in np.flatnonzero(self.unit == unit).tolist():
            region, view = self.region(row), views.get(row)
            want = self.metas[self.tensor[row]].dtype, region.sizes, device
            has = None if view is None else (view.dtype, tuple(view.shape), view.device)
            if has != want:
                said = " for ".join(" ".join(map(str, form)) for form in (has or ("nothing",), want))
                return f"{said}, as which {self.fqn(row)} {region} was declared"
        return None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that the rank holds."""
        return int((self.sizes.prod(axis=1) * self.item_bytes).sum()) if len(self) else 0

    def to_bytes(self) -> bytes:
        """Wire form; equal layouts have equal bytes."""
        head = [[n, list(m.shape), str(m.dtype).removeprefix("torch.")] for n, m in self.table.items()]
        return pack(head, {name: getattr(self, name) for name in _COLUMNS})

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Inverse of `to_bytes`. Raises ValueError where the bytes are damaged or rows do not fit the tensors."""
        try:
            head, arrays = unpack(data)
            names = _one_of_equal(tuple(n for n, _, _ in head))
            layout = cls(names, tuple(meta_of(tuple(s), d) for _, s, d in head), *(arrays[name] for name in _COLUMNS))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"layout refused: {error}") from error
        layout._check()
        return layout

    def _check(self) -> None:
        """Raises ValueError where a name comes twice, columns differ in length or a row leaves its tensor."""
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"layout refused: {len(self.names)} names, {len(set(self.names))} of them different")
        count, ndim = len(self.tensor), max((len(m.shape) for m in self.metas), default=0)
        shapes = [column.shape for column in (self.offsets, self.sizes, self.unit)]
        if shapes != [(count, ndim), (count, ndim), (count,)] or (
            count and not 0 <= int(self.tensor.min()) <= int(self.tensor.max()) < len(self.names)
        ):
            raise ValueError(
                f"layout refused: columns {shapes} do not go with {count} rows of {len(self.names)} tensors"
            )
        ones = (1,) * ndim
        limit = np.array([m.shape + ones[len(m.shape) :] for m in self.metas], np.int64).reshape(len(self.metas), ndim)
        ends = self.offsets + self.sizes
        bad = np.flatnonzero(((self.offsets < 0) | (self.sizes < 0) | (ends > limit[self.tensor])).any(axis=1))
        if len(bad):
            rows = [f"{self.fqn(i)} {self.offsets[i].tolist()} + {self.sizes[i].tolist()}" for i in bad[:8].tolist()]
            raise ValueError(f"layout refused: {len(bad)} rows leave their tensors: {'; '.join(rows)}")

    @cached_property
    def digest(self) -> str:
        """Hash of the wire form; equal for replicas."""
        return hashlib.sha256(self.to_bytes()).hexdigest()
