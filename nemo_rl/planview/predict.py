"""A plan's time and memory from a few numbers of the links: a model, no measurement; `assumed` says what went in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_rl.refit.plan import CopyTable, RefitPlan


@dataclass(frozen=True, slots=True)
class Links:
    """What one rank can send, or receive, at a time.

    Attributes:
        node_gb_per_s: between ranks of one host, one direction.
        network_gb_per_s: between hosts, for each rank, one direction.
        latency_us: of starting one message.
    """

    node_gb_per_s: float = 350.0
    network_gb_per_s: float = 45.0
    latency_us: float = 20.0

    def __post_init__(self) -> None:
        if min(self.node_gb_per_s, self.network_gb_per_s) <= 0 or self.latency_us < 0:
            raise ValueError(f"link rates must be above 0 and latency at least 0, got {self}")

    def seconds(self, num_bytes: np.ndarray, same_node: np.ndarray) -> np.ndarray:
        """Of messages of `num_bytes`."""
        rate = np.where(same_node, self.node_gb_per_s, self.network_gb_per_s) * 1e9
        total: np.ndarray = num_bytes / rate + self.latency_us * 1e-6
        return total


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time and memory of one refit, without verification and the engine's own processing.

    Attributes:
        bulk_s: what the busiest rank needs for its messages one after the other, the least that any order takes.
        rounds_s: until the last message, where each starts when both its ends are done with their earlier ones.
        misc_s: gathering whole tensors at one trainer and broadcasting them.
        bottleneck: the busiest rank, and what it does.
        bottleneck_bytes: that it sends or receives.
        staging_bytes: message buffers of a rank at most, both directions.
        misc_staging_bytes: the largest buffer of whole tensors, on every generator and on the trainer that gathers.
        assumed: the numbers that went in.
    """

    bulk_s: float
    rounds_s: float
    misc_s: float
    bottleneck: str
    bottleneck_bytes: int
    staging_bytes: int
    misc_staging_bytes: int
    assumed: tuple[str, ...]

    @property
    def total_s(self) -> float:
        return self.rounds_s + self.misc_s

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Prediction:
        return cls(**{**tree, "assumed": tuple(tree["assumed"])})


def predict(plan: RefitPlan, nodes: np.ndarray, links: Links, num_streams: int) -> Prediction:
    """Args: nodes: world rank -> host."""
    sends, receives, rounds_s = _times(plan.bulk, plan.world.size, nodes, links)
    busiest, verb, bulk_s = _busiest(sends, receives)
    sent, received = _wire(plan.bulk, plan.world.size)
    gather = _times(plan.misc, plan.world.size, nodes, links)[1].max(initial=0.0)
    largest = max((b.num_bytes for b in plan.misc_buffers), default=0)
    return Prediction(
        bulk_s=bulk_s,
        rounds_s=rounds_s,
        misc_s=float(gather) + _broadcast_s(plan, nodes, links),
        bottleneck=f"{plan.world.describe(busiest)} {verb}" if bulk_s else "none: no bulk byte crosses a link",
        bottleneck_bytes=int((sent if verb == "sends" else received)[busiest]),
        staging_bytes=_staging(plan, num_streams),
        misc_staging_bytes=largest,
        assumed=(
            f"{links.node_gb_per_s:g} GB/s between ranks of a host and {links.network_gb_per_s:g} GB/s a rank between "
            f"hosts, each direction; {links.latency_us:g} us a message",
            "a rank sends one message and receives one message at a time; links do not share switches",
            "destinations are written in place: no module of the engine repacks its weights",
            "verification and the engine's own processing are not counted",
        ),
    )


def _cross(copies: CopyTable) -> np.ndarray:
    """Messages between different ranks."""
    messages = copies.messages
    kept: np.ndarray = messages[messages[:, 1] != messages[:, 2]]
    return kept


def _times(copies: CopyTable, size: int, nodes: np.ndarray, links: Links) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds that each rank sends and receives, and until the last message, where each waits for both its ends."""
    m = _cross(copies)
    seconds = links.seconds(m[:, 5], nodes[m[:, 1]] == nodes[m[:, 2]])
    out_free, in_free = [0.0] * size, [0.0] * size
    for src, dst, took in zip(m[:, 1].tolist(), m[:, 2].tolist(), seconds.tolist(), strict=True):
        out_free[src] = in_free[dst] = max(out_free[src], in_free[dst]) + took
    sends, receives = (np.bincount(m[:, side], seconds, minlength=size) for side in (1, 2))
    return sends, receives, max(in_free)


def _wire(copies: CopyTable, size: int) -> tuple[np.ndarray, np.ndarray]:
    m = _cross(copies)
    out = np.zeros((2, size), np.int64)
    np.add.at(out[0], m[:, 1], m[:, 5])
    np.add.at(out[1], m[:, 2], m[:, 5])
    return out[0], out[1]


def _busiest(sends: np.ndarray, receives: np.ndarray) -> tuple[int, str, float]:
    if receives.max() >= sends.max():
        return int(receives.argmax()), "receives", float(receives.max())
    return int(sends.argmax()), "sends", float(sends.max())


def _staging(plan: RefitPlan, num_streams: int) -> int:
    """Message buffers are as large as the largest message that a stream carried."""
    m = _cross(plan.bulk)
    largest = int(m[:, 5].max(initial=0))
    sides = bool(len(m)) * (1 + bool(set(m[:, 1].tolist()) & set(m[:, 2].tolist())))
    return sides * num_streams * largest


def _broadcast_s(plan: RefitPlan, nodes: np.ndarray, links: Links) -> float:
    """Buffers one after the other, each down a chain of the generators that is full after the first hops."""
    ranks = [plan.misc_root, *plan.world.generators]
    near = bool((nodes[ranks] == nodes[ranks[0]]).all())
    hops = math.ceil(math.log2(len(ranks)))
    total = sum(float(links.seconds(np.array(b.num_bytes), np.array(near))) for b in plan.misc_buffers)
    return total + hops * len(plan.misc_buffers) * links.latency_us * 1e-6
