"""Layouts in the words of DTensor: how each tensor lies over named mesh axes, as far as it is regular."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from nemo_rl.refit.dtensor import shard_runs
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable, natural_order

Axes = Mapping[str, int]
"""Name -> size of a mesh's axes, slowest first: ranks are in row-major order."""

IRREGULAR = "irregular"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ABSENT, _BOX, _PIECES = 0, 1, 2


def describe_layouts(layouts: Mapping[int, Layout], meshes: Sequence[Axes]) -> list[str]:
    """One line for each kind of tensor: name with `*` for numbers, shape, dtype, and how it lies on every axis.

    On an axis a tensor is `Replicate`, `Shard(dim)` as torch.chunk splits, `_StridedShard(dim)` (split after the axes
    behind it), `Shard(dim) uneven`, `Shard(dim) by n` (each shard on n neighbours), `one` (a single coordinate of the
    axis has it: a pipeline stage, an expert's rank) or `k of n` (so many have it whole). Axes of size 1 are left out.

    Args:
        layouts: by rank.
        meshes: ways to look at the same ranks, such as the dense and the expert mesh, in this order; each
            tensor is described over one on which it is regular, and is `irregular` where there is none.

    Raises:
        ValueError: the axes of a mesh do not multiply to the number of ranks.
    """
    for axes in meshes:
        if math.prod(axes.values()) != len(layouts):
            raise ValueError(f"mesh {dict(axes)} does not have {len(layouts)} ranks")
    distinct = {id(layout): layout for layout in layouts.values()}
    place_of = {key: i for i, key in enumerate(distinct)}
    which = [place_of[id(layouts[rank])] for rank in sorted(layouts)]
    table = {name: meta for layout in distinct.values() for name, meta in layout.table.items()}
    held = _held(list(distinct.values()), table)
    known: dict[bytes, str] = {}
    count: dict[tuple[str, TensorMeta, str], int] = {}
    for boxes, (name, meta) in zip(held, table.items(), strict=True):
        key = boxes.tobytes() + str(meta.shape).encode()
        if key not in known:
            known[key] = _describe(boxes[which], meta.shape, meshes)
        kind = (_NUMBER.sub("*", name), meta, known[key])
        count[kind] = count.get(kind, 0) + 1
    place = {pattern: i for i, pattern in enumerate(natural_order({pattern for pattern, _, _ in count}))}
    return [
        f"{pattern} {list(meta.shape)} {str(meta.dtype).removeprefix('torch.')} x {number}: {text}"
        for (pattern, meta, text), number in sorted(count.items(), key=lambda item: place[item[0][0]])
    ]


def _held(layouts: Sequence[Layout], table: TensorTable) -> np.ndarray:
    """int32 of (tensor, layout, 1 + 2 x dims): what is held of it (absent, a box, pieces), first and end indices."""
    index = {name: i for i, name in enumerate(table)}
    ndim = max((len(meta.shape) for meta in table.values()), default=0)
    out = np.zeros((len(table), len(layouts), 1 + 2 * ndim), np.int32)
    for at, layout in enumerate(layouts):
        tensors, boxes = _bounding(layout, index, ndim)
        out[tensors, at] = boxes
    return out


def _bounding(layout: Layout, index: Mapping[str, int], ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """Tensors that the layout has, and their rows of `_held`; rows that fill one box together count as that box."""
    rows = np.flatnonzero(layout.sizes.prod(axis=1) > 0) if len(layout) else np.zeros(0, np.int64)
    ids = np.array([index[name] for name in layout.names], np.int64)
    order = rows[np.argsort(layout.tensor[rows], kind="stable")]
    local, start = np.unique(layout.tensor[order], return_index=True)
    pad = ndim - layout.offsets.shape[1]
    low = np.pad(layout.offsets[order], ((0, 0), (0, pad)))
    size = np.pad(layout.sizes[order], ((0, 0), (0, pad)), constant_values=1)
    if not len(local):
        return local, np.zeros((0, 1 + 2 * ndim), np.int32)
    first, end = np.minimum.reduceat(low, start, axis=0), np.maximum.reduceat(low + size, start, axis=0)
    whole = np.add.reduceat(size.prod(axis=1), start) == (end - first).prod(axis=1)
    state = np.where(whole, _BOX, _PIECES)
    return ids[local], np.concatenate([state[:, None], first, end], axis=1).astype(np.int32)


def _describe(boxes: np.ndarray, shape: tuple[int, ...], meshes: Sequence[Axes]) -> str:
    """In the words of the mesh with the fewest single coordinates; of equals the first, or the last if there are any.

    Axes that all meshes have do not count.
    """
    common = set.intersection(*(set(axes) for axes in meshes))
    found: list[tuple[int, int, dict[str, str]]] = []
    for axes in meshes:
        used = {name: size for name, size in axes.items() if size > 1}
        words = _placements(boxes.reshape(*used.values(), -1), shape, used)
        if words is not None:
            alone = sum(word == "one" and name not in common for name, word in words.items())
            found.append((alone, -len(found) if alone else len(found), words))
    if not found:
        return IRREGULAR
    return ", ".join(f"{name} {word}" for name, word in min(found)[2].items()) or "one rank"


def _placements(grid: np.ndarray, shape: tuple[int, ...], axes: Axes) -> dict[str, str] | None:
    """Axis -> word; None where the tensor is not regular. The last axis of `grid` is a row of `_held`."""
    words: dict[str, str] = {}
    names = list(axes)
    for number, (name, count) in enumerate(axes.items()):
        others = tuple(i for i in range(len(names)) if i != number)
        there = np.flatnonzero((grid[..., 0] != _ABSENT).any(axis=others))
        grid = np.take(grid, there, axis=number)
        if len(there) < count:
            words[name] = "one" if len(there) == 1 else f"{len(there)} of {count}"
    if (grid[..., 0] != _BOX).any():
        return None
    ndim = (grid.shape[-1] - 1) // 2
    low, end = grid[..., 1 : 1 + ndim], grid[..., 1 + ndim :]
    for dim in range(ndim):
        ranges = np.stack([low[..., dim], end[..., dim]], axis=-1)
        varies = [i for i in range(len(names)) if (ranges != np.take(ranges, [0], axis=i)).any()]
        if not varies and (ranges.reshape(-1, 2)[0] != (0, shape[dim] if dim < len(shape) else 1)).any():
            return None
        line = ranges[tuple(slice(None) if i in varies else 0 for i in range(len(names)))]
        found = _along(line, shape, dim) if varies else []
        if found is None or any(names[i] in words for i in varies):
            return None
        words |= {names[i]: word for i, word in zip(varies, found, strict=True)}
    return {name: words.get(name, "Replicate") for name in axes}


def _along(line: np.ndarray, shape: tuple[int, ...], dim: int) -> list[str] | None:
    """One word for each axis of `line`, whose entries are the (first, end) of `dim` by coordinate."""
    sizes = line.shape[:-1]
    plain: list[Placement] = [Shard(dim) for _ in sizes]
    if _is_cut(line, shape, dim, plain):
        return [f"Shard({dim})"] * len(sizes)
    if len(sizes) == 2 and _is_cut(line, shape, dim, [_StridedShard(dim, split_factor=sizes[1]), Shard(dim)]):
        return [f"_StridedShard({dim})", f"Shard({dim})"]
    return _blocks(line.tolist(), shape[dim], dim) if len(sizes) == 1 else None


def _is_cut(line: np.ndarray, shape: tuple[int, ...], dim: int, placements: Sequence[Placement]) -> bool:
    """Whether every entry is what the placements give."""
    sizes = line.shape[:-1]
    return all(
        [(int(line[at][0]), int(line[at][1] - line[at][0]))] == shard_runs(shape, sizes, at, placements)[dim]
        for at in itertools.product(*map(range, sizes))
    )


def _blocks(line: Sequence[Sequence[int]], size: int, dim: int) -> list[str] | None:
    """Ranges that tile the dim in order, each on as many neighbours."""
    runs = [(tuple(key), len(list(group))) for key, group in itertools.groupby(line)]
    ends = [0, *(end for (_, end), _ in runs)]
    tiled = all(first == before for ((first, _), _), before in zip(runs, ends, strict=False)) and ends[-1] == size
    neighbours = {count for _, count in runs}
    if not tiled or len(neighbours) != 1:
        return None
    block, by = -(-size // len(runs)), neighbours.pop()
    even = all(end - first == block for (first, end), _ in runs[:-1]) and 0 < size - ends[-2] <= block
    return [f"Shard({dim})" + ("" if even else " uneven") + (f" by {by}" if by > 1 else "")]
