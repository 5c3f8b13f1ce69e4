"""What the links of this very run give, measured with plain calls that share no code with the transports.

Copy engine: contiguous puts and gets between paired ranks, a phase for each pairing; where generators outnumber
trainers, as many of them as there are trainers, which is what each would get if generators passed on what they got.
NCCL: grouped send/recv in pairings of all ranks, all at once and phase by phase, and one broadcast to all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import World

BYTES = 4 << 30  # into each receiver
REPEAT = 5
Meet = Callable[[str], None]
Say = Callable[[str, Any], list[Any]]
"""(name, what this rank says) -> what all ranks say, in their order."""


@dataclass(frozen=True, slots=True)
class Line:
    """This process's place in a measurement.

    Attributes:
        store: of this measurement alone.
        say: exchange of small facts.
        messages: whether ranks can pass messages; NCCL wants a GPU for each.
        groups: communicators by size of the world, for this measurement and the next ones; they take long to make.
    """

    rank: int
    world: World
    device: torch.device
    store: dist.Store
    meet: Meet
    say: Say
    num_bytes: int = BYTES
    messages: bool = True
    groups: dict[int, Any] = field(default_factory=dict)


def measure(line: Line) -> Iterator[dict[str, Any]]:
    """Rows, the same on every rank: variant, seconds, GB/s into each receiver."""
    mine = torch.empty(line.num_bytes, dtype=torch.uint8, device=line.device).random_(0, 255)
    if line.device.type == "cuda":
        yield from _copies(line, mine)
    if line.messages:
        yield from _messages(line, mine)


# ---- copy engines


def _copies(line: Line, mine: torch.Tensor) -> Iterator[dict[str, Any]]:
    from cuda.bindings import runtime

    far, opened = _open_all(line, mine)
    for way in ("put", "get"):
        receivers = line.world.generators[: len(line.world.trainers)]
        movers, others = (line.world.trainers, receivers) if way == "put" else (receivers, line.world.trainers)
        num = max(len(movers), len(others))
        pairs = _phases(len(movers), len(others))
        at = movers.index(line.rank) if line.rank in movers else None
        part = line.num_bytes // num // 512 * 512

        peers = [far[others[phase[at]]] for phase in pairs if at is not None and at in phase]
        ends = [(there, mine.data_ptr()) if way == "put" else (mine.data_ptr(), there) for there in peers]
        start = partial(_copy, ends, part)
        into = part * sum(map(len, pairs)) // len(receivers)
        yield _timed(line, f"copy engine {way}, contiguous", into, start)
    line.meet("copies")
    for pointer in opened:
        _ask(runtime.cudaIpcCloseMemHandle(pointer))


def _copy(ends: list[tuple[int, int]], num_bytes: int) -> None:
    from cuda.bindings import runtime

    stream, kind = torch.cuda.current_stream().cuda_stream, runtime.cudaMemcpyKind.cudaMemcpyDefault
    for to, out in ends:
        _ask(runtime.cudaMemcpyAsync(to, out, num_bytes, kind, stream))


def _phases(num_movers: int, num_others: int) -> list[dict[int, int]]:
    """Matchings mover -> other that together are all pairs, as full as they can be."""
    num = max(num_movers, num_others)
    found = [{m: (m + step) % num for m in range(num_movers)} for step in range(num)]
    return [{m: o for m, o in phase.items() if o < num_others} for phase in found]


def _open_all(line: Line, mine: torch.Tensor) -> tuple[dict[int, int], list[int]]:
    """Rank -> address here of its buffer; what to close."""
    from cuda.bindings import driver, runtime

    base = int(_ask(driver.cuMemGetAddressRange(mine.data_ptr()))[0])
    handle = bytes(_ask(runtime.cudaIpcGetMemHandle(base))[0].reserved).hex()
    far, opened = {}, []
    said = line.say("buffer", [handle, mine.data_ptr() - base])
    others = line.world.generators if line.rank in line.world.trainers else line.world.trainers
    for rank in others:
        theirs = runtime.cudaIpcMemHandle_t()
        theirs.reserved = bytes.fromhex(said[rank][0])
        flag = runtime.cudaIpcMemLazyEnablePeerAccess
        opened.append(int(_ask(runtime.cudaIpcOpenMemHandle(theirs, flag))[0]))
        far[rank] = opened[-1] + said[rank][1]
    return far, opened


def _ask(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = answer
    if int(error):
        raise OSError(int(error), str(error))
    return tuple(values)


# ---- messages


def _messages(line: Line, mine: torch.Tensor) -> Iterator[dict[str, Any]]:
    group = line.groups.pop(line.world.size, None) or _group(line)
    sides = line.world.trainers, line.world.generators
    phases = _phases(*map(len, sides))
    part = line.num_bytes // max(map(len, sides)) // 512 * 512
    into = part * sum(map(len, phases)) // len(line.world.generators)
    pieces = mine.split(part)
    for name, rounds in (("at once", [phases]), ("in phases", [[phase] for phase in phases])):
        yield _timed(line, f"send/recv grouped, {name}", into, partial(_groups, line, group, rounds, pieces))
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    yield _timed(line, "broadcast to all", line.num_bytes, lambda: group.broadcast([mine], options).wait())
    line.meet("messages")
    line.groups[line.world.size] = group  # not where it failed


def _groups(line: Line, group: Any, rounds: list[list[dict[int, int]]], pieces: tuple[torch.Tensor, ...]) -> None:
    for together in rounds:
        _grouped(line, group, together, pieces)


def _group(line: Line) -> Any:
    size, timeout = line.world.size, timedelta(seconds=60)
    if line.device.type == "cpu":
        return dist.ProcessGroupGloo(line.store, line.rank, size, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(line.store, line.rank, size, options)


def _grouped(line: Line, group: Any, together: list[dict[int, int]], pieces: tuple[torch.Tensor, ...]) -> None:
    """All sends and receives of this rank in the pairings `together`, as one group."""
    trainers, generators = line.world.trainers, line.world.generators
    grouped, works, number = line.device.type == "cuda", [], 0
    if grouped:
        group._start_coalescing()
    for phase in together:
        for t, g in phase.items():
            if line.rank == trainers[t]:
                works.append(group.send([pieces[number % len(pieces)]], generators[g], 0))
                number += 1
            elif line.rank == generators[g]:
                works.append(group.recv([pieces[number % len(pieces)]], trainers[t], 0))
                number += 1
    if grouped:
        works = [group._end_coalescing()]
    for work in works:
        if work is not None:
            work.wait()


def _timed(line: Line, name: str, into: int, start: Callable[[], object]) -> dict[str, Any]:
    seconds = []
    for number in range(REPEAT + 1):
        _finish(line.device)
        line.meet(f"{name} {number}")
        started = time.perf_counter()
        start()
        _finish(line.device)
        seconds.append(time.perf_counter() - started)
    slowest = [max(each) for each in zip(*line.say(name, seconds[1:]), strict=True)]
    median = statistics.median(slowest)
    return {
        "variant": name,
        "seconds_median": median,
        "seconds_min": min(slowest),
        "seconds_max": max(slowest),
        "bytes_into_each": into,
        "gb_per_s": into / median / 1e9,
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
