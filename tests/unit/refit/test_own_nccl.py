"""How groups are made that leave a peer's death to who waits; what NCCL does then is tested where there are GPUs."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from nemo_rl.refit.transports import own_nccl
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
