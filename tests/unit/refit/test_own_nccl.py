"""How groups are made that leave a peer's death to who waits; what NCCL does then is tested where there are GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.transports import nccl_lanes, own_nccl
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


class Comm:
    """Groups of one communicator; a peer in `missing` is waited for until `abort`."""

    def __init__(self, missing: set[int]) -> None:
        self._missing, self.aborted = missing, threading.Event()
        self.threads: list[str] = []

    def make(self) -> None:
        """As long as it takes to make it."""

    def exchange(self, sends: Sequence[Post], recvs: Sequence[Post], stream: int) -> None:
        self.threads.append(threading.current_thread().name)
        if {post.peer for post in (*sends, *recvs)} & self._missing:
            self.aborted.wait(5)

    def abort(self) -> None:
        self.aborted.set()


class Stream:
    cuda_stream = 0

    def wait_event(self, event: Any) -> None: ...


class Event:
    def record(self, stream: Stream) -> None: ...


@pytest.fixture
def lanes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., NcclLanes]:
    """Makes the lanes of rank 0 of three, without CUDA: one communicator each of `comms`."""
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(nccl_lanes, "unique_id", lambda: b"unique")

    def make(store: dist.Store, *comms: Comm) -> NcclLanes:
        left = list(comms)

        def made(unique: bytes, rank: int, size: int, *_: Any) -> Comm:
            assert (unique, rank, size) == (b"unique", 0, 3)
            (comm := left.pop(0)).make()
            return comm

        monkeypatch.setattr(nccl_lanes, "Communicator", made)
        return NcclLanes(store, 0, 3, len(comms), 0.2, torch.device("cpu"))

    monkeypatch.setattr(nccl_lanes, "_LEAST_S", 0.1)
    return make


def come(store: dist.Store, lane: int, peer: int) -> None:
    """What `peer` says before it connects to rank 0."""
    store.set(f"meet/{lane}/{peer}/0", b"")


def soon() -> float:
    return time.monotonic() + 0.2


NEAR, FAR = Post(torch.zeros(1), 1, 0), Post(torch.zeros(1), 2, 0)


def test_a_peer_that_does_not_come_is_a_timeout_outside_nccl(lanes_of: Callable[..., NcclLanes]) -> None:
    store, comm = dist.HashStore(), Comm({2})
    lanes, here = lanes_of(store, comm), threading.current_thread().name
    come(store, 0, 1)
    lanes.exchange(0, [NEAR], [], soon())
    lanes.exchange(0, [], [NEAR], soon())
    assert comm.threads == ["connecting lane 0 with ranks [1]", here], "known ones need no thread"
    assert store.check(["meet/0/0/1"]) and not store.check(["meet/0/0/2"])
    looks: list[None] = []
    end = soon()
    with pytest.raises(TimeoutError, match=r"connecting lane 0 with ranks \[2\] took longer than 0.2 s"):
        lanes.exchange(0, [NEAR], [FAR], end, lambda: looks.append(None))
    assert end < time.monotonic() < end + 0.1, "what is left of the transfer's deadline, and no more"
    assert looks, "others are served meanwhile"
    assert len(comm.threads) == 2 and store.check(["meet/0/0/2"])
    lanes.close()
    assert comm.aborted.is_set()


def test_a_communicator_is_not_aborted_under_the_thread_that_connects_it(
    lanes_of: Callable[..., NcclLanes], caplog: pytest.LogCaptureFixture
) -> None:
    """NCCL frees what the thread reads; other lanes are aborted, and this one's too once its thread came back."""
    store, comms = dist.HashStore(), (Comm(set()), Comm({2}), Comm({2}))
    lanes = lanes_of(store, *comms)
    come(store, 1, 2)
    with pytest.raises(TimeoutError, match=r"connecting lane 1 with ranks \[2\]"):
        lanes.exchange(1, [FAR], [], soon())
    with caplog.at_level(logging.ERROR):
        lanes.close()
    assert [comm.aborted.is_set() for comm in comms] == [True, False, True]
    assert "lanes [1] still connect to a peer that died" in caplog.text
    comms[1].aborted.set()  # NCCL gave up: the lane is like any other
    lanes = lanes_of(dist.HashStore(), comm := Comm(set()))
    come(lanes._store, 0, 2)
    lanes.exchange(0, [FAR], [], soon())
    lanes.close()
    assert comm.aborted.is_set()


def test_communicators_are_aborted_on_their_own_gpu(
    lanes_of: Callable[..., NcclLanes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a thread, which begins on the first GPU."""
    on: list[tuple[str, torch.device]] = []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        on.append((threading.current_thread().name, chosen))
        yield
        on.pop()

    class Placed(Comm):
        def abort(self) -> None:
            assert on == [("abort", torch.device("cpu"))]
            super().abort()

    lanes = lanes_of(dist.HashStore(), comm := Placed(set()))
    monkeypatch.setattr(torch.cuda, "device", device)
    lanes.close()
    assert comm.aborted.is_set() and not on


def test_a_first_rank_that_does_not_come_is_a_timeout(lanes_of: Callable[..., NcclLanes]) -> None:
    lanes_of(store := dist.HashStore(), Comm(set())).close()
    assert store.get("lane0") == b"unique"
    with pytest.raises(TimeoutError, match="making NCCL communicators took longer than 0.1 s"):
        NcclLanes(dist.HashStore(), 1, 3, 1, 0.1, torch.device("cpu"))


def test_communicators_that_were_made_are_aborted_where_another_is_not(lanes_of: Callable[..., NcclLanes]) -> None:
    first, second = Comm(set()), Comm(set())
    second.make = lambda: time.sleep(1)  # type: ignore[method-assign]
    with pytest.raises(TimeoutError, match="making NCCL communicators"):
        lanes_of(dist.HashStore(), first, second)
    assert first.aborted.is_set() and not second.aborted.is_set()


def test_communicators_are_aborted_where_a_later_one_is_refused(lanes_of: Callable[..., NcclLanes]) -> None:
    def refuse() -> None:
        raise RuntimeError("refused")

    first, second = Comm(set()), Comm(set())
    second.make = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="refused"):
        lanes_of(dist.HashStore(), first, second)
    assert first.aborted.is_set()
