"""Lanes between GPUs: a communicator and a stream each, made when the plan is agreed on and aborted on failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from nemo_rl.refit.device import within
from nemo_rl.refit.strided import Jobs
from nemo_rl.refit.transports.lanes import Post
from nemo_rl.refit.transports.nccl_calls import Communicator, unique_id
from nemo_rl.refit.transports.own_nccl import abort_together

log = logging.getLogger(__name__)

PACK_PROGRAMS = 64
"""Programs that pack or spread a parcel: enough to be ahead of the wire, few enough to leave it its bandwidth."""

_LOOK_S = 1e-3  # between looks for a peer that is about to connect
_LEAST_S = 1.0  # for NCCL to connect peers that are there
_CHECK_S = 0.1  # between looks for connections that broke


class _NcclFlight:
    """A group on its lane's stream."""

    def __init__(self, done: torch.cuda.Event, device: torch.device) -> None:
        self._done, self._device = done, device

    def wait(self, deadline_s: float) -> None:
        """What the current stream is given next comes after the group; the host waits for nothing, `finish` does.

        No later than `finish`: events are used again.
        """
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def done(self) -> bool:
        return bool(self._done.query())


class NcclLanes:
    """`count` communicators over all ranks, each with a stream of its own.

    Args:
        store: rendezvous, not used for lanes before; every rank of the session connects through it.
        rank, size: in the session's world.
        deadline_s: longest wait for the communicators.

    Raises:
        TimeoutError: some rank did not connect.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, count: int, deadline_s: float, device: torch.device
    ) -> None:
        self._device, self._store, self._rank = device, store, rank
        self._comms: list[Communicator] = []
        self._met: set[tuple[int, int]] = set()  # lane, peer
        self._connecting: set[int] = set()  # lanes on which a thread is inside NCCL
        self._before = torch.cuda.Event()  # what a group waits for
        self._done: list[torch.cuda.Event] = []  # making and freeing them takes longer than their use
        self._posted = 0  # groups since `finish`
        self._ahead, *self._streams = (torch.cuda.Stream(device, priority=-1) for _ in range(1 + count))
        try:
            self._connect(size, time.monotonic() + deadline_s)
        except Exception:
            self.close()
            raise

    def _connect(self, size: int, end: float) -> None:
        what, keys = "making NCCL communicators", [f"lane{lane}" for lane in range(len(self._streams))]
        for key in keys if self._rank == 0 else ():
            self._store.set(key, unique_id())
        self._await(keys, end, what)

        def make() -> None:
            with torch.cuda.device(self._device):
                for key in keys:
                    self._comms.append(Communicator(bytes(self._store.get(key)), self._rank, size))

        within(max(end - time.monotonic(), 0.0), make, what)

    def _await(self, keys: Sequence[str], end: float, what: str, look: Callable[[], None] = lambda: None) -> None:
        deadline_s = end - time.monotonic()
        while not self._store.check(list(keys)):
            if time.monotonic() > end:
                raise TimeoutError(f"{what} took longer than {round(deadline_s, 2):g} s")
            look()
            time.sleep(_LOOK_S)

    def exchange(
        self,
        lane: int,
        sends: Sequence[Post],
        recvs: Sequence[Post],
        end: float,
        look: Callable[[], None] = lambda: None,
    ) -> _NcclFlight:
        """See `Lanes.exchange`."""
        peers = {(lane, post.peer) for post in (*sends, *recvs)}
        if peers <= self._met:
            return self._exchange(lane, sends, recvs)
        fresh = sorted(peer for _, peer in peers - self._met)
        what = f"connecting lane {lane} with ranks {fresh}"
        self._meet(lane, fresh, end, what, look)
        flight = self._first(lane, sends, recvs, end, what)
        self._met |= peers
        return flight

    def _meet(self, lane: int, peers: Sequence[int], end: float, what: str, look: Callable[[], None]) -> None:
        """Until all of `peers` are about to connect too. NCCL would wait without a limit for one that never comes."""
        for peer in peers:
            self._store.set(f"meet/{lane}/{self._rank}/{peer}", b"")
        self._await([f"meet/{lane}/{peer}/{self._rank}" for peer in peers], end, what, look)

    def _first(self, lane: int, sends: Sequence[Post], recvs: Sequence[Post], end: float, what: str) -> _NcclFlight:
        """NCCL connects peers in their first group: a peer that dies inside it is waited for without a limit."""
        found, stream = [], torch.cuda.current_stream(self._device)

        def first() -> None:
            try:
                with torch.cuda.stream(stream):
                    found.append(self._exchange(lane, sends, recvs))
            finally:
                self._connecting.discard(lane)

        self._connecting.add(lane)
        within(max(end - time.monotonic(), _LEAST_S), first, what)
        return found[0]

    def _exchange(self, lane: int, sends: Sequence[Post], recvs: Sequence[Post]) -> _NcclFlight:
        stream = self._streams[lane]
        self._before.record(torch.cuda.current_stream(self._device))
        stream.wait_event(self._before)
        self._comms[lane].exchange(sends, recvs, stream.cuda_stream)
        if self._posted == len(self._done):
            self._done.append(torch.cuda.Event())
        done = self._done[self._posted]
        done.record(stream)
        self._posted += 1
        return _NcclFlight(done, self._device)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._device)
        if not outer.query():
            self._ahead.wait_stream(outer)
        with torch.cuda.stream(self._ahead):
            yield
        outer.wait_stream(self._ahead)

    def prepare(self, jobs: Jobs) -> Callable[[], None]:
        from nemo_rl.refit.transports.strided_kernel import StridedBatch  # Triton comes with CUDA builds of torch

        batch = StridedBatch(jobs, range(len(jobs)), self._device, PACK_PROGRAMS)
        return lambda: batch.launch(torch.cuda.current_stream(self._device))

    def finish(self, end: float, look: Callable[[], None]) -> None:
        """Without pauses, which are longer than the last parcels; others may run meanwhile.

        Raises RuntimeError where a connection broke.
        """
        self._posted = 0
        done = torch.cuda.current_stream(self._device).record_event()
        checked = time.monotonic()
        while not done.query():
            if time.monotonic() > end:
                raise TimeoutError(f"work on {self._device} was not done within the deadline")
            if time.monotonic() > checked + _CHECK_S:
                checked = time.monotonic()
                for comm in self._comms:
                    comm.check()
            look()
            time.sleep(0)

    def close(self) -> None:
        """Abort what is in flight; idempotent.

        A communicator that a thread is still connecting is left to it: NCCL would free what the thread reads.
        """
        comms, self._comms = self._comms, []
        busy = set(self._connecting)
        abort_together([partial(self._abort, comm) for lane, comm in enumerate(comms) if lane not in busy])
        if comms and busy:
            log.error("lanes %s still connect to a peer that died; their communicators are not freed", sorted(busy))

    def _abort(self, comm: Communicator) -> None:
        with torch.cuda.device(self._device):  # threads begin on the first GPU: NCCL would leave a context there
            comm.abort()
