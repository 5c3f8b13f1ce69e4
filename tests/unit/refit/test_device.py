"""Waits for a device end at their deadline and say for what; devices stand in for GPUs."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from nemo_rl.refit import device
from nemo_rl.refit.digest import Ledger

GPU = torch.device("cuda", 0)


class Event:
    """Done when it was asked `count` times."""

    def __init__(self, count):
        self.left = count

    def query(self):
        self.left -= 1
        return self.left < 0


def test_a_gpu_is_called_as_its_tensors_call_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked = [torch.device(name) for name in ("cuda", "cuda:1", "cpu")]
    assert [str(device.one_device(one)) for one in asked] == ["cuda:3", "cuda:1", "cpu"]


def test_an_event_is_awaited_until_its_deadline_and_no_longer(monkeypatch):
    monkeypatch.setattr(device, "_CLOSELY_S", 0.0)
    looks = []
    device.await_event(Event(20), "the copy", time.monotonic() + 10, lambda: looks.append(1))
    assert len(looks) == 20
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="the copy was not done within the deadline"):
        device.await_event(Event(10**9), "the copy", started + 0.05)
    assert 0.05 <= time.monotonic() - started < 5


def test_digests_that_never_come_are_a_timeout():
    ledger = Ledger(3)
    ledger.fetch()
    ledger._hosts[GPU] = torch.full((3,), 5), Event(2)
    assert ledger.read().tolist() == [5, 5, 5]
    ledger._hosts[GPU] = torch.full((3,), 5), Event(10**9)
    with pytest.raises(TimeoutError, match="the digest of 3 pieces on cuda:0 was not done within the deadline"):
        ledger.read(deadline_s=0.05)


@pytest.mark.parametrize("driver", [True, False])
def test_a_device_that_never_comes_to_rest_is_a_timeout(driver, monkeypatch):
    """Where the driver has events behind all streams, and where a thread waits instead."""
    busy, rested = threading.Event(), []

    def synchronize(where):
        assert where == GPU
        busy.wait(20)
        rested.append(where)

    class Behind:
        def query(self):
            return busy.is_set()

    monkeypatch.setattr(device, "_behind_all", lambda _: Behind() if driver else None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(
        TimeoutError,
        match="what this process started on cuda:0 (was not done within the deadline|took longer than 0.05 s)",
    ):
        device.await_rest(GPU)(time.monotonic() + 0.05)
    assert not rested
    threading.Timer(0.05, busy.set).start()
    device.await_rest(GPU)(time.monotonic() + 10)
    assert busy.is_set() and bool(rested) != driver
    device.await_rest(torch.device("cpu"))(0.0)


def test_work_in_a_thread_ends_at_its_deadline_and_says_what_it_raises():
    with pytest.raises(TimeoutError, match="making communicators took longer than 0.05 s"):
        device.within(0.05, lambda: time.sleep(1), "making communicators")
    with pytest.raises(ValueError, match="no such"):
        device.within(5, lambda: int("no such"), "it")
