"""DTensors in and out of refits: mesh and placements as regions, and one call that moves DTensor to DTensor.

`xferdtensor` is for one transfer. Repeated ones (plan once, refit many) are a `RefitSession` over `DTensorSource` and
`DTensorLanding`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from nemo_rl.refit.base import Declaration, RefitOptions, RefitReport, World
from nemo_rl.refit.control import Address
from nemo_rl.refit.layout import Holding, Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession

Run = tuple[int, int]
"""Consecutive indices of one dim: first index and count."""


def shard_runs(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[list[Run]]:
    """For each dim of a tensor of `shape`, the indices that the rank at `coordinate` of a mesh holds, in local order.

    Mesh axes shard from the first to the last, as torch.chunk splits: blocks of `ceil(size / parts)`, the last ones
    short or empty. `_StridedShard` (FSDP2 over tensor parallelism) takes the same block out of each of `split_factor`
    parts. A dim without indices has the one run `(0, 0)`.

    Raises:
        ValueError: a placement of another kind, a dim that the tensor lacks, or lengths that differ.
    """
    if not len(mesh_shape) == len(coordinate) == len(placements):
        raise ValueError(
            f"mesh {tuple(mesh_shape)}, coordinate {tuple(coordinate)}, placements {tuple(placements)} differ in length"
        )
    runs: list[list[Run]] = [[(0, size)] for size in shape]
    for parts, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard and type(placement) is not _StridedShard:
            raise ValueError(f"placement {placement} is neither Shard nor Replicate; redistribute the tensor first")
        if not -len(shape) <= placement.dim < len(shape):
            raise ValueError(f"placement {placement} names a dim that shape {tuple(shape)} lacks")
        factor = int(placement.split_factor) if type(placement) is _StridedShard else 1
        dim = placement.dim % len(shape)
        runs[dim] = [run for whole in range(factor) for run in _chunk(_chunk(runs[dim], factor, whole), parts, at)]
    return [_joined(r) for r in runs]


def _chunk(runs: Sequence[Run], parts: int, at: int) -> list[Run]:
    """Chunk `at` of `parts` of the indices of `runs`, read as one list."""
    total = sum(count for _, count in runs)
    block = -(-total // parts)
    low, high = min(at * block, total), min((at + 1) * block, total)
    out, base = [], 0
    for start, count in runs:
        first, last = max(low, base), min(high, base + count)
        if first < last:
            out.append((start + first - base, last - first))
        base += count
    return out


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Runs that continue each other as one."""
    out: list[Run] = []
    for start, count in runs:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + count)
        else:
            out.append((start, count))
    return out or [(0, 0)]


def shard_regions(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[tuple[Region, Region]]:
    """The boxes of a tensor that a rank holds, each with its place in the local shard: (global, local).

    One box but for strided shards that do not divide evenly. Arguments and errors as of `shard_runs`.
    """
    return _boxes(shard_runs(shape, mesh_shape, coordinate, placements))


def _boxes(runs: Sequence[Sequence[Run]]) -> list[tuple[Region, Region]]:
    starts = [itertools.accumulate((n for _, n in dim), initial=0) for dim in runs]
    placed = [list(zip(dim, at, strict=False)) for dim, at in zip(runs, starts, strict=True)]
    out = []
    for box in itertools.product(*placed):
        sizes = tuple(count for (_, count), _ in box)
        offsets, local = tuple(start for (start, _), _ in box), tuple(at for _, at in box)
        out.append((Region(offsets, sizes), Region(local, sizes)))
    return out


def layout_on_mesh(
    table: TensorTable,
    placements: Mapping[str, Sequence[Placement]],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
) -> Layout:
    """The layout of the rank at `coordinate` of a mesh, without the tensors: for planning on other ranks.

    Args:
        table: the tensors.
        placements: fqn -> one placement for each mesh axis.

    Raises:
        ValueError: as `shard_runs`; a name that the table lacks.
    """
    rows = [
        (fqn, region)
        for fqn, places in placements.items()
        for region, _ in shard_regions(table[fqn].shape if fqn in table else (), mesh_shape, coordinate, places)
    ]
    return Layout.from_regions(rows, table)


def holdings_of(fqn: str, tensor: DTensor) -> list[Holding]:
    """What this rank holds of `tensor`: views of its local shard; none outside the mesh.

    Raises:
        ValueError: as `shard_runs`; the local shard does not have the shape that mesh and placements say.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    local = tensor.to_local().detach()
    where = f"{fqn}: mesh {tuple(tensor.device_mesh.shape)}, coordinate {tuple(coordinate)}"
    try:
        runs = shard_runs(tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate, tensor.placements)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    want = tuple(sum(count for _, count in dim) for dim in runs)
    if math.prod(want) == 0 == local.numel():  # torch gives empty shards other shapes
        local = local.reshape(want)
    if tuple(local.shape) != want:
        raise ValueError(
            f"{where}: the local shard has shape {tuple(local.shape)}, placements {tensor.placements} of "
            f"{tuple(tensor.shape)} give {want}; shard as torch.chunk does"
        )
    whole = Region.whole(want)
    return [Holding(fqn, region, local[at.slices_in(whole)]) for region, at in _boxes(runs)]


def layout_of(tensors: Mapping[str, DTensor]) -> Layout:
    """The layout of this rank's part of `tensors`. Raises ValueError as `holdings_of`."""
    return Layout.from_holdings(_holdings(tensors), table_of(tensors))


def table_of(tensors: Mapping[str, DTensor]) -> TensorTable:
    """Shape and dtype of the whole tensors."""
    return {f: TensorMeta(tuple(tensors[f].shape), tensors[f].dtype) for f in natural_order(tensors)}


def _holdings(tensors: Mapping[str, DTensor]) -> list[Holding]:
    return [holding for fqn in natural_order(tensors) for holding in holdings_of(fqn, tensors[fqn])]


class DTensorSource:
    """A rank's side of `src`; see `nemo_rl.refit.base.Source`.

    Args:
        tensors: what this rank has, by name.
        table: every tensor that travels, equal on all source ranks; needed where ranks have different tensors.
    """

    def __init__(self, tensors: Mapping[str, DTensor], table: TensorTable | None = None) -> None:
        self._tensors = dict(tensors)
        self._table = table_of(tensors) if table is None else dict(table)

    def table(self) -> TensorTable:
        return dict(self._table)

    def holdings(self) -> list[Holding]:
        return _holdings(self._tensors)

    def unused(self) -> Mapping[str, str]:
        return {}


class DTensorLanding:
    """A rank's side of `dst`: bytes land in the local shards; see `nemo_rl.refit.base.Landing`."""

    def __init__(self, tensors: Mapping[str, DTensor]) -> None:
        self._tensors = dict(tensors)
        self.version: int | None = None

    def declare(self, table: TensorTable) -> Declaration:
        return Declaration(layout_of(self._tensors))

    def begin(self, version: int) -> None:
        return None

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return {row: holding.view for row, holding in enumerate(_holdings(self._tensors))}

    def close(self, unit: int) -> None:
        return None

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for fqn, whole in tensors:
            for holding in holdings_of(fqn, self._tensors[fqn]):
                holding.view.copy_(whole[holding.region.slices_in(Region.whole(tuple(whole.shape)))])

    def finish(self) -> None:
        return None

    def commit(self, version: int) -> None:
        self.version = version

    def reject(self, reason: str) -> None:
        return None


def xferdtensor(
    src: DTensor | Mapping[str, DTensor] | None,
    dst: DTensor | Mapping[str, DTensor] | None,
    *,
    rank: int,
    world: World,
    store: Address,
    options: RefitOptions | None = None,
    table: TensorTable | None = None,
) -> RefitReport:
    """Copy the values of `src` into the local shards of `dst`; every rank of `world` calls it once per `store`.

    Args:
        src: on a rank of `world.trainers`, its source tensor or tensors by name; None elsewhere.
        dst: on a rank of `world.generators`, its destination(s), same names, shapes and dtypes; None elsewhere.
        rank, world: who calls, and which ranks hold which side. Meshes may be disjoint or overlap.
        store: (host, port) of a TCPStore used for this call alone, or a store in hand.
        table: every tensor that travels, where source ranks hold different ones (pipeline stages).

    Returns:
        This rank's report: bytes moved, verified, seconds.

    Raises:
        ValueError: a placement that is no shard, local shards on several devices, or `src` and `dst` in one storage.
        RefitError: the two sides do not meet, a rank failed, or bytes differ.
    """
    source = None if src is None else DTensorSource(_named(src), table)
    landing = None if dst is None else DTensorLanding(_named(dst))
    if src is not None and dst is not None:
        _check_apart(_named(src), _named(dst))
    device = _device_of(tensor for side in (src, dst) if side is not None for tensor in _named(side).values())
    session = RefitSession(rank, world, store, options or RefitOptions(), source, landing, device)
    try:
        session.connect()
        session.plan()
        return session.refit(0)
    finally:
        session.close()


def _named(tensors: DTensor | Mapping[str, DTensor]) -> Mapping[str, DTensor]:
    return {"tensor": tensors} if isinstance(tensors, DTensor) else tensors


def _device_of(tensors: Iterable[DTensor]) -> torch.device:
    """Where local shards lie; the CPU where there is none. Raises ValueError where they lie on several devices."""
    found = {tensor.to_local().device for tensor in tensors}
    if len(found) > 1:
        raise ValueError(f"local shards lie on {' and '.join(sorted(map(str, found)))}; a rank has one device")
    return found.pop() if found else torch.device("cpu")


def _check_apart(src: Mapping[str, DTensor], dst: Mapping[str, DTensor]) -> None:
    """Raises ValueError where a destination lies in a source's storage, which would change while it is read."""
    held = {h.view.untyped_storage().data_ptr(): h.fqn for h in _holdings(src) if h.region.volume}
    for holding in _holdings(dst):
        other = held.get(holding.view.untyped_storage().data_ptr())
        if other is not None and holding.region.volume:
            raise ValueError(f"dst {holding.fqn} lies in the storage of src {other}; give it memory of its own")
