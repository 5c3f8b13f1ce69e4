"""Rounds that pair ranks: exact edge coloring of the bipartite multigraph of messages."""

from __future__ import annotations

import numpy as np

_Table = dict[tuple[int, int], dict[int, int]]  # (side, rank) -> color -> edge


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
    degree = max(np.bincount(src).max(initial=0), np.bincount(dst).max(initial=0)) if len(src) else 0
    ends = [(0, int(r)) for r in np.unique(src)] + [(1, int(r)) for r in np.unique(dst)]
    at: _Table = {end: {} for end in ends}
    free: dict[tuple[int, int], set[int]] = {end: set(range(int(degree))) for end in ends}
    for edge in range(len(src)):
        u, v = (0, int(src[edge])), (1, int(dst[edge]))
        color, other = next(iter(free[u])), next(iter(free[v]))
        if color not in free[v]:
            _swap_path(at, free, colors, src, dst, start=v, take=color, keep=other)
        colors[edge] = color
        for end in (u, v):
            at[end][color] = edge
            free[end].remove(color)
    return colors


def _swap_path(
    at: _Table,
    free: dict[tuple[int, int], set[int]],
    colors: np.ndarray,
    src: np.ndarray,
    dst: np.ndarray,
    *,
    start: tuple[int, int],
    take: int,
    keep: int,
) -> None:
    """Free color `take` at receiver `start` by exchanging `take` and `keep` along its alternating path."""
    path, end, color = [], start, take
    while (edge := at[end].get(color)) is not None:
        path.append(edge)
        end = (0, int(src[edge])) if end[0] == 1 else (1, int(dst[edge]))
        color = take + keep - color
    for edge in path:
        for end in ((0, int(src[edge])), (1, int(dst[edge]))):
            old = int(colors[edge])
            del at[end][old]
            free[end].add(old)
    for edge in path:
        colors[edge] = take + keep - int(colors[edge])
        for end in ((0, int(src[edge])), (1, int(dst[edge]))):
            at[end][int(colors[edge])] = edge
            free[end].discard(int(colors[edge]))
