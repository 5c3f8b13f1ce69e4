"""Waiting for a whole GPU: work on any stream counts, and a deadline ends the wait while the GPU goes on."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from nemo_rl.refit import device

pytestmark = pytest.mark.gpu(1)

SECOND = 1_000_000_000  # cycles: half a second or more


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def busy(cycles: int) -> torch.Tensor:
    """Starts work on a stream of its own, which writes ones behind it."""
    out = torch.zeros(4, device=gpu())
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(cycles)
        out.fill_(1)
    return out


def test_work_on_another_stream_is_waited_for() -> None:
    out, host = busy(SECOND // 2), torch.zeros(4).pin_memory()
    started = time.monotonic()
    device.await_rest(gpu())(started + 60)
    assert time.monotonic() - started > 0.05, "the GPU was busy"
    with torch.cuda.stream(torch.cuda.Stream()):  # which waits for nothing
        host.copy_(out, non_blocking=True)
    torch.cuda.synchronize()
    assert host.tolist() == [1] * 4


def test_a_busy_gpu_is_a_timeout() -> None:
    busy(2 * SECOND)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="what this process started on cuda:0 was not done within the deadline"):
        device.await_rest(gpu())(started + 0.05)
    assert time.monotonic() - started < 0.5, "the deadline ended the wait, not the GPU"
    torch.cuda.synchronize()
    device.await_rest(gpu())(time.monotonic() + 1)


def test_an_idle_gpu_costs_microseconds() -> None:
    assert device._behind_all(gpu()) is not None, "this driver has events behind all streams"
    took = []
    for _ in range(200):
        started = time.monotonic()
        device.await_rest(gpu())(started + 1)
        took.append(time.monotonic() - started)
    assert statistics.median(took) < 2e-4


def test_aside_runs_behind_what_was_followed_and_beside_what_comes_next() -> None:
    """What the current stream is given first stands in what is read aside, what it is given later is not waited for."""
    followed, later, seen = (torch.zeros(4, device=gpu()) for _ in range(3))
    with device.aside(gpu()):  # what is started for the first time may wait for the whole GPU
        torch.add(followed, later, alpha=2, out=seen)
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND // 4)
    followed.fill_(1)
    device.follow(gpu())
    torch.cuda._sleep(2 * SECOND)
    later.fill_(1)
    with device.aside(gpu()):
        torch.add(followed, later, alpha=2, out=seen)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert not torch.cuda.current_stream().query(), "the current stream is still busy"
    assert seen.tolist() == [1] * 4, "what was followed, and nothing of what came later"
    device.rejoin(gpu())
    torch.cuda.synchronize()
