"""How long a refit takes by each transport: what its plan asks of links, and what links were measured to give.

Every rank starts its messages in plan order and sends and receives one at a time in each direction, so a message
begins when both its ends are free of earlier ones. What engines do with landed bytes is not predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import CopyTable, RefitPlan

LONG_RUN = 1 << 16
"""Bytes of a run from which on a copy goes at the speed of contiguous memory."""

_MEETINGS = 6  # times that all ranks of a refit wait for each other, the transport's own not counted


@dataclass(frozen=True, slots=True)
class Rates:
    """What one transport gives in one world, all pairs of ranks busy at once.

    Attributes:
        start_s: of a run that moves next to nothing.
        message_s, copy_s: of one message and of one copy, beside its bytes.
        fill_s: once, where copies are packed beside the wire: the first message before it, the last one behind it.
        run_bytes_per_s: of long runs, from storage to storage.
        short_bytes_per_s: of bytes in short runs, or, where packing holds up the wire, packed with others.
        one_sided: receivers read each copy from where it lies; otherwise copies that share a message are packed.
        overlaps: a rank starts copies while the bytes of earlier ones move.
    """

    start_s: float
    message_s: float
    copy_s: float
    fill_s: float
    run_bytes_per_s: float
    short_bytes_per_s: float
    one_sided: bool
    overlaps: bool


@dataclass(frozen=True, slots=True)
class Links:
    """What was measured among the ranks of one world.

    Attributes:
        rates: transport -> what it gives.
        digest_bytes_per_s, digest_piece_s: of digests, and of one piece beside its bytes; all ranks at once.
        meet_s: of all ranks meeting once through the store.
    """

    rates: Mapping[str, Rates]
    digest_bytes_per_s: float
    digest_piece_s: float
    meet_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Links:
        """Inverse of `to_json`. Raises ValueError where the text is something else."""
        try:
            said: dict[str, Any] = json.loads(text)
            rates = {name: Rates(**given) for name, given in said.pop("rates").items()}
            return cls(rates=rates, **said)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a measurement of links: {error}") from error


@dataclass(frozen=True, eq=False)
class Load:
    """What a table of copies asks of links: one entry a message, in plan order.

    Attributes:
        src, dst: ranks.
        num_bytes, num_copies: of the message.
        short_bytes: of its copies in short runs.
        strided_bytes: of its copies that are not contiguous at both ends.
    """

    src: np.ndarray
    dst: np.ndarray
    num_bytes: np.ndarray
    num_copies: np.ndarray
    short_bytes: np.ndarray
    strided_bytes: np.ndarray

    @classmethod
    def of(cls, demand: Demand, giver: np.ndarray | None = None) -> Load:
        """Of the bulk of a plan, with rows that are taken to be contiguous in storage.

        `giver`: rank that each copy is read from, where that is not the plan's sender.
        """
        plan, copies, sources, landings = demand.plan, demand.plan.bulk, demand.sources, demand.landings
        item = plan.item_bytes[copies.tensor]
        rows = ((copies.src_rank, copies.src_row, sources), (copies.dst_rank, copies.dst_row, landings))
        runs = np.minimum(*(_runs(copies.sizes, _row_sizes(copies, *end)) for end in rows)) * item
        sizes = copies.num_bytes(plan.item_bytes)
        m = copies.messages
        short, strided = (
            _sums(np.where(chosen, sizes, 0), m) for chosen in (runs < np.minimum(sizes, LONG_RUN), runs < sizes)
        )
        src = m[:, 1] if giver is None else giver[m[:, 3]]
        return cls(src, m[:, 2], m[:, 5], m[:, 4] - m[:, 3], short, strided)

    def transfer_s(self, rates: Rates) -> float:
        """Until the last message is through."""
        moving, starting = self._moving_s(rates), rates.message_s + self.num_copies * rates.copy_s
        if not rates.overlaps:
            return rates.start_s + self.span(moving + starting)
        ends = (self.dst,) if rates.one_sided else (self.dst, self.src)
        started = max(float(np.bincount(end, starting).max(initial=0.0)) for end in ends)
        packed = bool(((self.num_copies > 1) | (self.strided_bytes > 0)).any())
        return rates.start_s + packed * rates.fill_s + max(self.span(moving), started)

    def _moving_s(self, rates: Rates) -> np.ndarray:
        short = self.short_bytes
        if not rates.one_sided:
            short = self.strided_bytes
            if not rates.overlaps:
                short = np.where(self.num_copies > 1, self.num_bytes, short)
        found: np.ndarray = (self.num_bytes - short) / rates.run_bytes_per_s + short / rates.short_bytes_per_s
        return found

    def span(self, cost: np.ndarray) -> float:
        """From the start of the first message to the end of the last, where message i takes `cost[i]`."""
        sends: dict[int, float] = {}
        receives: dict[int, float] = {}
        for src, dst, taken in zip(self.src.tolist(), self.dst.tolist(), cost.tolist(), strict=True):
            sends[src] = receives[dst] = max(sends.get(src, 0.0), receives.get(dst, 0.0)) + taken
        return max(sends.values(), default=0.0)

    def busiest(self, ranks: np.ndarray) -> tuple[int, int]:
        """(bytes, copies) of the rank of `ranks` (one a message) that has most bytes."""
        if not len(ranks):
            return 0, 0
        sizes, copies = np.bincount(ranks, self.num_bytes), np.bincount(ranks, self.num_copies)
        worst = int(sizes.argmax())
        return int(sizes[worst]), int(copies[worst])


@dataclass(frozen=True, slots=True)
class Demand:
    """What decides how long a plan's refits take: the plan, and the rows of both ends by rank."""

    plan: RefitPlan
    sources: Mapping[int, Layout]
    landings: Mapping[int, Layout]

    def predictions(
        self, links: Links, givers: Mapping[str, np.ndarray | None], device: str, verify: bool
    ) -> dict[str, float]:
        """Transport -> seconds of a whole refit, without what engines do.

        Args:
            givers: transport -> as in `Load.of`.
            device: the kind that tensors are on.
        """
        load = Load.of(self)
        always = _MEETINGS * links.meet_s
        channel = "nccl" if device == "cuda" else "gloo"  # what carries whole tensors
        found = {}
        for name, giver in givers.items():
            rates = links.rates[name]
            moving = (load if giver is None else Load.of(self, giver)).transfer_s(rates)
            misc = _misc_s(self.plan, links.rates.get(channel, rates))
            beside = rates.one_sided and rates.overlaps  # both move without the processor
            found[name] = always + (max(moving, misc) if beside else moving + misc)
            if verify:
                looks = _verify_s(self, load, links, rates.overlaps)
                found[name] += max(2 * looks - moving, 0.0) if rates.overlaps else looks
        return found


def _misc_s(plan: RefitPlan, rates: Rates) -> float:
    """The root gathers every whole tensor, then broadcasts it along a tree."""
    if not plan.misc_bytes:
        return 0.0
    steps = 1 + math.ceil(math.log2(1 + len(plan.world.generators)))
    started = len(plan.misc) * rates.copy_s + len(plan.misc_buffers) * rates.message_s * steps
    return rates.start_s + started + plan.misc_bytes * steps / rates.short_bytes_per_s


def _verify_s(demand: Demand, bulk: Load, links: Links, overlaps: bool) -> float:
    """Trainers look before and after, at no more than they hold, and what landed is read once.

    Beside what moves without the processor all of it is hidden that takes no longer; otherwise what landed is read
    while trainers look again.
    """

    def look(ranks: np.ndarray, most: int) -> float:
        num_bytes, pieces = bulk.busiest(ranks)
        part = min(1.0, most / max(num_bytes, 1))
        return part * (num_bytes / links.digest_bytes_per_s + pieces * links.digest_piece_s)

    held = max((layout.num_bytes for layout in demand.sources.values()), default=0)
    before, landed = look(bulk.src, held), look(bulk.dst, bulk.busiest(bulk.dst)[0])
    return max(before, landed) if overlaps else before + max(before, landed)


def _runs(sizes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Elements of the longest stretch of each box (n, dims) that lies in one piece of a row of sizes `rows`."""
    full = np.cumprod((sizes == rows)[:, ::-1], axis=1)[:, ::-1]
    inside = np.concatenate([full[:, 1:], np.ones((len(sizes), 1), full.dtype)], axis=1)
    found: np.ndarray = np.where(inside > 0, sizes, 1).prod(axis=1)
    return found


def _row_sizes(copies: CopyTable, rank: np.ndarray, row: np.ndarray, layouts: Mapping[int, Layout]) -> np.ndarray:
    """Sizes (n, dims) of the row that each copy has at one end."""
    found = np.ones_like(copies.sizes)
    order = np.argsort(rank, kind="stable")
    ranks, first = np.unique(rank[order], return_index=True)
    for number, mine in zip(ranks.tolist(), np.split(order, first[1:]), strict=True):
        layout = layouts[number]
        ndim = min(layout.sizes.shape[1], found.shape[1])  # axes beyond have size 1
        found[mine, :ndim] = layout.sizes[row[mine], :ndim]
    return found


def _sums(values: np.ndarray, messages: np.ndarray) -> np.ndarray:
    """Of the copies of each message."""
    total = np.concatenate([[0], np.cumsum(values)])
    found: np.ndarray = total[messages[:, 4]] - total[messages[:, 3]]
    return found
