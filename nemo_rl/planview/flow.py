"""Where the nodes and bands of the ribbon drawing lie; the drawings share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.planview.groups import Group, between, groups_of
from nemo_rl.planview.model import PlanView

MAX_NODES = 16
"""Nodes a side."""
_GAP = 8.0
_ROW = 24.0
_PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#c9a100")


@dataclass(frozen=True, slots=True)
class Node:
    """A rank or a group of ranks: `top` from above, in points; `height` by its bytes."""

    group: Group
    top: float
    height: float


@dataclass(frozen=True, slots=True)
class Band:
    """Bytes from trainer node `row` to generator node `column`: `width` high, `left` and `right` its tops."""

    row: int
    column: int
    num_bytes: int
    left: float
    right: float
    width: float


@dataclass(frozen=True, slots=True)
class Flow:
    """The drawing, `height` points high."""

    trainers: tuple[Node, ...]
    generators: tuple[Node, ...]
    bands: tuple[Band, ...]
    height: float


def flow_of(view: PlanView) -> Flow:
    """Nodes are as high as the bytes of their bands, on one scale; a plan without bulk bytes has no bands."""
    rows, columns = groups_of(view.trainers, MAX_NODES), groups_of(view.generators, MAX_NODES)
    cells = between(view.matrix, rows, columns)
    most = max(len(rows), len(columns))
    height = _ROW * max(most, 10)
    scale = (height - _GAP * (most + 1)) / max(int(cells.sum()), 1)
    left = _nodes(rows, cells.sum(axis=1), scale, height)
    right = _nodes(columns, cells.sum(axis=0), scale, height)
    return Flow(left, right, tuple(_bands(cells, left, right, scale)), height)


def color(index: int) -> str:
    """Of the trainer node `index` and its bands."""
    return _PALETTE[index % len(_PALETTE)]


def _nodes(groups: Sequence[Group], totals: np.ndarray, scale: float, height: float) -> tuple[Node, ...]:
    heights = [max(scale * float(n), 1.0) for n in totals]
    gap = (height - sum(heights)) / (len(heights) + 1)
    out, top = [], gap
    for group, high in zip(groups, heights, strict=True):
        out.append(Node(group, top, high))
        top += high + gap
    return tuple(out)


def _bands(cells: np.ndarray, left: Sequence[Node], right: Sequence[Node], scale: float) -> list[Band]:
    """Each band leaves its trainer below the one before and reaches its generator below the one before."""
    below_left, below_right = [n.top for n in left], [n.top for n in right]
    out = []
    for i, j in zip(*np.nonzero(cells), strict=True):
        width = scale * float(cells[i, j])
        out.append(Band(int(i), int(j), int(cells[i, j]), below_left[i], below_right[j], width))
        below_left[i] += width
        below_right[j] += width
    return out
