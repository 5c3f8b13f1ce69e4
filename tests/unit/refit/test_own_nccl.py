"""How groups are made that leave a peer's death to who waits; what NCCL does then is tested where there are GPUs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
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
        self._missing, self.aborted = missing, threading.Event()
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
            self.aborted.wait(5)
        return "work"

    def eager_connect_single_device(self, device: torch.device) -> None:
        return None

    def abort(self) -> None:
        self.aborted.set()


@pytest.fixture
def lanes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NcclLanes]:
    """Makes the lanes of rank 0 of three, without CUDA: one communicator each of `groups`."""
    made = argparse.Namespace(Options=lambda **_: argparse.Namespace())
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: "stream")

    def make(store: dist.Store, *groups: Group) -> NcclLanes:
        left = list(groups)
        monkeypatch.setattr("nemo_rl.refit.transports.nccl_lanes.make_group", lambda *_: left.pop(0))
        return NcclLanes(store, 0, 3, len(groups), 0.2, torch.device("cpu"))

    monkeypatch.setattr("nemo_rl.refit.transports.nccl_lanes._LEAST_S", 0.1)
    return make


def come(store: dist.Store, lane: int, peer: int) -> None:
    """What `peer` says before it connects to rank 0."""
    store.set(f"meet/{lane}/{peer}/0", b"")


NEAR, FAR = Post(torch.zeros(1), 1, 0), Post(torch.zeros(1), 2, 0)


def test_a_peer_that_does_not_come_is_a_timeout_outside_nccl(lanes_of: Callable[..., NcclLanes]) -> None:
    store, group = dist.HashStore(), Group({2})
    lanes, here = lanes_of(store, group), threading.current_thread().name
    come(store, 0, 1)
    lanes.exchange(0, [NEAR], [])
    lanes.exchange(0, [], [NEAR])
    assert group.threads == ["connecting lane 0 with ranks [1]", here], "known ones need no thread"
    assert store.check(["meet/0/0/1"]) and not store.check(["meet/0/0/2"])
    looks: list[None] = []
    with pytest.raises(TimeoutError, match=r"connecting lane 0 with ranks \[2\] took longer"):
        lanes.exchange(0, [NEAR], [FAR], lambda: looks.append(None))
    assert looks, "others are served meanwhile"
    assert len(group.threads) == 2 and store.check(["meet/0/0/2"])
    lanes.close()
    assert group.aborted.is_set()


def test_a_communicator_is_not_aborted_under_the_thread_that_connects_it(
    lanes_of: Callable[..., NcclLanes], caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL frees what the thread reads; other lanes are aborted, and this one's too once its thread came back."""
    store, groups = dist.HashStore(), (Group(set()), Group({2}), Group({2}))
    lanes = lanes_of(store, *groups)
    come(store, 1, 2)
    with pytest.raises(TimeoutError, match=r"connecting lane 1 with ranks \[2\]"):
        lanes.exchange(1, [FAR], [])
    with caplog.at_level(logging.ERROR):
        lanes.close()
    assert [group.aborted.is_set() for group in groups] == [True, False, True]
    assert "lanes [1] still connect to a peer that died" in caplog.text
    groups[1].aborted.set()  # NCCL gave up: the lane is like any other
    lanes = lanes_of(dist.HashStore(), group := Group(set()))
    come(lanes._store, 0, 2)
    lanes.exchange(0, [FAR], [])
    lanes.close()
    assert group.aborted.is_set()


def test_communicators_that_were_made_are_aborted_where_another_is_not(lanes_of: Callable[..., NcclLanes]) -> None:
    first, second = Group(set()), Group(set())
    second.eager_connect_single_device = lambda _: time.sleep(1)  # type: ignore[assignment, method-assign]
    with pytest.raises(TimeoutError, match="making NCCL communicators"):
        lanes_of(dist.HashStore(), first, second)
    assert first.aborted.is_set() and not second.aborted.is_set()


def test_communicators_are_aborted_where_a_later_one_is_refused(lanes_of: Callable[..., NcclLanes]) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("refused")

    first, second = Group(set()), Group(set())
    second.eager_connect_single_device = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="refused"):
        lanes_of(dist.HashStore(), first, second)
    assert first.aborted.is_set()
