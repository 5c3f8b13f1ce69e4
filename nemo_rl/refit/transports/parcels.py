"""How the copies of a pair of ranks become parcels: large transfers, in an order on which all ranks agree.

Senders say where copies lie, receivers in which order bytes come, which is the order of their own memory: what lies
together there then arrives straight in place, however strewn it is at the sender. Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.base import World
from nemo_rl.refit.packed import pack, unpack
from nemo_rl.refit.plan import CopyTable

PARCEL_BYTES = 256 << 20
"""Of a parcel at most, where no single message of the plan is longer: fixed costs are then a few percent."""

PACKED_BYTES = 128 << 20
"""Of those of a parcel that are packed at an end."""

LEAST_IN_PLACE = 2 << 20
"""Bytes of a contiguous range from which on it is worth a transfer of its own, which costs more than a copy."""

LEAST_BYTES = 64 << 20
"""Of a parcel. The first ones of a pair that are packed are shorter than others, because nothing moves meanwhile, and
so are the last ones, so that lanes come to their end together."""

MESSAGES_OF_A_PAIR = 8
"""Parcels at least that are made of whole messages, down to a quarter of the size."""

ALIGNMENT = 16
"""Of transfers in a slot."""


@dataclass(frozen=True, eq=False, slots=True)
class Ends:
    """Where copies lie at one end: of each, the first byte, the storage, and whether it is one contiguous range."""

    address: np.ndarray
    room: np.ndarray
    dense: np.ndarray

    def to_bytes(self) -> bytes:
        return pack([], {"address": self.address, "room": self.room, "dense": self.dense})

    @classmethod
    def from_bytes(cls, data: bytes) -> Ends:
        return cls(**unpack(data)[1])

    def take(self, chosen: np.ndarray) -> Ends:
        return Ends(self.address[chosen], self.room[chosen], self.dense[chosen])

    def breaks(self, num_bytes: np.ndarray) -> np.ndarray:
        """Whether a range ends between neighbours, of `num_bytes` each."""
        together = self.dense[:-1] & self.dense[1:] & (self.room[:-1] == self.room[1:])
        broken: np.ndarray = ~(together & (self.address[:-1] + num_bytes[:-1] == self.address[1:]))
        return broken

    def whole(self, num_bytes: np.ndarray) -> bool:
        """Whether the copies, of `num_bytes` each, are one contiguous range of one storage, in their order."""
        return bool(self.dense[0] and not self.breaks(num_bytes).any())


@dataclass(frozen=True, slots=True)
class Order:
    """What a receiver tells a sender: copies of the pair, by their number among those of the pair, in wire order.

    `cuts[i]` is how many of them transfers `0 .. i` carry, and `ends[i]` how many parcels `0 .. i` do, which are of
    whole transfers. Copies of the pair that are not named follow in plan order, a transfer a parcel.
    """

    copies: np.ndarray
    cuts: np.ndarray
    ends: np.ndarray

    def to_bytes(self) -> bytes:
        return pack([], {"copies": self.copies, "cuts": self.cuts, "ends": self.ends})

    @classmethod
    def from_bytes(cls, data: bytes) -> Order:
        return cls(**unpack(data)[1])


@dataclass(frozen=True, slots=True)
class Parcel:
    """Transfers of a pair that are posted together.

    A rank stays with a peer until all is moved between them: a link gives less where a rank sends to several peers at a
    time, and ranks that change peers wait for each other.

    Every rank posts its parcels by ascending key and lane, those of one key and lane together. Two parcels of one key
    have neither sender nor receiver in common. What a group waits for on any rank, be it its lane or a slot, was posted
    before it there. So the unfinished groups with the smallest key and lane wait for nothing but each other, and all of
    them are there: no cycle of waiting ranks, no deadlock, whatever the number of lanes and slots.

    Attributes:
        copies: numbers in the table, in wire order; densely packed, each row-major.
        cuts: how many of them the first, the first two, ... and all transfers carry.
        number: position among the parcels of the pair.
        first: position of the first transfer among those of the pair.
    """

    key: tuple[int, int, int]
    lane: int
    src_rank: int
    dst_rank: int
    number: int
    copies: np.ndarray
    cuts: tuple[int, ...]
    first: int
    num_bytes: int

    @property
    def transfers(self) -> list[np.ndarray]:
        """Positions in `copies`, a range each."""
        return np.split(np.arange(len(self.copies)), self.cuts[:-1])


@dataclass(frozen=True, slots=True)
class Limits:
    """Of parcels: bytes in all and of what is packed at either end; a longer copy is a parcel of its own.

    `lanes` share what is left: no parcel is longer than half of a lane's part.
    """

    parcel: int
    packed: int
    lanes: int

    def of_all(self, left: int) -> int:
        """Bytes of a parcel that begins `left` bytes before the end of the pair."""
        return min(self.parcel, max(LEAST_BYTES, left // (2 * self.lanes)))

    def of_packed(self, before: int) -> int:
        """Bytes of it that are packed while what is left of `before` earlier ones moves."""
        return min(self.packed, max(LEAST_BYTES, before // 2))


def wire_order(here: Ends, there: Ends, num_bytes: np.ndarray, item: np.ndarray, limits: Limits) -> Order:
    """Of one pair's copies that land in final storage; arguments have one entry a copy.

    The longest range that nobody packs comes first, and what is spread has ranges before and behind it: nothing is
    packed or spread while the wire is idle.

    Args:
        here, there: at the receiver and at the sender.
        item: bytes of an element; what is spread goes from large items to small ones, which keeps all of them aligned.
    """
    order = np.lexsort((here.address, here.room, ~here.dense))
    runs: list[tuple[np.ndarray, bool]] = []
    rest: list[np.ndarray] = []
    for run in np.split(order, np.flatnonzero(here.take(order).breaks(num_bytes[order])) + 1):
        if len(run) and here.dense[run[0]] and int(num_bytes[run].sum()) >= min(LEAST_IN_PLACE, limits.packed):
            parts = _even(run, num_bytes, limits.parcel)
            runs += [(part, not there.take(part).whole(num_bytes[part])) for part in parts]
        else:
            rest.append(run)
    strewn = np.concatenate([np.zeros(0, np.int64), *rest]).astype(np.int64)
    strewn = strewn[np.argsort(-item[strewn], kind="stable")]
    first = max(range(len(runs)), key=lambda i: (not runs[i][1], int(num_bytes[runs[i][0]].sum())), default=0)
    runs = [*runs[first : first + 1], *runs[:first], *runs[first + 1 :]]
    half = (len(runs) + 1) // 2
    return _order([*runs[:half], *([(strewn, True)] if len(strewn) else []), *runs[half:]], num_bytes, limits)


def _order(runs: Sequence[tuple[np.ndarray, bool]], num_bytes: np.ndarray, limits: Limits) -> Order:
    """Of ranges of copies, each with whether it is packed at an end."""
    total = np.concatenate([[0], np.cumsum([num_bytes[run].sum() for run, _ in runs])]).astype(np.int64)
    transfers: list[np.ndarray] = []
    packed: list[bool] = []
    for (run, is_packed), before, behind in zip(runs, total[:-1].tolist(), total[1:].tolist(), strict=True):
        most = limits.of_all(int(total[-1]) - behind) if before else limits.parcel
        parts = _even(run, num_bytes, min(most, limits.of_packed(before)) if is_packed else most)
        transfers += parts
        packed += [is_packed] * len(parts)
    sizes = np.array([int(num_bytes[part].sum()) for part in transfers], np.int64)
    cuts = np.cumsum([len(part) for part in transfers]).astype(np.int64)
    ends = _shared(sizes, np.array(packed, bool), limits)
    copies = np.concatenate([np.zeros(0, np.int64), *transfers]).astype(np.int64)
    return Order(copies, cuts, cuts[np.array(ends, np.int64) - 1])


def _shared(sizes: np.ndarray, packed: np.ndarray, limits: Limits) -> list[int]:
    """How many transfers the first, the first two, ... and all parcels have; the first one has one, to start soon."""
    total = np.concatenate([[0], np.cumsum(sizes)])
    aligned = np.concatenate([[0], np.cumsum(np.where(packed, -(-sizes // ALIGNMENT) * ALIGNMENT, 0))])
    ends = [1] if len(sizes) else []
    while ends and ends[-1] < len(sizes):
        start = ends[-1]
        most = limits.of_all(int(total[-1] - total[start])), limits.of_packed(int(total[start]))
        stops = [
            int(np.searchsorted(sums, sums[start] + limit, "right")) - 1
            for sums, limit in zip((total, aligned), most, strict=True)
        ]
        ends.append(max(start + 1, min(stops)))
    return ends


def _even(copies: np.ndarray, num_bytes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Parts of about the same length where that may be, each at most `limit` or one copy."""
    total = np.cumsum(num_bytes[copies])
    count = -(-int(total[-1]) // limit)
    cuts = np.searchsorted(total, np.arange(1, count) * (total[-1] / count), "right")
    parts = [part for part in np.split(copies, cuts) if len(part)]
    even = all(len(part) == 1 or num_bytes[part].sum() <= limit for part in parts)
    return parts if even else _filled(copies, num_bytes, limit)


def _filled(copies: np.ndarray, num_bytes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Parts that are filled up to `limit` one after the other."""
    total = np.concatenate([[0], np.cumsum(num_bytes[copies])])
    parts: list[np.ndarray] = []
    start = 0
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
        chosen: numbers of those that a rank cuts into parcels, ascending: all of any pair, or none.
        limits: of parcels of ranges.
    """

    world: World
    copies: CopyTable
    num_bytes: np.ndarray
    chosen: np.ndarray
    limits: Limits

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The (source, destination) of what is chosen."""
        src, dst = self.copies.src_rank[self.chosen], self.copies.dst_rank[self.chosen]
        return sorted(set(zip(src.tolist(), dst.tolist(), strict=True)))

    def copies_of(self, src: int, dst: int) -> np.ndarray:
        """Numbers of the copies of one pair, ascending."""
        mine = self.chosen
        found: np.ndarray = mine[(self.copies.src_rank[mine] == src) & (self.copies.dst_rank[mine] == dst)]
        return found

    def limit_of(self, src: int, dst: int) -> int:
        """Bytes of a parcel of whole messages of one pair: less than others where the pair moves little."""
        most, num_bytes = self.limits.packed, int(self.num_bytes[self.copies_of(src, dst)].sum())
        return max(most // 4, min(most, num_bytes // MESSAGES_OF_A_PAIR))


def parcels_of(rules: Rules, orders: Mapping[tuple[int, int], Order]) -> list[Parcel]:
    """All parcels of what the rules choose, by ascending key and lane.

    Args:
        orders: (source, destination) -> what the destination said, the same at both ends; for all pairs of the rules.
    """
    return sorted(
        (parcel for pair in sorted(orders) for parcel in _of_pair(*pair, rules, orders[pair])),
        key=lambda parcel: (parcel.key, parcel.lane),
    )


def _of_pair(src: int, dst: int, rules: Rules, order: Order) -> list[Parcel]:
    of_pair = rules.copies_of(src, dst)
    named, left = of_pair[order.copies], np.delete(of_pair, order.copies)
    starts = [0, *order.ends[:-1].tolist()]
    phase = _phase(src, dst, rules.world)
    found = [
        ((0, phase, number), named[lo:hi], order.cuts[(order.cuts > lo) & (order.cuts <= hi)] - lo)
        for number, (lo, hi) in enumerate(zip(starts, order.ends.tolist(), strict=False))
    ]
    found += [((1, first, 0), part, np.array([len(part)])) for first, part in _by_round(src, dst, rules, left)]
    firsts = np.cumsum([0, *(len(cuts) for *_, cuts in found)]).tolist()
    return [
        Parcel(
            key,
            (number + phase) % rules.limits.lanes,
            src,
            dst,
            number,
            part,
            tuple(cuts.tolist()),
            firsts[number],
            int(rules.num_bytes[part].sum()),
        )
        for number, (key, part, cuts) in enumerate(found)
    ]


def _phase(src: int, dst: int, world: World) -> int:
    """Pairs of one phase have no rank in common on the same side; in one phase a rank has one peer each way."""
    size = max(len(world.trainers), len(world.generators))
    return (world.generators.index(dst) - world.trainers.index(src)) % size


def _by_round(src: int, dst: int, rules: Rules, left: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(round of its first message, copies) of parcels that are made of whole messages of the plan, in its order.

    Args:
        left: numbers of the copies of the pair that are to go so, ascending.
    """
    messages, limit = rules.copies.messages, rules.limit_of(src, dst)
    parcel: list[np.ndarray] = []
    first, filled = 0, 0
    for number, _, _, lo, hi, _ in messages[(messages[:, 1] == src) & (messages[:, 2] == dst)].tolist():
        part = left[slice(*np.searchsorted(left, (lo, hi)))]
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
