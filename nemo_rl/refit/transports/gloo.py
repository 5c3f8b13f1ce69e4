"""Messages over gloo sockets: the channel of CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class _Work:
    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self, deadline_s: float) -> None:
        self._work.wait(timedelta(seconds=max(deadline_s, 0.001)))


class GlooChannel:
    """Process groups of its own, apart from torch's default group.

    Args:
        store: rendezvous; every rank of the session connects through it.
        rank, size: in the session's world.
        deadline_s: longest wait for the connections.
    """

    name = "gloo"

    def __init__(self, store: dist.Store, rank: int, size: int, deadline_s: float) -> None:
        self._store, self._rank, self._deadline = store, rank, timedelta(seconds=deadline_s)
        self._groups: dict[tuple[int, ...], dist.ProcessGroupGloo] = {}
        self._everyone = tuple(range(size))
        self._group(self._everyone)

    def send(self, buffer: torch.Tensor, dst: int, tag: int) -> _Work:
        return _Work(self._group(self._everyone).send([buffer], dst, tag))

    def recv(self, buffer: torch.Tensor, src: int, tag: int) -> _Work:
        return _Work(self._group(self._everyone).recv([buffer], src, tag))

    def broadcast(self, buffer: torch.Tensor, root: int, ranks: Sequence[int]) -> _Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = list(ranks).index(root), 0
        return _Work(self._group(tuple(ranks)).broadcast([buffer], options))

    def close(self) -> None:
        self._groups.clear()

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroupGloo:
        if ranks not in self._groups:
            store = dist.PrefixStore("gloo/" + ",".join(map(str, ranks)), self._store)
            self._groups[ranks] = dist.ProcessGroupGloo(store, ranks.index(self._rank), len(ranks), self._deadline)
        return self._groups[ranks]
