"""Who gives each copy where generators that hold the same outnumber what trainers' links can feed.

Where every generator gets all it takes from trainers, the busiest trainer sends more than any generator receives as
soon as the model has more replicas among generators than among trainers. Replicas of a generator then form chains: the
first ones get it from the trainers, and each of the others gets from the one before it what has landed there, step by
step. In every step a rank receives from one rank and gives to one, so that all links are full.

What is moved, its order of proof and its digests stay those of the plan; only the place that bytes come from is
another one, in final storage of a rank of the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nemo_rl.refit.base import World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.pipeline import IN_PLACE
from nemo_rl.refit.plan import CopyTable, RefitPlan

MOST_STEPS = 256
"""Of a chain: what its last rank waits for the first step costs a share of `1 / MOST_STEPS` a link of the chain."""


@dataclass(frozen=True, eq=False)
class Relay:
    """Of each copy of a plan's bulk: who gives it, from which of its rows, and when.

    Attributes:
        giver: rank that it comes from: the plan's sender, or a generator in whose final storage it landed before.
        row: of the giver's layout.
        step: number of the step in which it lands, after its giver finished that step; -1 for what
            comes from the plan's sender without steps.
        num_bytes: of the copy.
        num_steps: rank of a chain -> its steps, the same for all ranks of a chain.
    """

    giver: np.ndarray
    row: np.ndarray
    step: np.ndarray
    num_bytes: np.ndarray
    num_steps: Mapping[int, int]

    def applied(self, copies: CopyTable) -> CopyTable:
        """The copies from where they come; messages stay those of the plan."""
        return replace(copies, src_rank=self.giver, src_row=self.row)

    def wire_bytes(self, copies: CopyTable, rank: int) -> tuple[int, int]:
        """Bytes that `rank` gives to and gets from other ranks."""
        far = self.giver != copies.dst_rank
        given, got = far & (self.giver == rank), far & (copies.dst_rank == rank)
        return int(self.num_bytes[given].sum()), int(self.num_bytes[got].sum())

    def describe(self, world: World, copies: CopyTable) -> str:
        """One line: who gets what it takes from which generator."""
        forwarded = self.giver != copies.src_rank
        pairs = np.unique(np.column_stack([self.giver, copies.dst_rank])[forwarded], axis=0).tolist()
        return ", ".join(f"{world.describe(b)} gets from {world.describe(a)}" for a, b in pairs) or "nobody forwards"


@dataclass(frozen=True, eq=False)
class _Replicas:
    """Generators of one layout. `copies[i]` are the numbers of what lands in place at `ranks[i]`, in a common order."""

    ranks: tuple[int, ...]
    copies: tuple[np.ndarray, ...]


def relay_of(plan: RefitPlan, layouts: Mapping[int, Layout], step_bytes: int) -> Relay:
    """Chains among replicas where they make the refit faster; a pure function of what all ranks know.

    Args:
        plan: whole, and proven: every byte lands once.
        layouts: generator rank -> layout; replicas share one object.
        step_bytes: least size of a step, which takes a few times as long as to tell the next rank of it.

    Of all numbers of chains, the one with the least time: bytes of the busiest link, and what the ends of the chains
    wait for their first step.
    """
    copies = plan.bulk
    num_bytes, message = copies.num_bytes(plan.item_bytes), copies.message_of
    groups = _replicas(plan.world, copies, layouts)
    heads = _num_heads(plan.world, copies, num_bytes, groups, step_bytes)
    giver, row, step = copies.src_rank.copy(), copies.src_row.copy(), np.full(len(copies), -1, np.int32)
    num_steps: dict[int, int] = {}
    for group in groups:
        for i in range(len(group.ranks) if heads < len(group.ranks) else 0):
            mine, before = group.copies[i], i - heads
            if before < 0:
                step[mine] = _steps(message[mine], num_bytes[mine], step_bytes)
            else:
                giver[mine], row[mine] = group.ranks[before], copies.dst_row[mine]
                step[mine] = step[group.copies[before]]
            num_steps[group.ranks[i]] = int(step[mine].max(initial=-1)) + 1
    return Relay(giver, row, step, num_bytes, num_steps)


def _replicas(world: World, copies: CopyTable, layouts: Mapping[int, Layout]) -> list[_Replicas]:
    """Generators that hold the same and land the same in place; those that train too read their own storage."""
    kinds: dict[int, list[int]] = {}
    for rank in sorted(set(layouts) - set(world.shared)):
        kinds.setdefault(id(layouts[rank]), []).append(rank)
    kinds = {kind: _spread(ranks, copies) for kind, ranks in kinds.items()}
    in_place, found = _in_place(copies, layouts), []
    for ranks in kinds.values():
        mine = [np.flatnonzero(in_place & (copies.dst_rank == rank)) for rank in ranks]
        boxes = [np.column_stack([copies.dst_row[m], copies.offsets[m], copies.sizes[m]]) for m in mine]
        order = [np.lexsort(b.T) for b in boxes]
        first = boxes[0][order[0]]
        if len(ranks) > 1 and all(np.array_equal(b[o], first) for b, o in zip(boxes, order, strict=True)):
            found.append(_Replicas(tuple(ranks), tuple(m[o] for m, o in zip(mine, order, strict=True))))
    return found


def _spread(ranks: Sequence[int], copies: CopyTable) -> list[int]:
    """`ranks` so that those which get most from one trainer are apart: the first ones need different trainers."""
    asked: dict[int, list[int]] = {}
    for rank in ranks:
        senders, count = np.unique(copies.src_rank[copies.dst_rank == rank], return_counts=True)
        asked.setdefault(int(senders[count.argmax()]) if len(count) else -1, []).append(rank)
    return [r for _, r in sorted((turn, r) for readers in asked.values() for turn, r in enumerate(readers))]


def _in_place(copies: CopyTable, layouts: Mapping[int, Layout]) -> np.ndarray:
    """Which copies are of messages that land in final storage alone."""
    staged = np.zeros(len(copies), bool)
    for rank, layout in layouts.items():
        mine = np.flatnonzero(copies.dst_rank == rank)
        staged[mine] = layout.unit[copies.dst_row[mine]] != IN_PLACE
    num_staged = np.bincount(copies.message_of, staged, len(copies.messages))
    pure: np.ndarray = num_staged[copies.message_of] == 0
    return pure


def _num_heads(
    world: World, copies: CopyTable, num_bytes: np.ndarray, groups: Sequence[_Replicas], step_bytes: int
) -> int:
    """Replicas of each group that the trainers give to; as many as there are where forwarding does not pay."""
    most = max((len(g.ranks) for g in groups), default=1)
    far = copies.src_rank != copies.dst_rank
    sent = np.bincount(copies.src_rank[far], num_bytes[far], world.size)
    received = float(np.bincount(copies.dst_rank[far], num_bytes[far], world.size).max(initial=0))
    steps = min(MOST_STEPS, max(1, int(received) // step_bytes))
    best, least = most, max(float(sent.max(initial=0)), received)
    for heads in range(most - 1, 0, -1):
        for group in groups:
            if heads < len(group.ranks):
                fed = group.copies[heads]
                sent -= np.bincount(copies.src_rank[fed], num_bytes[fed], world.size)
        wait = (-(-most // heads) - 1) / steps
        if (time := max(float(sent.max()), received) * (1 + wait)) < least:
            best, least = heads, time
    return best


def _steps(message: np.ndarray, num_bytes: np.ndarray, step_bytes: int) -> np.ndarray:
    """Step of each copy of one rank: whole messages in the order of the plan, of about equal bytes a step, or of one
    message where that is longer. No step is empty."""
    size = np.bincount(message, num_bytes).astype(np.int64)
    ends, total = np.cumsum(size), int(size.sum())
    count = min(MOST_STEPS, max(1, total // step_bytes))
    planned = np.minimum((ends - size // 2) * count // max(total, 1), count - 1)[message]
    found: np.ndarray = np.unique(planned, return_inverse=True)[1].reshape(-1).astype(np.int32)
    return found
