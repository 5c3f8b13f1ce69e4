"""Which tensors `nccl.m2n.reshard` can move, in how few calls, and why it cannot move the others.

Pure: what every rank says of its rows goes in, the same calls in the same order come out on every rank. The limits are
those of nccl-extensions 0.1.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemo_rl.refit.base import World
from nemo_rl.refit.layout import Layout, TensorMeta
from nemo_rl.refit.packed import pack, unpack

DTYPES = (
    *(torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16),
    *(torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64, torch.float64),
)
MAX_DIMS = 3
SLOT_BYTES = 512 << 20
"""Of m2n's pack buffer, which a shard must fit into; what it takes by default is 2 GiB a device."""

MAX_RANKS = 64
"""Of the communicator."""

MAX_SOURCES = 16
"""Shards of the source."""

LEAST_BYTES = 1 << 20
"""Into each destination; what a call has less of goes as parcels."""


@dataclass(frozen=True, eq=False)
class Said:
    """What one rank says of its rows in final storage, columnar: tensor number, box, address, storage, contiguous."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    address: np.ndarray
    room: np.ndarray
    dense: np.ndarray

    def to_bytes(self) -> bytes:
        return pack([], {name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def of(cls, layout: Layout, views: Mapping[int, torch.Tensor], numbers: Mapping[str, int]) -> Said:
        """Of rows of `layout` that lie in `views`; `numbers` are the plan's of its tensors."""
        rows = np.array(sorted(r for r in views if layout.names[layout.tensor[r]] in numbers), np.int64)
        own = [views[r] for r in rows.tolist()]
        return cls(
            np.array([numbers[layout.names[t]] for t in layout.tensor[rows].tolist()], np.int64),
            layout.offsets[rows],
            layout.sizes[rows],
            np.array([view.data_ptr() for view in own], np.int64),
            np.array([view.untyped_storage().data_ptr() for view in own], np.int64),
            np.array([view.is_contiguous() for view in own], bool),
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Said:
        return cls(**unpack(data)[1])


@dataclass(frozen=True, slots=True)
class Side:
    """A mesh of consecutive ranks from `start`, row-major; `dims` says which dim each axis shards (None: replicas)."""

    start: int
    mesh: tuple[int, ...]
    dims: tuple[int | None, ...]
    local: tuple[int, ...]

    @property
    def ranks(self) -> range:
        return range(self.start, self.start + math.prod(self.mesh))

    @property
    def shards(self) -> int:
        return math.prod(size for size, dim in zip(self.mesh, self.dims, strict=True) if dim is not None)

    def stacked(self, count: int, sources: int = 1) -> Side:
        """Of `count` such tensors along a new first dim, spread over `sources` neighbours where there are several."""
        if sources > 1:
            return Side(self.start, (sources,), (0,), (count // sources, *self.local))
        return Side(self.start, self.mesh, tuple(None if d is None else d + 1 for d in self.dims), (count, *self.local))


@dataclass(frozen=True, slots=True)
class Reshard:
    """One call: tensors of equal shape, stacked along a new first dim where they are several, from mesh to mesh.

    Attributes:
        address: rank -> of the first byte; a rank's part is contiguous.
    """

    tensors: tuple[int, ...]
    dtype: torch.dtype
    src: Side
    dst: Side
    address: Mapping[int, int]


_Row = tuple[tuple[int, ...], tuple[int, ...], int, int, bool]
"""Offsets, sizes, address, storage, contiguous."""

Rooms = Mapping[int, Mapping[int, int]]
"""rank -> tensor number -> storage."""


def reshards(
    metas: Sequence[TensorMeta], world: World, said: Mapping[int, Said], takers: Mapping[int, frozenset[int]]
) -> tuple[list[Reshard], dict[int, str]]:
    """(calls in the order of issue, tensor number -> why it is not among them).

    Args:
        said: of every rank.
        takers: tensor number -> ranks that receive a part of it.
    """
    if reason := _never(world):
        return [], dict.fromkeys(takers, reason)
    singles: list[Reshard] = []
    reasons: dict[int, str] = {}
    rows = {rank: _by_tensor(one) for rank, one in said.items()}
    for tensor, ranks in takers.items():
        found = _single(tensor, metas[tensor], {"source": world.trainers, "destination": sorted(ranks)}, rows)
        if isinstance(found, Reshard):
            singles.append(found)
        else:
            reasons[tensor] = found
    calls = []
    for call in _stacked(singles, {r: {i: rows[r][i][0][3] for i in rows[r]} for r in rows}):
        small = math.prod(call.dst.local) * call.dtype.itemsize
        if small < LEAST_BYTES:
            reasons |= dict.fromkeys(call.tensors, f"less than {LEAST_BYTES} bytes for a destination in one call")
        else:
            calls.append(call)
    return calls, reasons


def _never(world: World) -> str | None:
    """Why no tensor at all can go."""
    if world.shared:
        return f"ranks {list(world.shared)} are on both sides"
    if world.size > MAX_RANKS:
        return f"{world.size} ranks, {MAX_RANKS} are possible"
    if max(world.trainers) > min(world.generators):
        return "trainers' ranks do not come before generators'"
    return None


def _by_tensor(said: Said) -> dict[int, list[_Row]]:
    columns = (said.offsets, said.sizes, said.address, said.room, said.dense)
    found: dict[int, list[_Row]] = {}
    for tensor, offsets, sizes, *rest in zip(said.tensor.tolist(), *(c.tolist() for c in columns), strict=True):
        found.setdefault(tensor, []).append((tuple(offsets), tuple(sizes), *rest))
    return found


def _single(
    tensor: int,
    meta: TensorMeta,
    ranks: Mapping[str, Sequence[int]],
    rows: Mapping[int, Mapping[int, list[_Row]]],
) -> Reshard | str:
    """The call for one tensor alone, or why there is none."""
    if meta.dtype not in DTYPES:
        return f"dtype {meta.dtype}"
    if not 1 <= len(meta.shape) <= MAX_DIMS:
        return f"{len(meta.shape)} dims, 1 to {MAX_DIMS} are possible"
    sides: list[Side] = []
    address: dict[int, int] = {}
    for name, own in ranks.items():
        mine = {rank: rows[rank][tensor] for rank in own if tensor in rows[rank]}
        away = sorted(set(own) - set(mine)) if name == "destination" else []
        if away or not mine:
            return f"{name}: not in final storage on ranks {away or list(own)}"
        reason = next((text for rank, held in mine.items() if (text := _piece(rank, held))), None)
        side = reason or side_of({rank: held[0][:2] for rank, held in mine.items()}, meta.shape)
        if isinstance(side, str):
            return f"{name}: {side}"
        if math.prod(side.local) * meta.dtype.itemsize > SLOT_BYTES:
            return f"{name}: a shard of more than {SLOT_BYTES} bytes"
        if name == "source" and side.shards > MAX_SOURCES:
            return f"source: {side.shards} shards, {MAX_SOURCES} are possible"
        sides.append(side)
        address |= {rank: held[0][2] for rank, held in mine.items()}
    return Reshard((tensor,), meta.dtype, sides[0], sides[1], address)


def _piece(rank: int, rows: Sequence[_Row]) -> str | None:
    if len(rows) > 1:
        return f"in several pieces on rank {rank}"
    return None if rows[0][4] else f"not contiguous on rank {rank}"


def side_of(boxes: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> Side | str:
    """The mesh and placements that say who has which (offsets, sizes) of a tensor, or why there are none."""
    ranks, ndim = sorted(boxes), len(shape)
    if ranks != list(range(ranks[0], ranks[0] + len(ranks))):
        return f"ranks {ranks} are not consecutive"
    offsets = [boxes[r][0][:ndim] for r in ranks]
    sizes = {boxes[r][1][:ndim] for r in ranks}
    if len(sizes) > 1:
        return "uneven shards"
    (local,) = sizes
    split = [d for d in range(ndim) if local[d] != shape[d]]
    if not split:
        return Side(ranks[0], (len(ranks),), (None,), local)
    if len(split) > 1:
        return f"sharded along dims {split}"
    return _sharded(ranks, [o[split[0]] for o in offsets], local, shape, split[0])


def _sharded(
    ranks: list[int], offsets: list[int], local: tuple[int, ...], shape: tuple[int, ...], dim: int
) -> Side | str:
    """Of ranks whose shards along `dim` begin at `offsets`."""
    if not local[dim] or shape[dim] % local[dim] or any(o % local[dim] for o in offsets):
        return "uneven shards"
    parts, index = shape[dim] // local[dim], [o // local[dim] for o in offsets]
    times, left = divmod(len(ranks), parts)
    if times and not left:
        if index == [i // times for i in range(len(ranks))]:
            return Side(ranks[0], (parts, times) if times > 1 else (parts,), (dim, None)[: 1 + (times > 1)], local)
        if index == [i % parts for i in range(len(ranks))]:
            return Side(ranks[0], (times, parts), (None, dim), local)
    return f"ranks hold shards {index} of {parts}, which no mesh of two axes says"


def _stacked(singles: Sequence[Reshard], room: Rooms) -> Iterator[Reshard]:
    """The same tensors in fewer calls: those of one buffer at both ends together, experts of several sources too."""
    order = sorted(singles, key=lambda s: (room[s.dst.start][s.tensors[0]], s.address[s.dst.start]))
    runs: list[list[Reshard]] = []
    for one in order:
        if runs and _follows(runs[-1][-1], one, room) and len(runs[-1]) < _most(one):
            runs[-1].append(one)
        else:
            runs.append([one])
    series: list[list[list[Reshard]]] = []
    for run in runs:
        if series and _next_source(series[-1], run, room):
            series[-1].append(run)
        else:
            series.append([run])
    return map(_one_call, series)


def _most(one: Reshard) -> int:
    """How many such tensors a call takes."""
    return SLOT_BYTES // max(math.prod(side.local) * int(one.dtype.itemsize) for side in (one.src, one.dst))


def _follows(a: Reshard, b: Reshard, room: Rooms) -> bool:
    """Whether `b` begins where `a` ends on all their ranks."""
    return a.src == b.src and _adjacent(a, b, a.src, room) and _adjacent(a, b, a.dst, room)


def _adjacent(a: Reshard, b: Reshard, side: Side, room: Rooms) -> bool:
    if (a.dtype, a.dst, a.src.local) != (b.dtype, b.dst, b.src.local) or len(side.local) == MAX_DIMS:
        return False
    size = math.prod(side.local) * a.dtype.itemsize
    first, second = a.tensors[0], b.tensors[0]
    return all(a.address[r] + size == b.address[r] and room[r][first] == room[r][second] for r in side.ranks)


def _next_source(parts: Sequence[Sequence[Reshard]], run: Sequence[Reshard], room: Rooms) -> bool:
    """Whether `run` is as many tensors of the next rank, each whole on its rank, and goes where `parts` end."""
    last, first = parts[-1][-1], run[0]
    return (
        len(last.src.ranks) == len(first.src.ranks) == 1
        and first.src.start == last.src.start + 1
        and len(run) == len(parts[-1])
        and len(parts) < MAX_SOURCES
        and (len(parts) + 1) * len(run) * math.prod(first.dst.local) * first.dtype.itemsize <= SLOT_BYTES
        and _adjacent(last, first, first.dst, room)
    )


def _one_call(parts: Sequence[Sequence[Reshard]]) -> Reshard:
    first, count = parts[0][0], sum(map(len, parts))
    if count == 1:
        return first
    tensors = tuple(one.tensors[0] for part in parts for one in part)
    address = {r: part[0].address[r] for part in parts for r in part[0].src.ranks}
    address |= {r: first.address[r] for r in first.dst.ranks}
    return Reshard(tensors, first.dtype, first.src.stacked(count, len(parts)), first.dst.stacked(count), address)
