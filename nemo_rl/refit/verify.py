"""Which pieces of a refit arrived as the trainers hold them: digests of both ends, compared copy by copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from nemo_rl.refit.digest import digest_view
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


def source_digests(plan: RefitPlan, rank: int, view: Callable[[int, Region], torch.Tensor]) -> np.ndarray:
    """Digest of every copy that `rank` sends: bulk in table order, then misc. Equal pieces are read once.

    Args:
        view: (source row, region) -> view of exactly that region in this rank's storage.

    Returns:
        int64, one a copy.
    """
    seen: dict[tuple[int, Region], int] = {}
    found = []
    for copies in (plan.bulk, plan.misc):
        for index in np.flatnonzero(copies.src_rank == rank).tolist():
            key = (int(copies.src_row[index]), plan.region(copies, index))
            if key not in seen:
                seen[key] = digest_view(view(*key), key[1])
            found.append(seen[key])
    return np.array(found, np.int64)


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
