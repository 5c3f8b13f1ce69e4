"""What the links between GPUs of one host give: contiguous and strided copies by copy engine and by kernel."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.strided import Axis, Form, Jobs

log = logging.getLogger("bench_links")
_BYTES = 4 << 30  # of a phase
_REPEAT = 5
Meet = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Try:
    """Copies of one form; `way` says who moves (the reader `get`s, the owner `put`s) and by what."""

    name: str
    way: str
    form: Form
    gap: int  # bytes between the starts of two boxes, at the reader and at the owner
    streams: int = 2
    kernel: bool = False


def tries() -> list[Try]:
    expert = 384 * 2048 * 2
    out = [Try(f"{way} contiguous", way, Form((), _BYTES // 4, 2), _BYTES // 4, 1) for way in ("put", "get")]
    for way, streams in (("get", 1), ("get", 2), ("get", 4), ("put", 1), ("put", 2)):
        out.append(Try(f"{way} pieces of {expert} bytes, {streams} streams", way, Form((), expert, 2), expert, streams))
    out.append(Try(f"get pieces of {expert} bytes by kernel", "get", Form((), expert, 2), 2 * expert, kernel=True))
    for row in (64, 128, 256, 512, 768, 1536, 4096):
        form = Form((Axis(1 << 21 >> (row.bit_length() - 1), 2 * row, row),), row, 2)
        for way in ("get", "put") if row == 768 else ("get",):
            out.append(Try(f"{way} rows of {row} bytes by engine", way, form, 0))
        if row <= 768:
            out.append(Try(f"get rows of {row} bytes by kernel", "get", form, 0, kernel=True))
    return out


def measure_links(
    rank: int, world: World, store: dist.Store, device: torch.device, meet: Meet
) -> Iterator[dict[str, Any]]:
    """Rows of rank 0, one for each try: GB/s into each generator, all generators at once, in phases that pair ranks."""
    from nemo_rl.refit.transports.copy_engine import CopyEngine
    from nemo_rl.refit.transports.cuda_memory import CudaMemory

    memory, engine = CudaMemory(device), CopyEngine(device)
    mine = torch.empty(_BYTES, dtype=torch.uint8, device=device).random_(0, 255)
    windows, where = memory.show([mine])
    store.set(f"links/{rank}", json.dumps([windows, where.tolist()]))
    others = world.generators if rank in world.trainers else world.trainers
    far = {}
    for other in others:
        named, place = json.loads(store.get(f"links/{other}"))
        _, bases = memory.open(named)
        far[other] = int(bases[place[0][0]]) + place[0][1]
    for attempt in tries():
        try:
            starts = _prepare(attempt, rank, world, engine, mine.data_ptr(), far)
            seconds, host = [], 0.0
            for i in range(_REPEAT + 1):
                torch.cuda.synchronize()
                meet(f"{attempt.name} {i}")
                started = time.perf_counter()
                for start in starts:
                    start()
                host = time.perf_counter() - started
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            store.set(f"links/{attempt.name}/{rank}", json.dumps([seconds[1:], host]))
        except Exception as error:
            log.exception("%s", attempt.name)
            store.set(f"links/{attempt.name}/{rank}", json.dumps([[], str(error)]))
        if rank == 0:
            yield _row(attempt, world, store)
    del mine
    memory.close()


def _prepare(
    attempt: Try, rank: int, world: World, engine: Any, mine: int, far: dict[int, int]
) -> list[Callable[[], None]]:
    """What this rank starts, one piece a phase; nothing on the side that does not move."""
    movers = world.generators if attempt.way == "get" else world.trainers
    peers = world.trainers if attempt.way == "get" else world.generators
    if rank not in movers:
        return []
    at, num = movers.index(rank), len(peers)
    streams = [torch.cuda.Stream() for _ in range(attempt.streams)]
    out = []
    for phase in range(num):
        address = far[peers[(at + phase) % num]]
        span = attempt.gap or attempt.form.run + sum((a.size - 1) * max(a.src, a.dst) for a in attempt.form.axes)
        count = _BYTES // span
        steps = np.arange(count, dtype=np.int64) * span
        there, here = address + steps[::-1], mine + steps  # in opposite orders, so that pieces stay pieces
        src, dst = (there, here) if attempt.way == "get" else (here, there)
        jobs = Jobs(src, dst, (attempt.form,) * count)
        out.append(_starter(engine, jobs, streams, attempt.kernel))
    return out


def _starter(engine: Any, jobs: Jobs, streams: list[torch.cuda.Stream], kernel: bool) -> Callable[[], None]:
    parts = engine.prepare(jobs, np.zeros(len(jobs), np.int64), len(streams), by_kernel=kernel)

    def start() -> None:
        current = torch.cuda.current_stream()
        for stream, part in zip(streams, parts, strict=True):
            stream.wait_stream(current)
            part(stream)
            current.wait_stream(stream)

    return start


def _row(attempt: Try, world: World, store: dist.Store) -> dict[str, Any]:
    said = [json.loads(store.get(f"links/{attempt.name}/{r}")) for r in range(world.size)]
    if not all(s[0] for s in said):
        return {"variant": attempt.name, "error": [s[1] for s in said if not s[0]]}
    seconds = [max(s[0][i] for s in said) for i in range(_REPEAT)]
    span = attempt.gap or attempt.form.run + sum((a.size - 1) * max(a.src, a.dst) for a in attempt.form.axes)
    phases = len(world.trainers) if attempt.way == "get" else len(world.generators)
    moved = phases * (_BYTES // span) * attempt.form.num_bytes
    median = statistics.median(seconds)
    return {
        "variant": attempt.name,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "host_s": max(s[1] for s in said),
        "gb_per_s": moved / median / 1e9 * (1 if attempt.way == "get" else len(world.trainers) / len(world.generators)),
    }
