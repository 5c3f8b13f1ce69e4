"""Where copies lie in memory at both ends: addresses, and forms that say how bytes are spread from there on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import CopyTable, RefitPlan

MAX_PITCH = (1 << 31) - 1
"""Bytes between runs that copy engines accept, at most."""

MOST_RUNS = 1 << 20
"""Contiguous runs of rows that are compared with each other, at most."""


@dataclass(frozen=True, slots=True)
class Axis:
    """`size` runs, `src` and `dst` bytes apart at the two ends."""

    size: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Form:
    """A box of bytes: runs of `run` bytes, contiguous at both ends, along `axes` (outermost first).

    `item` is the size of an element, the smallest piece that a kernel may move.
    """

    axes: tuple[Axis, ...]
    run: int
    item: int

    @property
    def num_runs(self) -> int:
        count = 1
        for axis in self.axes:
            count *= axis.size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_runs * self.run


@lru_cache(maxsize=4096)
def form_of(sizes: tuple[int, ...], src: tuple[int, ...], dst: tuple[int, ...], item: int) -> Form:
    """The form with the fewest axes of a box of `sizes` elements, with strides in bytes at both ends."""
    axes = [Axis(*axis) for axis in zip(sizes, src, dst, strict=True) if axis[0] != 1]
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda a: (-a.dst, -a.src)):
        outer = merged[-1] if merged else None
        if outer and outer.src == axis.size * axis.src and outer.dst == axis.size * axis.dst:
            merged[-1] = Axis(outer.size * axis.size, axis.src, axis.dst)
        else:
            merged.append(axis)
    run = item
    if merged and merged[-1].src == item and merged[-1].dst == item:
        run = merged.pop().size * item
    return Form(tuple(merged), run, item)


@dataclass(frozen=True, eq=False)
class Rows:
    """Where rows of a layout lie: of row i, the address of the first byte and the strides of its axes, in bytes."""

    address: np.ndarray
    strides: np.ndarray

    @classmethod
    def of(cls, views: Mapping[int, torch.Tensor], layout: Layout) -> Rows:
        """Rows without a view keep address 0."""
        address = np.zeros(len(layout), np.int64)
        strides = np.zeros(layout.offsets.shape, np.int64)
        for row, view in views.items():
            address[row] = view.data_ptr()
            strides[row, : view.ndim] = [stride * view.element_size() for stride in view.stride()]
        return cls(address, strides)

    def equals(self, other: Rows) -> bool:
        return np.array_equal(self.address, other.address) and np.array_equal(self.strides, other.strides)

    def apart(self, sizes: np.ndarray, item: np.ndarray) -> bool:
        """Whether no byte belongs to two elements; False too where it takes more than `MOST_RUNS` runs to tell.

        Args:
            sizes, item: of each row, the sizes of its axes and the bytes of an element.
        """
        placed = np.flatnonzero((self.address != 0) & (sizes.prod(axis=1) > 0))
        strides = map(tuple, self.strides[placed].tolist())
        keys = zip(map(tuple, sizes[placed].tolist()), strides, item[placed].tolist(), strict=True)
        forms = tuple(form_of(size, stride, stride, one) for size, stride, one in keys)
        if sum(form.num_runs for form in forms) > MOST_RUNS:
            return False
        starts, lengths = _all_runs(Jobs(self.address[placed], self.address[placed], forms))
        order = np.argsort(starts)
        return bool((starts[order][:-1] + lengths[order][:-1] <= starts[order][1:]).all())


@dataclass(frozen=True, eq=False)
class Jobs:
    """Copies from one rank, ready to be moved: of each, both addresses and a form."""

    src: np.ndarray
    dst: np.ndarray
    forms: tuple[Form, ...]

    def __len__(self) -> int:
        return len(self.forms)

    @classmethod
    def all_of(cls, parts: Sequence[Jobs]) -> Jobs:
        """One after the other."""
        src, dst = (np.concatenate([getattr(part, end) for part in parts]) for end in ("src", "dst"))
        return cls(src, dst, tuple(form for part in parts for form in part.forms))

    def take(self, numbers: np.ndarray) -> Jobs:
        return Jobs(self.src[numbers], self.dst[numbers], tuple(self.forms[i] for i in numbers.tolist()))

    def grouped(self) -> dict[Form, np.ndarray]:
        """Form -> numbers of the copies that have it, in order."""
        groups: dict[Form, list[int]] = {}
        for number, form in enumerate(self.forms):
            groups.setdefault(form, []).append(number)
        return {form: np.array(numbers, np.int64) for form, numbers in groups.items()}


def offsets_of(axes: Iterable[Axis]) -> np.ndarray:
    """int64 (n, 2): bytes at the source and at the destination from the first index of `axes` to each, the last axis
    the fastest."""
    offsets = np.zeros((1, 2), np.int64)
    for axis in axes:
        steps = np.arange(axis.size, dtype=np.int64)[:, None] * np.array([axis.src, axis.dst], np.int64)
        offsets = (offsets[:, None] + steps).reshape(-1, 2)
    return offsets


def _all_runs(jobs: Jobs) -> tuple[np.ndarray, np.ndarray]:
    """Address of the first byte, at the source, and bytes of every run."""
    starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for form, numbers in jobs.grouped().items():
        found = (jobs.src[numbers][:, None] + offsets_of(form.axes)[:, 0]).reshape(-1)
        starts.append(found)
        lengths.append(np.full(len(found), form.run))
    return np.concatenate(starts), np.concatenate(lengths)


def merged(jobs: Jobs, room: np.ndarray) -> Jobs:
    """The same bytes in fewer copies: copies of one form whose addresses grow by constant steps become one.

    Args:
        room: int64, one a copy: only copies of one room are merged. What lies between the boxes of a merged copy must
            be one allocation at either end, or engines refuse it.
    """
    parts = [_merged(jobs.take(np.flatnonzero(room == number))) for number in np.unique(room).tolist()]
    return Jobs.all_of(parts) if parts else jobs


def _merged(jobs: Jobs) -> Jobs:
    while len(fewer := _merged_once(jobs)) < len(jobs):
        jobs = fewer
    return jobs


def _merged_once(jobs: Jobs) -> Jobs:
    src: list[int] = []
    dst: list[int] = []
    forms: list[Form] = []
    for form, numbers in jobs.grouped().items():
        if len(numbers) == 1:
            src.append(int(jobs.src[numbers[0]]))
            dst.append(int(jobs.dst[numbers[0]]))
            forms.append(form)
            continue
        order = numbers[np.argsort(jobs.dst[numbers], kind="stable")]
        steps = np.diff(np.column_stack([jobs.src[order], jobs.dst[order]]), axis=0)
        for first, count in _runs(steps, form.run):
            src.append(int(jobs.src[order[first]]))
            dst.append(int(jobs.dst[order[first]]))
            forms.append(form if count == 1 else _repeated(form, count, *steps[first].tolist()))
    return Jobs(np.array(src, np.int64), np.array(dst, np.int64), tuple(forms))


def _runs(steps: np.ndarray, least: int) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbours that are equal steps, (n - 1, 2), apart; steps of less than `least` part them."""
    last = len(steps)
    equal = np.append((steps[1:] == steps[:-1]).all(axis=1), False)
    apart = (steps.min(axis=1, initial=MAX_PITCH) >= least) & (steps.max(axis=1, initial=0) <= MAX_PITCH)
    ends = np.flatnonzero(~equal)  # the last step of each series of equal ones
    first = 0
    while first <= last:
        count = 1
        if first < last and apart[first]:
            count += int(ends[np.searchsorted(ends, first)]) - first + 1
        yield first, count
        first += count


def _repeated(form: Form, count: int, src: int, dst: int) -> Form:
    axes = Axis(count, src, dst), *form.axes, Axis(form.run // form.item, form.item, form.item)
    return form_of(
        tuple(axis.size for axis in axes), tuple(axis.src for axis in axes), tuple(axis.dst for axis in axes), form.item
    )


def jobs_of(
    plan: RefitPlan,
    copies: CopyTable,
    indices: Sequence[int] | np.ndarray,
    source: tuple[Layout, Rows],
    landing: tuple[Layout, Rows],
) -> Jobs:
    """Resolve copies `indices` of `copies` to addresses; `source` and `landing` say where the rows of each end are."""
    chosen = np.asarray(indices, np.int64)
    src, src_strides = _ends(copies, chosen, copies.src_row[chosen], *source)
    dst, dst_strides = _ends(copies, chosen, copies.dst_row[chosen], *landing)
    item = plan.item_bytes[copies.tensor[chosen]]
    columns = (copies.sizes[chosen], src_strides, dst_strides)
    keys = zip(*(map(tuple, column.tolist()) for column in columns), item.tolist(), strict=True)
    return Jobs(src, dst, tuple(form_of(*key) for key in keys))


def _ends(
    copies: CopyTable, chosen: np.ndarray, row: np.ndarray, layout: Layout, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Address of the first byte of each chosen copy, and its strides, in as many axes as `copies` has."""
    ndim = min(layout.offsets.shape[1], copies.offsets.shape[1])  # axes beyond have offset 0 and size 1
    inner = (copies.offsets[chosen, :ndim] - layout.offsets[row, :ndim]) * rows.strides[row, :ndim]
    strides = np.zeros((len(chosen), copies.offsets.shape[1]), np.int64)
    strides[:, :ndim] = rows.strides[row, :ndim]
    return rows.address[row] + inner.sum(axis=1), strides


@dataclass(frozen=True, eq=False)
class Places:
    """Where copies lie at one end: of each, address, bytes, size of an element, and sizes and strides in bytes.

    `packed` are the strides of a contiguous row-major box; `dense` is whether the copy is one.
    """

    address: np.ndarray
    num_bytes: np.ndarray
    item: np.ndarray
    sizes: np.ndarray
    strides: np.ndarray
    packed: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        found: np.ndarray = ((self.strides == self.packed) | (self.sizes == 1)).all(axis=1)
        return found

    def take(self, chosen: np.ndarray) -> Places:
        """Of copies `chosen`, in that order."""
        return Places(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def into(self, base: int) -> Jobs:
        """Copies that pack the boxes one after another into a buffer at address `base`."""
        return Jobs(self.address, self._behind(base), self._forms(self.strides, self.packed))

    def out_of(self, base: int) -> Jobs:
        """Copies that spread what `into` packed."""
        return Jobs(self._behind(base), self.address, self._forms(self.packed, self.strides))

    def _behind(self, base: int) -> np.ndarray:
        found: np.ndarray = base + np.cumsum(self.num_bytes) - self.num_bytes
        return found

    def _forms(self, src: np.ndarray, dst: np.ndarray) -> tuple[Form, ...]:
        columns = (self.sizes, src, dst)
        keys = zip(*(map(tuple, column.tolist()) for column in columns), self.item.tolist(), strict=True)
        return tuple(form_of(*key) for key in keys)


def places(
    plan: RefitPlan, copies: CopyTable, chosen: np.ndarray, row: np.ndarray, layout: Layout, rows: Rows
) -> Places:
    """Where copies `chosen` lie at the end whose rows `row` (one a copy) are of `layout` and lie as `rows` says."""
    address, strides = _ends(copies, chosen, row, layout, rows)
    item = plan.item_bytes[copies.tensor[chosen]]
    sizes = copies.sizes[chosen]
    grown = np.concatenate([sizes, np.ones((len(chosen), 1), np.int64)], axis=1)[:, ::-1].cumprod(axis=1)[:, ::-1]
    return Places(address, grown[:, 0] * item, item, sizes, strides, grown[:, 1:] * item[:, None])
