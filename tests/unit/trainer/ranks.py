"""Real trainer ranks for tests: processes of a server that has imported Megatron once and computed nothing."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

PRELOAD = ["nemo_rl.trainer.policy", "transformers", "tests.unit.trainer.models"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`fn(rank, init_method, *args)` on `size` ranks at once; what they returned, by rank.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), died or is late.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    meet = f"tcp://127.0.0.1:{free_port()}"
    pipes, processes = [], []
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_enter, args=(theirs, fn, rank, meet, pickle.dumps(args)), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        open_pipes = [p for i, p in enumerate(pipes) if i not in answers]
        ready = wait(open_pipes, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RuntimeError(f"ranks {sorted(set(range(len(pipes))) - set(answers))} did not answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without an answer") from None
            if not ok:
                raise RuntimeError(f"rank {rank}: {answer}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def _enter(pipe: Connection, fn: Callable[..., Any], rank: int, meet: str, args: bytes) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        answer = (True, fn(rank, meet, *pickle.loads(args)))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Plain pickle copies tensors; multiprocessing's own would share memory that dies with this process.
    pipe.send_bytes(pickle.dumps(answer))
