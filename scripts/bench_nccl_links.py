"""What NCCL's grouped send/recv gives between GPUs of one host, in the pattern of a refit: its ceiling."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.transports.lanes import Post
from nemo_rl.refit.transports.nccl_lanes import NcclLanes

log = logging.getLogger("bench_nccl_links")
_BYTES = 4 << 30  # into each generator
_REPEAT = 5
Meet = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Try:
    """Messages of `message` bytes; everyone to everyone in one group, or one peer at a time over `lanes`."""

    name: str
    message: int
    lanes: int = 1
    together: bool = False


def tries(full: bool) -> list[Try]:
    """The ceiling; `full` adds what message sizes and lanes change."""
    out = [
        Try("nccl ceiling: grouped send/recv, 1 GiB messages, all pairs at once", 1 << 30, together=True),
        Try("nccl ceiling: send/recv, 1 GiB messages, one peer at a time", 1 << 30),
    ]
    if full:
        for mib in (4, 16, 32, 64, 128, 256):
            out += [Try(f"nccl send/recv, {mib} MiB messages, {n} lanes", mib << 20, n) for n in (1, 2, 3)]
            out.append(Try(f"nccl grouped send/recv, {mib} MiB messages, all pairs at once", mib << 20, together=True))
    return out


def measure_nccl_links(
    rank: int, world: World, store: dist.Store, device: torch.device, meet: Meet, full: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of rank 0, one for each try: GB/s into each generator, all generators at once."""
    free = torch.cuda.mem_get_info(device)[0]
    lanes = NcclLanes(dist.PrefixStore("nccl links", store), rank, world.size, 3, 60, device)
    buffers = [torch.empty(_BYTES // 4, dtype=torch.uint8, device=device).random_(0, 255) for _ in range(4)]
    try:
        for attempt in tries(full):
            seconds = [_once(attempt, rank, world, lanes, buffers, meet, i) for i in range(_REPEAT + 1)]
            store.set(f"nccl links/{attempt.name}/{rank}", json.dumps(seconds[1:]))
            if rank == 0:
                yield _row(attempt, world, store)
        taken = free - torch.cuda.mem_get_info(device)[0] - _BYTES
        if rank == 0:
            yield {"variant": "nccl memory of 3 communicators", "bytes": taken}
    finally:
        lanes.close()


def _once(
    attempt: Try, rank: int, world: World, lanes: NcclLanes, buffers: list[torch.Tensor], meet: Meet, number: int
) -> float:
    groups = list(_groups(attempt, rank, world, buffers))
    torch.cuda.synchronize()
    meet(f"{attempt.name} {number}")
    started = time.monotonic()
    end = started + 30.0
    flights = [lanes.exchange(lane, sends, recvs, end) for lane, sends, recvs in groups]
    for flight in flights:
        flight.wait(0)
    torch.cuda.synchronize()
    return time.monotonic() - started


def _groups(
    attempt: Try, rank: int, world: World, buffers: list[torch.Tensor]
) -> Iterator[tuple[int, list[Post], list[Post]]]:
    """(lane, sends, recvs) that this rank posts, in order; every generator receives `_BYTES` in all."""
    peers = world.generators if rank in world.trainers else world.trainers
    mine = world.trainers.index(rank) if rank in world.trainers else world.generators.index(rank)
    turns = max(len(world.trainers), len(world.generators))
    sends = rank in world.trainers
    count = _BYTES // len(world.trainers) // attempt.message
    for step in range(count):
        posts = []
        for turn in range(turns):
            at = (mine + turn) % turns if sends else (mine - turn) % turns
            if at >= len(peers):
                continue
            whole = buffers[(step * turns + turn) % len(buffers)]
            room = whole.numel() // attempt.message
            first = step % room * attempt.message
            posts.append(((step + turn) % attempt.lanes, Post(whole[first : first + attempt.message], peers[at], 0)))
        if attempt.together:
            chosen = [post for _, post in posts]
            yield 0, chosen if sends else [], [] if sends else chosen
        else:
            for lane, post in posts:
                yield lane, [post] if sends else [], [] if sends else [post]


def _row(attempt: Try, world: World, store: dist.Store) -> dict[str, Any]:
    said = [json.loads(store.get(f"nccl links/{attempt.name}/{r}")) for r in range(world.size)]
    seconds = [max(s[i] for s in said) for i in range(_REPEAT)]
    moved = _BYTES // len(world.trainers) // attempt.message * attempt.message * len(world.trainers)
    median = statistics.median(seconds)
    return {
        "variant": attempt.name,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "gb_per_s": moved / median / 1e9,
    }
