"""Which pieces of a refit arrived as the trainers hold them: digests of both ends, compared copy by copy.

Trainer replicas are compared with each other too: where they differ, no generator can be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.digest import digest_view
from nemo_rl.refit.layout import Holding, Layout
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


@dataclass(frozen=True, eq=False)
class Replicas:
    """Source rows whose box several trainers hold, ordered by rank and row; rows of one `group` are equal."""

    rank: np.ndarray
    row: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, plan: RefitPlan, sources: Mapping[int, Layout]) -> Replicas:
        """Boxes that are equal; boxes that merely overlap are not compared."""
        index = {name: i for i, name in enumerate(plan.table)}
        ndim = max((len(m.shape) for m in plan.table.values()), default=0)
        held = Boxes.of(sources, index, ndim)
        key = np.column_stack([held.tensor, held.offsets, held.sizes])
        _, group, count = np.unique(key, axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        rows = np.flatnonzero(count[group] > 1)
        rows = rows[np.lexsort((held.row[rows], held.rank[rows]))]
        return cls(held.rank[rows], held.row[rows], group[rows])


def source_digests(plan: RefitPlan, rank: int, holdings: Sequence[Holding], replicas: Replicas) -> np.ndarray:
    """Digest of every copy that `rank` sends (bulk in table order, then misc) and of every row that it shares.

    Returns:
        int64, one a copy, then one a row of `replicas`; equal pieces are read once.
    """
    seen: dict[tuple[int, Region], int] = {}

    def digest(row: int, region: Region) -> int:
        if (row, region) not in seen:
            holding = holdings[row]
            seen[row, region] = digest_view(holding.view[region.slices_in(holding.region)], region)
        return seen[row, region]

    found = [
        digest(int(copies.src_row[index]), plan.region(copies, index))
        for copies in (plan.bulk, plan.misc)
        for index in np.flatnonzero(copies.src_rank == rank).tolist()
    ]
    found += [digest(row, holdings[row].region) for row in replicas.row[replicas.rank == rank].tolist()]
    return np.array(found, np.int64)


def replica_differences(
    plan: RefitPlan, held: Mapping[int, np.ndarray], sources: Mapping[int, Layout], replicas: Replicas
) -> list[str]:
    """Boxes that trainers hold with different bytes, each with the parameter, region and ranks."""
    shared = np.zeros(len(replicas.rank), np.int64)
    for rank, digests in held.items():
        mine = np.flatnonzero(replicas.rank == rank)
        shared[mine] = digests[len(digests) - len(mine) :]
    first: dict[int, int] = {}
    wrong = []
    for i, group in enumerate(replicas.group.tolist()):
        one = first.setdefault(group, i)
        if shared[i] != shared[one]:
            layout, row = sources[int(replicas.rank[i])], int(replicas.row[i])
            wrong.append(
                f"{layout.fqn(row)} {layout.region(row)}: {plan.world.describe(int(replicas.rank[one]))} holds digest "
                f"{shared[one]}, its replica {plan.world.describe(int(replicas.rank[i]))} {shared[i]}"
            )
    return wrong


def differences(
    plan: RefitPlan,
    rank: int,
    held: Mapping[int, np.ndarray],
    bulk: Mapping[int, int],
    misc: Mapping[int, int],
) -> list[str]:
    """What differs on generator `rank`, each with parameter, region and both ranks.

    Args:
        held: trainer rank -> its `source_digests`.
        bulk, misc: copy -> digest of what landed on this rank; a copy without one differs.
    """
    due = np.flatnonzero(plan.bulk.dst_rank == rank).tolist()
    start = dict.fromkeys(held, 0)
    wrong = _compare(plan, rank, plan.bulk, due, bulk, held, start)
    start = {r: int((plan.bulk.src_rank == r).sum()) for r in held}
    return wrong + _compare(plan, rank, plan.misc, list(range(len(plan.misc))), misc, held, start)


def _compare(
    plan: RefitPlan,
    rank: int,
    copies: CopyTable,
    due: list[int],
    landed: Mapping[int, int],
    held: Mapping[int, np.ndarray],
    start: Mapping[int, int],
) -> list[str]:
    position = np.zeros(len(copies), np.int64)
    for source, first in start.items():
        rows = np.flatnonzero(copies.src_rank == source)
        position[rows] = first + np.arange(len(rows))
    wrong = []
    for index in due:
        source = int(copies.src_rank[index])
        want, got = int(held[source][position[index]]), landed.get(index)
        if got != want:
            copy = plan.copy(copies, index)
            wrong.append(
                f"{copy.fqn} {copy.region}: {plan.world.describe(source)} holds digest {want}, "
                f"{plan.world.describe(rank)} has {got}"
            )
    return wrong
