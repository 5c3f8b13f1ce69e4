"""Ranks as processes that start within milliseconds: forked before any thread of a store exists, killed when late."""

from __future__ import annotations

import gc
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Forked:
    """Processes of `ranks`, each of which ends with what `work(rank, port of the store)` returns, or 1 where it raises.

    Attributes:
        pids: rank -> process.
        store: the store that they meet at; the parent hosts it.
    """

    def __init__(self, ranks: Sequence[int], work: Callable[[int, int], int | None]) -> None:
        reads, writes = os.pipe()
        self.pids = {rank: self._fork(rank, work, reads, writes) for rank in ranks}
        os.close(reads)
        timeout = timedelta(seconds=20)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
        os.write(writes, struct.pack("i", self.store.port) * len(self.pids))
        os.close(writes)

    @staticmethod
    def _fork(rank: int, work: Callable[[int, int], int | None], reads: int, writes: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            gc.disable()  # what the parent left to its collector, such as stores, has threads that are not here
            os.close(writes)
            torch.set_num_threads(1)
            code = work(rank, struct.unpack("i", os.read(reads, 4))[0]) or 0
        finally:
            os._exit(code)

    def codes(self, seconds: float = 30) -> dict[int, int]:
        """Exit code of each rank, negative for signals; who is not done in time is killed."""
        end, found = time.monotonic() + seconds, {}
        while len(found) < len(self.pids):
            for rank in self.pids.keys() - found.keys():
                if time.monotonic() > end:
                    os.kill(self.pids[rank], signal.SIGKILL)
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    found[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return dict(sorted(found.items()))
