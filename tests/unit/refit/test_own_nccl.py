"""How groups are made that leave a peer's death to who waits; what NCCL does then is tested where there are GPUs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.transports import own_nccl
from nemo_rl.refit.transports.lanes import Post
from nemo_rl.refit.transports.nccl_lanes import NcclLanes
from nemo_rl.refit.transports.own_nccl import abort_together, make_group

NAME = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.mark.parametrize("before", [None, "3"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_watchdog_is_told_while_the_group_is_made(
    monkeypatch: pytest.MonkeyPatch, before: str | None, fails: bool
) -> None:
    seen = []

    def made(*_: Any) -> str:
        seen.append(os.environ[NAME])
        if fails:
            raise RuntimeError("no connection")
        return "group"

    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    monkeypatch.setenv(NAME, before) if before else monkeypatch.delenv(NAME, raising=False)
    try:
        assert make_group(None, 0, 1, None) == "group" and not fails
    except RuntimeError:
        assert fails
    assert seen == ["0"] and os.environ.get(NAME) == before


def test_aborts_that_wait_for_each_other_end_whatever_one_of_them_raises(caplog: pytest.LogCaptureFixture) -> None:
    meeting, done = threading.Barrier(3), []

    def abort() -> None:
        meeting.wait(5)
        done.append(None)

    def fail() -> None:
        meeting.wait(5)
        raise RuntimeError("gone")

    with caplog.at_level(logging.WARNING):
        abort_together([abort, fail, abort])
    assert len(done) == 2 and "abort failed: gone" in caplog.text


def test_an_abort_that_hangs_is_reported_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(own_nccl, "_ABORT_S", 0.05)
    never, started = threading.Event(), time.monotonic()
    abort_together([never.wait, lambda: None])
    never.set()
    assert time.monotonic() - started < 2 and "1 of 2 communicators were not aborted" in caplog.text


class Group:
    """Groups of one communicator; a peer in `missing` is waited for until `abort`."""

    def __init__(self, missing: set[int]) -> None:
        self._missing, self._aborted = missing, threading.Event()
        self.threads: list[str] = []
        self._waits = False

    def _start_coalescing(self) -> None:
        self._waits = False

    def send(self, buffers: list[torch.Tensor], peer: int, tag: int) -> None:
        self._waits = peer in self._missing

    recv = send

    def _end_coalescing(self) -> str:
        self.threads.append(threading.current_thread().name)
        if self._waits:
            self._aborted.wait(5)
        return "work"

    def eager_connect_single_device(self, device: torch.device) -> None:
        return None

    def abort(self) -> None:
        self._aborted.set()


def test_a_peer_that_never_connects_is_a_timeout_and_known_ones_need_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group({2})
    monkeypatch.setattr("nemo_rl.refit.transports.nccl_lanes.make_group", lambda *_: group)
    made = argparse.Namespace(Options=lambda **_: argparse.Namespace())
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: "stream")
    lanes = NcclLanes(dist.HashStore(), 0, 3, 1, 0.2, torch.device("cpu"))
    here, near, far = threading.current_thread().name, Post(torch.zeros(1), 1, 0), Post(torch.zeros(1), 2, 0)
    lanes.exchange(0, [near], [])
    lanes.exchange(0, [], [near])
    assert group.threads == ["connecting lane 0 with ranks [1]", here]
    with pytest.raises(TimeoutError, match=r"connecting lane 0 with ranks \[1, 2\] took longer"):
        lanes.exchange(0, [near], [far])
    lanes.close()
    assert group._aborted.is_set()
