"""Faults on GPU transports: killed ranks are named in time, contexts live on, wrong bytes are caught."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scripts.bench.machine import only

pytestmark = pytest.mark.gpu(1)

ROOT = Path(__file__).parents[2]
SAFE = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
LIMIT_S = 60


class Ranks:
    """Processes of one scenario, one GPU each, and their logs."""

    def __init__(self, folder: Path, port: int, arguments: list[str]) -> None:
        self._folder, self._port, self._arguments = folder, port, arguments
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def start(self, rank: int, *more: str) -> subprocess.Popen[bytes]:
        seen = only(rank % count) if (count := torch.cuda.device_count()) else ""
        environ = dict(os.environ, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=seen, OMP_NUM_THREADS="1", **SAFE)
        command = [sys.executable, "-m", "tests.gpu.fault_rank", "--rank", str(rank), "--port", str(self._port)]
        command += [*self._arguments, "--device", self.device, *more]
        with open(self._folder / f"rank{rank}{''.join(more)}.log", "wb") as file:
            return subprocess.Popen(command, env=environ, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def logs(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in sorted(self._folder.glob("*.log"))}


def play(folder: Path, transport: str, generators: int, victim: int, fault: str, *more: str) -> dict[str, str]:
    """All ranks of a scenario, and who comes for a killed one; their logs. Whoever is late is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    arguments = [
        "--transport",
        transport,
        "--generators",
        str(generators),
        "--victim",
        str(victim),
        "--fault",
        fault,
        *more,
    ]
    ranks = Ranks(folder, store.port, arguments)
    running = [ranks.start(rank) for rank in range(1 + generators)]
    if fault == "killed":
        running.append(ranks.start(victim, "--replaces"))
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end and any(p.poll() is None for p in running):
        time.sleep(0.05)
    for process in running:
        process.kill()
    codes, logs = [p.wait() for p in running], ranks.logs()
    expected = [-signal.SIGKILL if fault == "killed" and r == victim else 0 for r in range(1 + generators)]
    assert codes == expected + [0] * (fault == "killed"), "\n\n".join(f"{n}:\n{log[-3000:]}" for n, log in logs.items())
    return logs


@pytest.mark.parametrize(("generators", "victim"), [(1, 0), (1, 1), (3, 1), (3, 2)])
def test_a_rank_killed_while_memory_is_read(generators: int, victim: int, tmp_path: Path) -> None:
    """The trainer, a generator, and the first and the second replica of a chain of three."""
    logs = play(tmp_path, "peer", generators, victim, "killed")
    survivors = [f"rank{r}" for r in range(1 + generators) if r != victim]
    assert all(logs[name].endswith("ok\n") and f"(rank {victim})" in logs[name] for name in survivors)


@pytest.mark.gpu(2)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="nccl moves CUDA tensors")
@pytest.mark.parametrize(("victim", "more"), [(0, ()), (1, ()), (0, ("--at-once",))])
def test_a_rank_killed_while_messages_travel(victim: int, more: tuple[str, ...], tmp_path: Path) -> None:
    """Between ranks that know each other, and before they connected."""
    logs = play(tmp_path, "nccl", 1, victim, "killed", *more)
    assert logs[f"rank{1 - victim}"].endswith("ok\n")


@pytest.mark.parametrize(("generators", "victim"), [(1, 0), (1, 1), (3, 1)])
def test_wrong_bytes_at_either_end_and_on_the_way(generators: int, victim: int, tmp_path: Path) -> None:
    """At the trainer after its digests, at a generator after it read, at a forwarder between two steps."""
    logs = play(tmp_path, "peer", generators, victim, "damaged")
    assert all(log.endswith("ok\n") and "layers.3.w" in log for log in logs.values())
