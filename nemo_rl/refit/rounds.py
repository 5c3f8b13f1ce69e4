"""Rounds that pair ranks: exact edge coloring of the bipartite multigraph of messages."""

from __future__ import annotations

from itertools import count

import numpy as np


def color_edges(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Color edges so that no two edges at a sender, and no two at a receiver, share a color.

    Senders and receivers are separate sides even where the numbers are equal. The number of colors is the largest
    degree, which is the least possible (König); found by swapping two colors along alternating paths.

    Args:
        src, dst: the two ends of each edge, parallel edges allowed.

    Returns:
        The color of each edge, starting at 0.
    """
    colors = np.full(len(src), -1, np.int64)
    at: dict[tuple[int, int], dict[int, int]] = {}  # (side, rank) -> color -> edge

    def first_free(side: int, rank: int) -> int:
        used = at.setdefault((side, rank), {})
        return next(color for color in count() if color not in used)

    for edge in range(len(src)):
        ends = (int(src[edge]), int(dst[edge]))
        free = (first_free(0, ends[0]), first_free(1, ends[1]))
        if free[0] != free[1]:
            _swap_path(at, colors, src, dst, start=ends[1], keep=free[1], take=free[0])
        color = free[0]
        colors[edge] = color
        at[0, ends[0]][color] = edge
        at[1, ends[1]][color] = edge
    return colors


def _swap_path(
    at: dict[tuple[int, int], dict[int, int]],
    colors: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    *,
    start: int,
    keep: int,
    take: int,
) -> None:
    """Free color `take` at receiver `start` by exchanging `take` and `keep` along its alternating path."""
    path, side, rank, color = [], 1, start, take
    while (edge := at.get((side, rank), {}).get(color)) is not None:
        path.append(edge)
        rank = int(src[edge]) if side == 1 else int(dst[edge])
        side, color = 1 - side, take + keep - color
    for edge in path:
        del at[0, int(src[edge])][int(colors[edge])]
        del at[1, int(dst[edge])][int(colors[edge])]
    for edge in path:
        colors[edge] = take + keep - int(colors[edge])
        at.setdefault((0, int(src[edge])), {})[int(colors[edge])] = edge
        at.setdefault((1, int(dst[edge])), {})[int(colors[edge])] = edge
