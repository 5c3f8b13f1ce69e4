"""The two ends of a refit without Megatron and without an engine: strided tensors of the shapes of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.cover import strided_ranges
from nemo_rl.refit.layout import Holding, Layout, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import Trace, TracedRow
from nemo_rl.trainer.simulated import Rows

Tensors = dict[str, torch.Tensor]
Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Tensors]
IN_PLACE = -1


class RankSource:
    """A trainer rank; every other view is a part of wider storage, as the parts of a fused weight are."""

    def __init__(self, table: TensorTable, rows: Rows, unused: Mapping[str, str]) -> None:
        self._table, self._unused = table, unused
        self._held = [Holding(f, r, _room(r, table[f].dtype, bool(i % 2))) for i, (f, r) in enumerate(rows)]

    def table(self) -> TensorTable:
        return self._table

    def holdings(self) -> list[Holding]:
        return list(self._held)

    def unused(self) -> Mapping[str, str]:
        return self._unused

    def step(self, weights: Mapping[str, torch.Tensor]) -> None:
        """An optimizer step that ends in `weights`."""
        for held in self._held:
            full = weights[held.fqn]
            held.view.copy_(full[held.region.slices_in(Region.whole(tuple(full.shape)))])


def _room(region: Region, dtype: torch.dtype, wide: bool) -> torch.Tensor:
    if not wide or not region.ndim:
        return torch.empty(region.sizes, dtype=dtype)
    return torch.empty((*region.sizes[:-1], region.sizes[-1] + 3), dtype=dtype)[..., : region.sizes[-1]]


class RankLanding:
    """A generator rank: storage as the engine's model has it, filled by rows of a trace.

    Args:
        trace: of the rank's own loader.
        like: every parameter and persistent buffer, as a load of the engine left them; copied, not kept.
        load: the engine's own loader on tensors that travel whole.
        staged: a module's rows land in fresh tensors and reach their storage when all are there.
    """

    def __init__(self, trace: Trace, like: Mapping[str, torch.Tensor], load: Load, staged: bool = False) -> None:
        self._trace, self._load, self._staged = trace, load, staged
        self.storage = clone(like)
        self._units = _modules(trace.rows) if staged else ()
        self._fresh: dict[int, Tensors] = {}
        self._version: int | None = None
        self.refuses = "it has no weights"

    @property
    def version(self) -> int | None:
        return self._version

    def declare(self, table: TensorTable) -> Declaration:
        number = {name: i for i, name in enumerate(self._units)}
        self._unit = [number.get(_module(row.param), IN_PLACE) for row in self._trace.rows]
        layout = Layout.from_regions([(row.fqn, row.region) for row in self._trace.rows], table, self._unit)
        return Declaration(layout, self._trace.misc, self._trace.problems)

    def begin(self, version: int) -> None:
        self.refuses = "it is being updated"
        for name, ranges in self._trace.padding.items():
            for first, end in ranges:
                all_bytes(self.storage[name])[first:end] = 0

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        if unit == IN_PLACE:
            return {i: view_of(self.storage, self._trace.rows[i]) for i in self._rows(unit)}
        rows = {i: self._trace.rows[i] for i in self._rows(unit)}
        fresh = clone({row.param: self.storage[row.param] for row in rows.values()})
        scramble(fresh, unit)
        self._fresh[unit] = fresh
        return {i: view_of(fresh, row) for i, row in rows.items()}

    def close(self, unit: int) -> None:
        fresh = self._fresh.pop(unit, None)
        if fresh is not None:
            for i in self._rows(unit):
                row = self._trace.rows[i]
                view_of(self.storage, row).copy_(view_of(fresh, row))

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Bytes that rows of other tensors and padding leave come from the loader."""
        given = {name: tensor.clone() for name, tensor in tensors}
        loaded = self._load(given.items())
        kept = {id_of(t): np.zeros(t.untyped_storage().nbytes(), bool) for t in self.storage.values()}
        for row in self._trace.rows:
            if row.fqn not in given:
                _mark(kept[id_of(self.storage[row.param])], row, self.storage[row.param].element_size())
        for name, ranges in self._trace.padding.items():
            for first, end in ranges:
                kept[id_of(self.storage[name])][first:end] = True
        for name in self.storage.keys() - self._trace.left_alone.keys():
            mine = all_bytes(self.storage[name])
            rest = torch.from_numpy(~kept[id_of(self.storage[name])])
            mine[rest] = all_bytes(loaded[name])[rest]

    def finish(self) -> None:
        if self._fresh:
            raise RuntimeError(f"modules {[self._units[u] for u in self._fresh]} did not get all their bytes")

    def commit(self, version: int) -> None:
        self._version, self.refuses = version, ""

    def reject(self, reason: str) -> None:
        self.refuses = reason

    def scramble(self, seed: int) -> None:
        """Random bytes wherever a refit must write."""
        scramble({n: t for n, t in self.storage.items() if n not in self._trace.left_alone}, seed)

    def snapshot(self) -> Tensors:
        """A copy of every parameter and buffer. Raises RuntimeError where the generator would refuse to generate."""
        if self.refuses:
            raise RuntimeError(f"the generator refuses: {self.refuses}")
        return {name: tensor.clone() for name, tensor in self.storage.items()}

    def _rows(self, unit: int) -> list[int]:
        return [i for i, u in enumerate(self._unit) if u == unit]


def view_of(storage: Mapping[str, torch.Tensor], row: TracedRow) -> torch.Tensor:
    return storage[row.param].as_strided(row.region.sizes, row.stride, row.storage_offset)


def all_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage behind `tensor`."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


def id_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def clone(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies with the same strides; those that share storage share it again."""
    made: dict[int, torch.Tensor] = {}
    out = {}
    for name, tensor in tensors.items():
        raw = made.setdefault(id_of(tensor), all_bytes(tensor).clone())
        empty = torch.empty(0, dtype=tensor.dtype)
        out[name] = empty.set_(raw.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
    return out


def scramble(tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for raw in {id_of(t): all_bytes(t) for t in tensors.values()}.values():
        raw.random_(0, 256, generator=generator)


def written(trace: Trace, storage: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Parameter -> how many rows write each byte of its storage."""
    counts = {row.param: np.zeros(storage[row.param].untyped_storage().nbytes(), np.int32) for row in trace.rows}
    for row in trace.rows:
        size = storage[row.param].element_size()
        for first, end in strided_ranges(row.storage_offset * size, row.region.sizes, row.stride, size).tolist():
            counts[row.param][first:end] += 1
    return counts


def _mark(mask: np.ndarray, row: TracedRow, size: int) -> None:
    for first, end in strided_ranges(row.storage_offset * size, row.region.sizes, row.stride, size).tolist():
        mask[first:end] = True


def _module(param: str) -> str:
    return param.rpartition(".")[0]


def _modules(rows: Iterable[TracedRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_module(row.param) for row in rows))
