"""What carries parcels: lanes on which groups of sends and receives are posted, and what packs and unpacks them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_rl.refit.strided import Jobs
from nemo_rl.refit.transports.base import Channel, Pending
from nemo_rl.refit.transports.host_memory import HostMemory

_LEAST = 3


def num_lanes(num_streams: int) -> int:
    """How many lanes parcels go over: no fewer than keep a link full while others begin and end.

    Between two H200s, 64 MiB messages over 1, 2 and 3 lanes reach 337, 354 and 363 GB/s, of 366 with 1 GiB messages.
    """
    return max(num_streams, _LEAST)


@dataclass(frozen=True, slots=True)
class Post:
    """One buffer (uint8, contiguous) to or from rank `peer`; `tag` is the transfer's number among those of the pair."""

    buffer: torch.Tensor
    peer: int
    tag: int


class Flight(Pending, Protocol):
    """A group that was posted."""

    def done(self) -> bool:
        """Whether all of it arrived; never waits."""


class Lanes(Protocol):
    """Lanes of one rank; what is posted on a lane runs in the order of posting, lanes run beside each other."""

    def exchange(
        self, lane: int, sends: Sequence[Post], recvs: Sequence[Post], end: float, look: Callable[[], None] = ...
    ) -> Flight:
        """Start a group after what the current stream was given so far; ranks' groups of a lane match in order.

        Calls `look` now and then while a peer is not there to start it with; raises TimeoutError where it is not at
        `end` (monotonic).
        """

    def ahead(self) -> AbstractContextManager[None]:
        """What is started inside goes before other work of the device, and what comes behind it waits for it."""

    def prepare(self, jobs: Jobs) -> Callable[[], None]:
        """What starts copying `jobs` within this rank on the current stream, as often as wanted."""

    def finish(self, end: float, look: Callable[[], None]) -> None:
        """Until the current stream is done; calls `look` now and then. Raises TimeoutError at `end` (monotonic)."""

    def close(self) -> None:
        """Abort what is in flight; idempotent."""


class _HostFlight:
    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending, self._done = pending, False

    def wait(self, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        for one in self._pending:
            one.wait(end - time.monotonic())
        self._done = True

    def done(self) -> bool:
        return self._done


class HostLanes:
    """The same on CPU tensors, over any channel: messages match by tag, so that lanes are one and the same."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._memory = channel, HostMemory()

    def exchange(
        self,
        lane: int,
        sends: Sequence[Post],
        recvs: Sequence[Post],
        end: float,
        look: Callable[[], None] = lambda: None,
    ) -> _HostFlight:
        started: list[Pending] = [self._channel.send(p.buffer, p.peer, p.tag) for p in sends]
        started += [self._channel.recv(p.buffer, p.peer, p.tag) for p in recvs]
        return _HostFlight(started)

    def ahead(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, jobs: Jobs) -> Callable[[], None]:
        return self._memory.prepare(os.getpid(), jobs, put=False, ordered=True)

    def finish(self, end: float, look: Callable[[], None]) -> None:
        """Flights were waited for one by one."""

    def close(self) -> None:
        """The channel belongs to the session."""
