"""Lanes between GPUs: a communicator each, made when the plan is agreed on and aborted on failure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_rl.refit.device import finish, within
from nemo_rl.refit.strided import Jobs
from nemo_rl.refit.transports.lanes import Aside, Post
from nemo_rl.refit.transports.own_nccl import abort_together, make_group

log = logging.getLogger(__name__)

PACK_PROGRAMS = 64
"""Programs that pack or spread a parcel: enough to be ahead of the wire, few enough to leave it its bandwidth."""

MAX_CTAS: int | None = None
"""Of a lane's kernels; NCCL's own choice where it is None."""

_LOOK_S = 1e-3  # between looks for a peer that is about to connect
_LEAST_S = 1.0  # for NCCL to connect peers that are there
_NEVER = timedelta(days=7)  # deadlines are kept by who waits; torch's own would end the process


class _NcclFlight:
    """A group on its lane's stream."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self, deadline_s: float) -> None:
        """What the current stream is given next comes after the group; the host waits for nothing, `finish` does."""
        self._work.wait()

    def done(self) -> bool:
        return bool(self._work.is_completed())


class NcclLanes:
    """`count` communicators over all ranks, each with a stream of its own.

    Args:
        store: rendezvous, not used for lanes before; every rank of the session connects through it.
        rank, size: in the session's world.
        deadline_s: longest wait for the communicators, and for a peer at its first message.

    Raises:
        TimeoutError: some rank did not connect.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, count: int, deadline_s: float, device: torch.device
    ) -> None:
        self._device, self._store, self._rank = device, store, rank
        self._deadline_s = deadline_s
        self._groups: list[dist.ProcessGroupNCCL] = []
        self._met: set[tuple[int, int]] = set()  # lane, peer
        self._connecting: set[int] = set()  # lanes on which a thread is inside NCCL
        self._ahead = torch.cuda.Stream(device, priority=-1)
        try:
            within(deadline_s, lambda: self._connect(size, count), "making NCCL communicators")
        except Exception:
            self.close()
            raise

    def _connect(self, size: int, count: int) -> None:
        with torch.cuda.device(self._device):
            for lane in range(count):
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                options._timeout = _NEVER
                if MAX_CTAS is not None:
                    options.config.max_ctas = MAX_CTAS
                group = make_group(dist.PrefixStore(f"lane{lane}", self._store), self._rank, size, options)
                group.eager_connect_single_device(self._device)
                self._groups.append(group)

    def exchange(
        self, lane: int, sends: Sequence[Post], recvs: Sequence[Post], look: Callable[[], None] = lambda: None
    ) -> _NcclFlight:
        """Raises TimeoutError where a peer of which this lane has heard nothing does not connect."""
        peers = {(lane, post.peer) for post in (*sends, *recvs)}
        if peers <= self._met:
            return self._exchange(lane, sends, recvs)
        end, fresh = time.monotonic() + self._deadline_s, sorted(peer for _, peer in peers - self._met)
        what = f"connecting lane {lane} with ranks {fresh}"
        self._meet(lane, fresh, end, what, look)
        flight = self._first(lane, sends, recvs, end, what)
        self._met |= peers
        return flight

    def _meet(self, lane: int, peers: Sequence[int], end: float, what: str, look: Callable[[], None]) -> None:
        """Until all of `peers` are about to connect too. NCCL would wait without a limit for one that never comes."""
        for peer in peers:
            self._store.set(f"meet/{lane}/{self._rank}/{peer}", b"")
        keys = [f"meet/{lane}/{peer}/{self._rank}" for peer in peers]
        while not self._store.check(keys):
            if time.monotonic() > end:
                raise TimeoutError(f"{what} took longer than {self._deadline_s:g} s")
            look()
            time.sleep(_LOOK_S)

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
        group = self._groups[lane]
        group._start_coalescing()
        try:
            for post in sends:
                group.send([post.buffer], post.peer, post.tag)
            for post in recvs:
                group.recv([post.buffer], post.peer, post.tag)
        finally:
            work = group._end_coalescing()
        return _NcclFlight(work)

    @contextmanager
    def ahead(self) -> Iterator[Aside]:
        outer = torch.cuda.current_stream(self._device)
        self._ahead.wait_stream(outer)
        with torch.cuda.stream(self._ahead):
            yield lambda: torch.cuda.stream(outer)
        outer.wait_stream(self._ahead)

    def prepare(self, jobs: Jobs) -> Callable[[], None]:
        from nemo_rl.refit.transports.strided_kernel import StridedBatch  # Triton comes with CUDA builds of torch

        batch = StridedBatch(jobs, range(len(jobs)), self._device, PACK_PROGRAMS)
        return lambda: batch.launch(torch.cuda.current_stream(self._device))

    def finish(self, end: float, look: Callable[[], None]) -> None:
        finish(self._device, end, look)

    def close(self) -> None:
        """Abort what is in flight; idempotent.

        A communicator that a thread is still connecting is left to it: NCCL would free what the thread reads.
        """
        groups, self._groups = self._groups, []
        busy = set(self._connecting)
        abort_together([group.abort for lane, group in enumerate(groups) if lane not in busy])
        if groups and busy:
            log.error("lanes %s still connect to a peer that died; their communicators are not freed", sorted(busy))
