"""Messages between GPUs over NCCL: the channel of CUDA tensors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_rl.refit.transports.lanes import Lanes
from nemo_rl.refit.transports.nccl_lanes import NcclLanes
from nemo_rl.refit.transports.own_nccl import abort_together, make_group


class _Work:
    """A transfer on a stream of NCCL's."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self, deadline_s: float) -> None:
        """What the current stream is given next comes after the transfer; the host waits for nothing, `finish` does."""
        self._work.wait()  # with a time limit, torch would block the host


class NcclChannel:
    """Communicators of its own, apart from torch's default group; a pair of ranks gets one at its first message.

    Args:
        store: rendezvous; every rank of the session connects through it.
        rank, size: in the session's world.
        deadline_s: longest wait for a communicator.
        device: of this rank's buffers.
    """

    name = "nccl"

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float, device: torch.device) -> None:
        self._store, self._rank, self._timeout = store, rank, timedelta(seconds=deadline_s)
        self._device = device
        self._everyone = tuple(range(size))
        self._groups: dict[tuple[int, ...], dist.ProcessGroupNCCL] = {}
        self._opened = 0

    def send(self, buffer: torch.Tensor, dst: int, tag: int) -> _Work:
        return _Work(self._group(self._everyone).send([buffer], dst, tag))

    def recv(self, buffer: torch.Tensor, src: int, tag: int) -> _Work:
        return _Work(self._group(self._everyone).recv([buffer], src, tag))

    def broadcast(self, buffer: torch.Tensor, root: int, ranks: Sequence[int]) -> _Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = list(ranks).index(root), 0
        return _Work(self._group(tuple(ranks)).broadcast([buffer], options))

    def lanes(self, count: int) -> Lanes:
        """Lanes for parcels; all ranks open them in the same order. Raises TimeoutError where a rank does not come."""
        self._opened += 1
        store = dist.PrefixStore(f"nccl/lanes{self._opened}", self._store)
        seconds = self._timeout.total_seconds()
        return NcclLanes(store, self._rank, len(self._everyone), count, seconds, self._device)

    def close(self) -> None:
        """Abort what is in flight; idempotent."""
        groups, self._groups = self._groups, {}
        abort_together([group.abort for group in groups.values()])

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroupNCCL:
        if ranks not in self._groups:
            store = dist.PrefixStore("nccl/" + ",".join(map(str, ranks)), self._store)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            with torch.cuda.device(self._device):
                self._groups[ranks] = make_group(store, ranks.index(self._rank), len(ranks), options)
        return self._groups[ranks]
