"""Random layouts and an oracle that shares no code with the planner: plain NumPy index sets."""

from __future__ import annotations

import random

import numpy as np
import torch

from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.region import Region

from .simulated import make_table

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


def random_table(rng: random.Random, count: int) -> TensorTable:
    def shape() -> tuple[int, ...]:
        return tuple(rng.choice((1, 2, 3, 5, 8, 13)) for _ in range(rng.randint(0, 3)))

    return make_table({f"layers.{i}.w{rng.randint(0, 99)}": (shape(), rng.choice(DTYPES)) for i in range(count)})


def cuts(rng: random.Random, size: int, parts: int) -> list[tuple[int, int]]:
    """`parts` consecutive ranges of `size`, uneven, some empty."""
    marks = sorted(rng.randint(0, size) for _ in range(parts - 1))
    return list(zip([0, *marks], [*marks, size], strict=True))


def shard_out(rng: random.Random, table: TensorTable, ranks: int) -> list[list[tuple[str, Region]]]:
    """Each tensor sharded along a random axis over some ranks (uneven, empty shards) or replicated on some."""
    rows: list[list[tuple[str, Region]]] = [[] for _ in range(ranks)]
    for fqn, meta in table.items():
        if not meta.shape or rng.random() < 0.3:
            for rank in rng.sample(range(ranks), rng.randint(1, ranks)):
                rows[rank].append((fqn, Region.whole(meta.shape)))
            continue
        axis = rng.randrange(len(meta.shape))
        order = rng.sample(range(ranks), ranks)
        for rank, (lo, hi) in zip(order, cuts(rng, meta.shape[axis], ranks), strict=True):
            offsets, sizes = [0] * len(meta.shape), list(meta.shape)
            offsets[axis], sizes[axis] = lo, hi - lo
            rows[rank].append((fqn, Region(tuple(offsets), tuple(sizes))))
    return rows


def elements(region: Region, shape: tuple[int, ...]) -> set[int]:
    """Linear indices of a region's elements, by brute force."""
    grid = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    return set(
        grid[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))].reshape(-1).tolist()
    )
