"""Runs a case with a process for each rank; the processes are started once and serve row after row."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitReport
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.session import RefitSession
from tests.golden.case import Case
from tests.golden.execute import OPTIONS, ORDER, Outcome, landing_of, prepare, source_of, world_of
from tests.golden.ranks import Tensors

_START_S = 120.0


class Pool:
    """Rank processes. Use as a context; they end with it."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, case: Case) -> Outcome:
        """As `simulate`, over the transport that the row names.

        Raises:
            RuntimeError: a rank failed (its traceback is in the message), died or was late.
        """
        world = world_of(case)
        self._start(world.size)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(case, Path(folder) / "case.pt")
            pipes = [pipe for _, pipe in self._ranks[: world.size]]
            for rank, pipe in enumerate(pipes):
                pipe.send((folder, rank, store.port))
            try:
                _await(pipes)
            except RuntimeError:
                self._end()
                raise
            said = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world.size)]
        plan = RefitPlan.from_bytes(said[0]["plan"])
        reports = tuple({r: found["reports"][i] for r, found in enumerate(said)} for i in range(len(ORDER)))
        held = tuple({i: said[r]["held"][n] for i, r in enumerate(world.generators)} for n in range(len(ORDER)))
        return Outcome(plan, reports, held)

    def _start(self, size: int) -> None:
        context = mp.get_context("spawn")
        while len(self._ranks) < size:
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, mine))

    def _end(self) -> None:
        for _, pipe in self._ranks:
            with suppress(OSError):
                pipe.send(None)
        for process, pipe in self._ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
            pipe.close()
        self._ranks = []


def _await(pipes: list[Connection]) -> None:
    left, end = dict(enumerate(pipes)), time.monotonic() + _START_S + 2 * OPTIONS.deadline_s
    while left:
        ready = wait(list(left.values()), timeout=max(end - time.monotonic(), 0))
        if not ready:
            raise RuntimeError(f"ranks {sorted(left)} did not answer in time")
        for rank in [r for r, pipe in left.items() if pipe in ready]:
            try:
                text = left.pop(rank).recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if text:
                raise RuntimeError(f"rank {rank}: {text}")


def serve(pipe: Connection) -> None:
    """A rank process: for each (folder, rank, port) run that rank of `case.pt`, write what it found, answer ''."""
    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        folder, rank, port = task
        try:
            torch.save(run_rank(torch.load(Path(folder) / "case.pt", weights_only=False), rank, port), _file(*task))
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())
    os._exit(0)


def _file(folder: str, rank: int, port: int) -> Path:
    return Path(folder) / f"{rank}.pt"


def run_rank(case: Case, rank: int, port: int) -> Mapping[str, Any]:
    """What one rank saw: the plan's bytes, a report and what it holds for each refit."""
    source, landing = source_of(case, rank), landing_of(case, rank)
    options = replace(OPTIONS, transport=case.row.run)
    session = RefitSession(rank, world_of(case), ("127.0.0.1", port), options, source, landing)
    reports: list[RefitReport] = []
    held: list[Tensors] = []
    try:
        session.connect()
        plan = session.plan()
        for version, name in enumerate(ORDER, 1):
            prepare(source, landing, case.weights[name], 100 * version + rank)
            reports.append(session.refit(version))
            held.append({} if landing is None else landing.snapshot())
    finally:
        session.close()
    return {"plan": plan.to_bytes(), "reports": reports, "held": held}
