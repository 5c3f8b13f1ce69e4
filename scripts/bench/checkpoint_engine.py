"""MoonshotAI's checkpoint-engine as the variant `checkpoint-engine`: pinned host memory, broadcast, CUDA IPC.

It puts a parameter server beside each inference worker. Without RDMA its one way is a broadcast among all servers, each
of which hands what it got to a worker on its own GPU. So a trainer's process is a server, with an empty worker in a
process beside it, and a generator's process is a worker, with a server beside it. A refit registers the trainers'
tensors (copies them to pinned memory, the same in every refit), gathers their places and updates all workers. Written
for checkpoint-engine 0.4.

As a program this is the process beside a rank; a line on its input asks for one update.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitReport
from scripts.bench.rows import Said
from scripts.bench.vllm_transfer import free_port
from scripts.bench.whole import Gathered, owners

if TYPE_CHECKING:
    from scripts.bench.rank import Held, Meeting, Rank

_LIFE_S = 120  # of the process beside a rank
_NAME = "weights"


def run(rank: Rank, held: Held, variant: str, meeting: Meeting, opened: ExitStack) -> Said:
    """All ranks call it; what is to be closed goes into `opened`.

    Raises:
        ImportError: checkpoint-engine is not installed.
    """
    if rank.device.type != "cuda":
        raise ValueError("checkpoint-engine moves CUDA tensors only")
    before, started = rank.free_memory(give_back=True), time.monotonic()
    port = meeting.say("port", free_port())[0]
    place = rank.rank, held.world.size, port
    end = _Server(rank, held, place, opened) if held.source is not None else _Worker(held, place, opened)
    ready_s = time.monotonic() - started
    reports, wrong, peak = rank.refits(held, variant, meeting, partial(_refit, end, held))
    return Said.of(reports, wrong, ready_s, peak, before - rank.free_memory(), {})


def _refit(end: Any, held: Held, version: int) -> RefitReport:
    before, started = torch.cuda.memory_allocated(), time.monotonic()
    register_s = end.move()
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    staging = torch.cuda.max_memory_allocated() - before  # a server's buffers on the device, not the pinned ones
    phases = {"register": register_s, "transfer": seconds - register_s}
    num_bytes = sum(meta.num_bytes for meta in held.table.values())
    return RefitReport(version, "checkpoint-engine", False, seconds, phases, num_bytes, 0, staging)


def _beside(role: str, place: tuple[int, int, int]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.bench.checkpoint_engine", role, *map(str, place)]
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd=Path(__file__).parents[2]
    )


def _ask(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    """The next line that is an answer. Raises RuntimeError where the process ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ANSWER "):
            return line.removeprefix("ANSWER ").strip()
    raise RuntimeError("the process beside this rank ended; see this rank's log")


def _server(rank: int, size: int, port: int) -> Any:
    os.environ["RANK"] = str(rank)  # rank 0 is read from there
    from checkpoint_engine import ParameterServer

    server = ParameterServer(
        rank=rank, world_size=size, auto_pg=False, master_addr="127.0.0.1", master_port=port, mem_fraction=0.5
    )
    server.init_process_group()
    return server


def _own(server: Any, tell: Callable[[str], None]) -> Callable[[list[tuple[str, str]]], None]:
    """What asks the worker of this server's own GPU."""

    def request(handles: list[tuple[str, str]]) -> None:
        tell(dict(handles)[server._device_uuid])

    return request


class _Server:
    """A trainer: it registers what it is the first to hold whole."""

    def __init__(self, rank: Rank, held: Held, place: tuple[int, int, int], opened: ExitStack) -> None:
        self._worker = _beside("worker", place)
        opened.callback(self._worker.kill)
        self._server = _server(*place)
        opened.callback(_leave_group)
        owner = owners(held)
        self._whole = Gathered(held, dist.HashStore(), rank.rank, rank.device, alone=True)
        self._mine = [fqn for fqn in held.table if owner[fqn] == rank.rank]

    def move(self) -> float:
        """Returns seconds until the tensors were in pinned memory."""
        started = time.monotonic()
        tensors = {fqn: self._whole.whole(fqn) for fqn in self._mine}
        self._server.register_checkpoint(_NAME, named_tensors=tensors, use_shared_memory_pool=True)
        register_s = time.monotonic() - started
        self._server.gather_metas(_NAME)
        self._server.update(_NAME, _own(self._server, self._tell))
        self._server.unregister_checkpoint(_NAME)
        return register_s

    def _tell(self, handle: str) -> None:
        _ask(self._worker, handle)
        _hear(self._worker)


def _leave_group() -> None:
    """Without the other servers: those beside generators are gone by then, or going."""
    dist.distributed_c10d._abort_process_group()


class _Worker:
    """A generator: it loads what its server shows it."""

    def __init__(self, held: Held, place: tuple[int, int, int], opened: ExitStack) -> None:
        import zmq

        assert held.landing is not None
        self._landing, self._context = held.landing, zmq.Context()
        self._server = _beside("server", place)
        opened.callback(self._server.kill)

    def move(self) -> float:
        from checkpoint_engine import update_weights_from_ipc

        _ask(self._server, "update")
        handle = _hear(self._server)
        update_weights_from_ipc(self._context, handle, 0, run=self._landing.load_misc)
        _ask(self._server, "loaded")
        _hear(self._server)
        return 0.0


# ---- the process beside a rank


def _say(text: str) -> None:
    sys.stdout.write(f"ANSWER {text}\n")
    sys.stdout.flush()


def _empty_worker(lines: IO[str]) -> None:
    """Takes what its server shows and loads nothing."""
    import zmq
    from checkpoint_engine import update_weights_from_ipc

    context = zmq.Context()
    for line in lines:
        update_weights_from_ipc(context, line.strip(), 0, run=lambda tensors: None)
        _say("done")


def _lone_server(lines: IO[str], place: tuple[int, int, int]) -> None:
    """Serves the worker that started this process; it has nothing to register."""
    server = _server(*place)

    def tell(handle: str) -> None:
        _say(handle)
        lines.readline()  # until the worker loaded

    while lines.readline():
        server.gather_metas(_NAME)
        server.update(_NAME, _own(server, tell))
        _say("done")


def main(arguments: list[str]) -> None:
    threading.Timer(_LIFE_S, os._exit, [1]).start()
    torch.cuda.set_device(0)
    role, place = arguments[0], tuple(map(int, arguments[1:]))
    if role == "worker":
        _empty_worker(sys.stdin)
    else:
        _lone_server(sys.stdin, (place[0], place[1], place[2]))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
