"""DTensors in and out of refits: mesh and placements as regions, and one call that moves DTensor to DTensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from nemo_rl.refit.base import Declaration, RefitOptions, RefitReport, World
from nemo_rl.refit.control import Address
from nemo_rl.refit.layout import Holding, Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession


def shard_region(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> Region:
    """The region of a tensor of `shape` that the rank at `coordinate` of a mesh holds.

    Sharding follows torch.chunk, mesh axes from the first to the last: blocks of `ceil(size / parts)`, the last ones
    short or empty.

    Raises:
        ValueError: a placement other than Shard and Replicate, or lengths that differ.
    """
    if not len(mesh_shape) == len(coordinate) == len(placements):
        raise ValueError(
            f"mesh {tuple(mesh_shape)}, coordinate {tuple(coordinate)}, placements {tuple(placements)} differ"
        )
    offsets, sizes = [0] * len(shape), list(shape)
    for parts, at, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise ValueError(f"placement {placement} is neither Shard nor Replicate; redistribute the tensor first")
        dim = placement.dim % len(shape)
        block = -(-sizes[dim] // parts)
        start = min(at * block, sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(start + block, sizes[dim]) - start
    return Region(tuple(offsets), tuple(sizes))


def holding_of(fqn: str, tensor: DTensor) -> Holding | None:
    """What this rank holds of `tensor`, or None outside its mesh. Raises ValueError as `shard_region`."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    local = tensor.to_local().detach()
    region = shard_region(tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate, tensor.placements)
    return Holding(fqn, region, local.view(region.sizes) if local.numel() == 0 else local)


def layout_of(tensors: Mapping[str, DTensor]) -> Layout:
    """The layout of this rank's part of `tensors`."""
    holdings = [h for h in (holding_of(f, t) for f, t in tensors.items()) if h is not None]
    return Layout.from_holdings(holdings, _table(tensors))


def _table(tensors: Mapping[str, DTensor]) -> TensorTable:
    return {f: TensorMeta(tuple(tensors[f].shape), tensors[f].dtype) for f in natural_order(tensors)}


@dataclass(frozen=True, slots=True)
class DTensorSource:
    """A rank's side of `src`."""

    tensors: Mapping[str, DTensor]

    def table(self) -> TensorTable:
        return _table(self.tensors)

    def holdings(self) -> list[Holding]:
        return [h for h in (holding_of(f, t) for f, t in self.tensors.items()) if h is not None]

    def unused(self) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class DTensorLanding:
    """A rank's side of `dst`: bytes land in the local shards."""

    tensors: Mapping[str, DTensor]
    version: int | None = None

    def _holdings(self) -> list[Holding]:
        return DTensorSource(self.tensors).holdings()

    def declare(self, table: TensorTable) -> Declaration:
        return Declaration(Layout.from_holdings(self._holdings(), _table(self.tensors)))

    def begin(self, version: int) -> None:
        return None

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return {row: holding.view for row, holding in enumerate(self._holdings())}

    def close(self, unit: int) -> None:
        return None

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("a DTensor is always bulk")

    def finish(self) -> None:
        return None

    def commit(self, version: int) -> None:
        return None

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
) -> RefitReport:
    """Copy the values of `src` into the local shards of `dst`; every rank of `world` calls it once per `store`.

    Args:
        src: on a rank of `world.trainers`, its source tensor or tensors by name; None elsewhere.
        dst: on a rank of `world.generators`, its destination(s), same names, shapes and dtypes; None elsewhere.
        rank, world: who calls, and which ranks hold which side. Meshes may be disjoint or overlap.
        store: (host, port) of a TCPStore used for this call alone, or a store in hand.

    Returns:
        This rank's report: bytes moved, verified, seconds.

    Raises:
        ValueError: a placement that is no plain shard.
        RefitError: the two sides do not meet, a rank failed, or bytes differ.
    """
    source = None if src is None else DTensorSource(_named(src))
    landing = None if dst is None else DTensorLanding(_named(dst))
    session = RefitSession(rank, world, store, options or RefitOptions(), source, landing)
    try:
        session.connect()
        session.plan()
        return session.refit(0)
    finally:
        session.close()


def _named(tensors: DTensor | Mapping[str, DTensor]) -> Mapping[str, DTensor]:
    return {"tensor": tensors} if isinstance(tensors, DTensor) else tensors
