"""How the copies of a pair of ranks become parcels: large transfers, in an order on which all ranks agree.

The receiver says once in which order bytes come, which is the order of its own memory: what lies together there then
arrives straight in place, however strewn it is at the sender. Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.base import World
from nemo_rl.refit.plan import CopyTable

PARCEL_BYTES = 128 << 20
"""Of a parcel at most, where no single message of the plan is longer: NCCL's fixed cost and the host's, which is about
0.1 ms a parcel, are then a few percent."""

LEAST_IN_PLACE = 32 << 20
"""Bytes of a contiguous range from which on it is worth a parcel of its own: a transfer costs more than a copy."""

PARCELS_OF_A_PAIR = 8
"""At least, down to a quarter of the size: first ones are packed and last ones spread while nothing else moves."""

TURN = 32
"""Parcels that a rank sends to one peer before it turns to the next.

A link gives less where a rank sends to several peers at a time, and ranks that change peers wait for each other.
"""


@dataclass(frozen=True, slots=True)
class Order:
    """What a receiver tells a sender: copies of the pair, by their number among those of the pair, in wire order.

    `ends[i]` is how many of them parcels `0 .. i` carry. Copies of the pair that are not named follow in plan order.
    """

    copies: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True, slots=True)
class Parcel:
    """One transfer of a pair.

    Every rank posts its parcels by ascending key and lane, those of one key and lane together. Two parcels of one key
    have neither sender nor receiver in common. What a group waits for on any rank, be it its lane or a slot, was posted
    before it there. So the unfinished groups with the smallest key and lane wait for nothing but each other, and all of
    them are there: no cycle of waiting ranks, no deadlock, whatever the number of lanes and slots.

    Attributes:
        copies: numbers in the table, in wire order; densely packed, each row-major.
        number: position among the parcels of the pair.
    """

    key: tuple[int, int, int, int]
    lane: int
    src_rank: int
    dst_rank: int
    number: int
    copies: np.ndarray
    num_bytes: int


def wire_order(
    address: np.ndarray, num_bytes: np.ndarray, item: np.ndarray, room: np.ndarray, dense: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Order and ends of one pair's copies that land in final storage; all arguments have one entry a copy.

    What is received in place comes first and last: nothing is spread while the wire is idle.

    Args:
        address: of the first byte at the receiver.
        item: bytes of an element; packed parcels go from large items to small ones, which keeps all of them aligned.
        room: the storage; a range lies in one.
        dense: whether the copy is one contiguous range at the receiver.
        limit: bytes of a parcel; a longer copy is a parcel of its own.
    """
    order = np.lexsort((address, room, ~dense))
    runs: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for run in np.split(order, np.flatnonzero(_breaks(address, num_bytes, room, dense, order)) + 1):
        whole = len(run) and dense[run[0]] and int(num_bytes[run].sum()) >= min(LEAST_IN_PLACE, limit)
        (runs if whole else rest).append(run)
    in_place = [part for run in runs for part in _even(run, num_bytes, limit)]
    strewn = np.concatenate([np.zeros(0, np.int64), *rest]).astype(np.int64)
    strewn = strewn[np.argsort(-item[strewn], kind="stable")]
    half = (len(in_place) + 1) // 2
    parcels = [*in_place[:half], *_filled(strewn, num_bytes, limit), *in_place[half:]]
    ends = np.cumsum([len(part) for part in parcels]).astype(np.int64)
    return np.concatenate([np.zeros(0, np.int64), *parcels]).astype(np.int64), ends


def _breaks(
    address: np.ndarray, num_bytes: np.ndarray, room: np.ndarray, dense: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """Whether a range ends between neighbours of `order`."""
    a, b = order[:-1], order[1:]
    together = dense[a] & dense[b] & (room[a] == room[b]) & (address[a] + num_bytes[a] == address[b])
    broken: np.ndarray = ~together
    return broken


def _even(copies: np.ndarray, num_bytes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Parts of about the same length, each at most `limit` or one copy."""
    total = np.cumsum(num_bytes[copies])
    count = -(-int(total[-1]) // limit)
    while True:
        cuts = np.searchsorted(total, np.arange(1, count) * (total[-1] / count))
        parts = [part for part in np.split(copies, cuts) if len(part)]
        if count >= len(copies) or all(num_bytes[part].sum() <= limit for part in parts):
            return parts
        count += 1


def _filled(copies: np.ndarray, num_bytes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Parts that are filled up to `limit` one after the other."""
    total = np.concatenate([[0], np.cumsum(num_bytes[copies])])
    parts, start = [], 0
    while start < len(copies):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + limit, "right")) - 1)
        parts.append(copies[start:stop])
        start = stop
    return parts


@dataclass(frozen=True, eq=False, slots=True)
class Rules:
    """What parcels are cut by; the same on all ranks.

    Attributes:
        num_bytes: of every copy of `copies`.
        skip: which of them travel in another way.
        lanes: their number.
        limit: bytes of a parcel at most; a longer copy is a parcel of its own.
    """

    world: World
    copies: CopyTable
    num_bytes: np.ndarray
    skip: np.ndarray
    lanes: int
    limit: int

    def limit_of(self, src: int, dst: int) -> int:
        """Bytes of a parcel of one pair: less than `limit` where the pair moves little."""
        pair = (self.copies.src_rank == src) & (self.copies.dst_rank == dst)
        return max(self.limit // 4, min(self.limit, int(self.num_bytes[pair].sum()) // PARCELS_OF_A_PAIR))


def parcels_of(rank: int, rules: Rules, orders: Mapping[tuple[int, int], Order]) -> list[Parcel]:
    """All parcels that `rank` sends, receives or copies within itself, by ascending key and lane.

    Args:
        orders: (source, destination) -> what the destination said; the same at both ends.
    """
    return sorted(
        (
            parcel
            for pair in pairs_of(rank, rules.copies, rules.skip)
            for parcel in _of_pair(*pair, rules, orders[pair])
        ),
        key=lambda parcel: (parcel.key, parcel.lane),
    )


def pairs_of(rank: int, copies: CopyTable, skip: np.ndarray) -> list[tuple[int, int]]:
    """The (source, destination) of copies that are not skipped, one of them `rank`."""
    own = ((copies.src_rank == rank) | (copies.dst_rank == rank)) & ~skip
    return sorted(set(zip(copies.src_rank[own].tolist(), copies.dst_rank[own].tolist(), strict=True)))


def _of_pair(src: int, dst: int, rules: Rules, order: Order) -> list[Parcel]:
    copies = rules.copies
    mine = np.flatnonzero((copies.src_rank == src) & (copies.dst_rank == dst))
    named = mine[order.copies]
    parts = np.split(named, order.ends[:-1]) if len(order.ends) else []
    phase = _phase(src, dst, rules.world)
    found = [((0, number // TURN, phase, number), part) for number, part in enumerate(parts)]
    left = ~rules.skip
    left[named] = False
    found += [((1, first, 0, 0), part) for first, part in _by_round(src, dst, rules, left)]
    return [
        Parcel(key, (number + phase) % rules.lanes, src, dst, number, part, int(rules.num_bytes[part].sum()))
        for number, (key, part) in enumerate(found)
    ]


def _phase(src: int, dst: int, world: World) -> int:
    """Pairs of one phase have no rank in common on the same side; in one phase a rank has one peer each way."""
    size = max(len(world.trainers), len(world.generators))
    return (world.generators.index(dst) - world.trainers.index(src)) % size


def _by_round(src: int, dst: int, rules: Rules, left: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(round of its first message, copies) of parcels that are made of whole messages of the plan, in its order."""
    messages, limit = rules.copies.messages, rules.limit_of(src, dst)
    parcel: list[np.ndarray] = []
    first, filled = 0, 0
    for number, _, _, lo, hi, _ in messages[(messages[:, 1] == src) & (messages[:, 2] == dst)].tolist():
        part = np.arange(lo, hi)[left[lo:hi]]
        size = int(rules.num_bytes[part].sum())
        if parcel and filled + size > limit:
            yield first, np.concatenate(parcel)
            parcel, filled = [], 0
        if len(part):
            first, filled = first if parcel else number, filled + size
            parcel.append(part)
    if parcel:
        yield first, np.concatenate(parcel)


def groups_of(parcels: Sequence[Parcel]) -> list[list[Parcel]]:
    """Parcels that are posted together: those of one key and lane."""
    groups: dict[tuple[tuple[int, ...], int], list[Parcel]] = {}
    for parcel in parcels:
        groups.setdefault((parcel.key, parcel.lane), []).append(parcel)
    return list(groups.values())
