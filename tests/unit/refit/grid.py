"""The grid of DTensor transfers: cases, and torch's own sharding as the oracle."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.bool, torch.complex64, torch.complex128),
)


@dataclass(frozen=True)
class Side:
    """Tensors on a mesh: `ranks` in the row-major order of `mesh`."""

    ranks: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        grid = itertools.product(*map(range, self.mesh))
        return dict(zip(self.ranks, grid, strict=True))[rank]

    def local(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """This rank's shard of `full`, cut by torch's own placements one mesh axis after the other."""
        part = full
        for placement, parts, at in zip(self.placements, self.mesh, self.coordinate(rank), strict=True):
            if not isinstance(placement, Replicate):
                part = placement._split_tensor(part, parts, with_padding=False, contiguous=False)[0][at]
        return part.clone()


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    src: Side
    dst: Side

    @property
    def num_ranks(self) -> int:
        return len(set(self.src.ranks) | set(self.dst.ranks))

    def full(self, seed: int) -> torch.Tensor:
        return random_full(self.shape, self.dtype, seed)


def random_full(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern; truth values where they are truth values."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(tuple(shape))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes, NaNs included."""
    flat = [t.contiguous().reshape(-1) for t in (a, b)]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(
        flat[0].view(torch.uint8), flat[1].view(torch.uint8)
    )


def random_side(rng: random.Random, ndim: int, ranks: Sequence[int], num_axes: int) -> Side:
    """A mesh over a part of `ranks` in any order, any placements, several axes on one dim among them."""
    mesh: list[int] = []
    for _ in range(num_axes):
        room = len(ranks) // math.prod(mesh)
        mesh.append(rng.randint(1, min(room, 4)))
    rng.shuffle(mesh)
    chosen = tuple(rng.sample(list(ranks), math.prod(mesh)))
    return Side(chosen, tuple(mesh), tuple(_placement(rng, ndim) for _ in mesh))


def _placement(rng: random.Random, ndim: int) -> Placement:
    if not ndim or rng.random() < 0.25:
        return Replicate()
    if rng.random() < 0.2:
        return _StridedShard(rng.randrange(ndim), split_factor=rng.choice((2, 3)))
    return Shard(rng.randrange(ndim))


def random_case(rng: random.Random, num_ranks: int) -> Case:
    """Meshes that are apart, overlap or are equal; every rank of `0 .. Case.num_ranks - 1` is on a side."""
    ndim = rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4))
    shape = tuple(rng.choice((1, 2, 3, 4, 5, 7, 8, 12) if ndim < 4 else (1, 2, 3, 5)) for _ in range(ndim))
    src = random_side(rng, ndim, range(num_ranks), rng.randint(1, 4))
    dst = random_side(rng, ndim, range(num_ranks), rng.randint(1, 4))
    number = {rank: i for i, rank in enumerate(sorted({*src.ranks, *dst.ranks}))}
    sides = [Side(tuple(number[r] for r in s.ranks), s.mesh, s.placements) for s in (src, dst)]
    return Case(shape, rng.choice(DTYPES), *sides)


def _side(ranks: str, mesh: tuple[int, ...], *placements: Placement) -> Side:
    return Side(tuple(map(int, ranks)), mesh, placements)


R, S0, S1, S2, S3 = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)
FSDP_TP = (_StridedShard(0, split_factor=2), S0)
"""Placements of an FSDP2 parameter that tensor parallelism cut on the same dim before."""

LAYOUTS: dict[str, tuple[tuple[int, ...], Side, Side]] = {
    "1-D, apart": ((10,), _side("01", (2,), S0), _side("23", (2,), S0)),
    "1-D, uneven to replicas": ((7,), _side("02", (2,), S0), _side("13", (2,), R)),
    "1-D, shards without rows": ((3,), _side("0123", (4,), S0), _side("3210", (4,), S0)),
    "2-D, rows to columns": ((10, 6), _side("01", (2,), S0), _side("23", (2,), S1)),
    "2-D, one to all": ((9, 8), _side("3", (1,), R), _side("0123", (2, 2), S0, S0)),
    "2-D, all to one": ((9, 8), _side("0123", (2, 2), S1, S0), _side("2", (1,), R)),
    "2-D, uneven by 3 to uneven by 4": ((10, 5), _side("012", (3,), S0), _side("0123", (4,), S0)),
    "2-D, two axes on one dim": ((13, 4), _side("0123", (2, 2), S0, S0), _side("0123", (4,), S0)),
    "2-D, order of axes": ((13, 4), _side("0213", (2, 2), S0, S0), _side("0123", (2, 2), S0, S0)),
    "2-D, FSDP2 over TP": ((16, 6), _side("0123", (2, 2), *FSDP_TP), _side("23", (2,), S0)),
    "2-D, FSDP2 over TP, uneven": ((13, 6), _side("0123", (2, 2), *FSDP_TP), _side("0123", (2, 2), S1, R)),
    "2-D, to FSDP2 over TP": ((11, 3), _side("01", (2,), S1), _side("0123", (2, 2), *FSDP_TP)),
    "2-D, HSDP": ((8, 8), _side("0123", (2, 2), R, S0), _side("0123", (2, 2), S1, R)),
    "2-D, meshes overlap in a rank": ((6, 6), _side("012", (3,), S0), _side("23", (2,), S1)),
    "3-D": ((5, 3, 4), _side("0123", (2, 2), S0, S2), _side("0123", (4,), S1)),
    "3-D, three axes": ((4, 6, 5), _side("0123", (2, 1, 2), S2, R, S1), _side("13", (1, 2, 1), S0, S2, S1)),
    "4-D": ((4, 6, 2, 3), _side("0123", (4,), S1), _side("12", (2,), S3)),
    "4-D, four axes": (
        (3, 2, 5, 4),
        _side("0123", (2, 2, 1, 1), S2, S3, S0, S1),
        _side("30", (1, 1, 1, 2), R, R, R, S2),
    ),
    "2-D, columns to rows": ((6, 11), _side("23", (2,), S1), _side("10", (2,), S0)),
    "3-D, two axes apart": ((4, 5, 6), _side("01", (1, 2), S0, S1), _side("32", (2, 1), S2, S0)),
    "4-D, apart": ((3, 2, 4, 2), _side("03", (2,), S2), _side("12", (2,), S0)),
    "0-D": ((), _side("01", (2,), R), _side("23", (2,), R)),
    "no elements": ((0, 4), _side("01", (2,), S1), _side("23", (2,), S0)),
    "one element": ((1,), _side("01", (2,), S0), _side("0123", (4,), S0)),
}

REAL_GRID = [
    (f"{name}, {dtype}, {transport}", Case(shape, dtype, src, dst), transport)
    for number, (name, (shape, src, dst)) in enumerate(LAYOUTS.items())
    for turn, transport in enumerate(("gloo", "peer", "golden", "broadcast"))
    for dtype in [DTYPES[(5 * number + turn) % len(DTYPES)]]
    if (transport != "golden" or number % 2) and (transport != "broadcast" or not set(src.ranks) & set(dst.ranks))
]
"""(name, case, transport) of every transfer between real processes. Whole tensors need the two sides apart."""
