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
from nemo_rl.refit.transports.copy_engine import Way

log = logging.getLogger("bench_links")
_BYTES = 2 << 30  # of a phase
_REPEAT = 3
Meet = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Try:
    """Copies of one form; `side` says who moves: the reader `get`s, the owner `put`s."""

    side: str
    what: str
    form: Form
    way: Way

    @property
    def name(self) -> str:
        return f"{self.side} {self.what}"

    @property
    def span(self) -> int:
        """Bytes from the start of one box to the start of the next, at the reader and at the owner."""
        return self.form.run + sum((axis.size - 1) * max(axis.src, axis.dst) for axis in self.form.axes)


def tries() -> list[Try]:
    """The ceilings first; then what the choice of a way rests on."""
    expert = 384 * 2048 * 2
    out = [Try(side, "contiguous", Form((), _BYTES // 4, 2), "calls") for side in ("put", "get")]
    for side in ("put", "get"):
        out.append(Try(side, f"pieces of {expert} bytes in calls", Form((), expert, 2), "calls"))
        for size in (1 << 14, 1 << 16, 1 << 18, 1 << 19, expert):
            for way, how in (("pieces", "in batched calls"), ("kernel", "by kernel")):
                out.append(Try(side, f"pieces of {size} bytes {how}", Form((), size, 2), way))  # type: ignore[arg-type]
        for row in (128, 256, 512, 768, 1536, 4096):
            form = Form((Axis((64 << 20) // row, 2 * row, row),), row, 2)
            out.append(Try(side, f"rows of {row} bytes in calls of 64 MB", form, "calls"))
            out.append(Try(side, f"rows of {row} bytes by kernel", form, "kernel"))
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
    get = attempt.side == "get"
    movers, peers = (world.generators, world.trainers) if get else (world.trainers, world.generators)
    if rank not in movers:
        return []
    stream, out = torch.cuda.Stream(), []
    for phase in range(len(peers)):
        address = far[peers[(movers.index(rank) + phase) % len(peers)]]
        count = _BYTES // attempt.span
        steps = np.arange(count, dtype=np.int64) * attempt.span
        there, here = address + steps[::-1], mine + steps  # in opposite orders, so that pieces stay pieces
        src, dst = (there, here) if get else (here, there)
        jobs = Jobs(src, dst, (attempt.form,) * count)
        out.append(_starter(engine.prepare(jobs, np.zeros(count, np.int64), attempt.way), stream))
    return out


def _starter(parts: Any, stream: torch.cuda.Stream) -> Callable[[], None]:
    def start() -> None:
        for begin in (parts.kernel, parts.engines):
            if begin is not None:
                begin(stream)

    return start


def _row(attempt: Try, world: World, store: dist.Store) -> dict[str, Any]:
    said = [json.loads(store.get(f"links/{attempt.name}/{r}")) for r in range(world.size)]
    if not all(s[0] for s in said):
        return {"variant": attempt.name, "error": [s[1] for s in said if not s[0]]}
    seconds = [max(s[0][i] for s in said) for i in range(_REPEAT)]
    phases = len(world.trainers) if attempt.side == "get" else len(world.generators)
    moved = phases * (_BYTES // attempt.span) * attempt.form.num_bytes
    median = statistics.median(seconds)
    return {
        "variant": attempt.name,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "host_s": max(s[1] for s in said),
        "gb_per_s": moved
        / median
        / 1e9
        * (1 if attempt.side == "get" else len(world.trainers) / len(world.generators)),
    }
