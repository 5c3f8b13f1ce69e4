"""Ranks in groups that a picture can show: all of them where they are few, else by the mesh axes that matter most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.planview.model import RankView


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks drawn as one.

    Attributes:
        label: short, such as `pp 3` or a rank's number.
        members: indices into the side's ranks, in order.
    """

    label: str
    members: tuple[int, ...]


def groups_of(ranks: Sequence[RankView], limit: int) -> list[Group]:
    """At most `limit` groups: single ranks if they are no more, else ranks that agree on as many mesh axes as fit.

    Ranks without enough in common go by host, or in runs of equal length.
    """
    if len(ranks) <= limit:
        return [Group(_short(rank, i), (i,)) for i, rank in enumerate(ranks)]
    axes = list(ranks[0].at)
    best: list[Group] = []
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            found = _by(ranks, chosen)
            if len(best) < len(found) <= limit:
                best = found
    if len(best) > 1:
        return best
    hosts = [Group(f"node {node}", tuple(found)) for node, found in _hosts(ranks).items()]
    return hosts if 1 < len(hosts) <= limit else _runs(ranks, limit)


def _hosts(ranks: Sequence[RankView]) -> dict[int, list[int]]:
    hosts: dict[int, list[int]] = {}
    for i, rank in enumerate(ranks):
        hosts.setdefault(rank.node, []).append(i)
    return hosts


def _short(rank: RankView, index: int) -> str:
    at = " ".join(f"{axis}{i}" for axis, i in rank.at.items())
    return f"{index} · {at}" if at else str(index)


def _by(ranks: Sequence[RankView], axes: Sequence[str]) -> list[Group]:
    members: dict[tuple[int, ...], list[int]] = {}
    for i, rank in enumerate(ranks):
        members.setdefault(tuple(rank.at[axis] for axis in axes), []).append(i)
    return [
        Group(" ".join(f"{axis}{i}" for axis, i in zip(axes, key, strict=True)), tuple(found))
        for key, found in sorted(members.items())
    ]


def _runs(ranks: Sequence[RankView], limit: int) -> list[Group]:
    least = -(-len(ranks) // limit)
    size = next((n for n in range(least, 2 * least) if len(ranks) % n == 0), least)
    starts = range(0, len(ranks), size)
    return [
        Group(f"{low}–{min(low + size, len(ranks)) - 1}", tuple(range(low, min(low + size, len(ranks)))))
        for low in starts
    ]


def between(matrix: np.ndarray, rows: Sequence[Group], columns: Sequence[Group]) -> np.ndarray:
    """Bytes between groups: the sums of `matrix` over their members."""
    row, column = _owner(rows, matrix.shape[0]), _owner(columns, matrix.shape[1])
    out = np.zeros((len(rows), len(columns)), np.int64)
    np.add.at(out, (row[:, None], column[None, :]), matrix)
    return out


def _owner(groups: Sequence[Group], size: int) -> np.ndarray:
    owner = np.full(size, -1)
    for i, group in enumerate(groups):
        owner[list(group.members)] = i
    return owner
