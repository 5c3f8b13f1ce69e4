"""Links under a simulated clock: messages are flows that share the links of their ends, moment by moment.

Nothing here is taken from the cost model: ranks keep `num_streams` messages in flight each way, a message first costs
its ends a fixed time, then flows at the fair share of the slower end.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Flow:
    src: int
    dst: int
    fixed: float
    left: float


def run_clock(messages, bytes_per_s, num_streams=2):
    """Seconds until all `messages` (src, dst, fixed seconds, bytes), started in order at both ends, are through."""
    waiting = [Flow(*m) for m in messages]
    active, now = [], 0.0
    while waiting or active:
        _admit(waiting, active, num_streams)
        speed = [_share(flow, active, bytes_per_s) for flow in active]
        step = min(flow.fixed or flow.left / s for flow, s in zip(active, speed, strict=True))
        for flow, s in zip(active, speed, strict=True):
            if flow.fixed:
                flow.fixed = max(flow.fixed - step, 0.0) if flow.fixed - step > 1e-15 else 0.0
            else:
                flow.left -= step * s
        now += step
        active[:] = [flow for flow in active if flow.fixed or flow.left > 1e-6]
    return now


def _admit(waiting, active, num_streams):
    """A rank starts its messages in order, at most so many at a time in each direction."""
    blocked = set()
    for flow in list(waiting):
        ends = ("out", flow.src), ("in", flow.dst)
        full = any(
            sum(end == (("out", f.src) if end[0] == "out" else ("in", f.dst)) for f in active) >= num_streams
            for end in ends
        )
        if full or blocked & set(ends):
            blocked |= set(ends)
            if len(blocked) > 200:
                return
            continue
        waiting.remove(flow)
        active.append(flow)


def _share(flow, active, bytes_per_s):
    moving = [f for f in active if not f.fixed]
    sends, receives = (sum(getattr(f, end) == getattr(flow, end) for f in moving) for end in ("src", "dst"))
    return bytes_per_s / max(sends, receives, 1)
