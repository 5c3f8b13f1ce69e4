"""Tensors that travel whole: gathered into packed buffers at one trainer, broadcast, given to the engine's loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import MiscBuffer, RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.base import Channel


def root_layout(plan: RefitPlan) -> Layout:
    """The root's destinations: every misc tensor whole; the landing unit is the packed buffer it travels in."""
    unit_of = {fqn: i for i, buffer in enumerate(plan.misc_buffers) for fqn in buffer.fqns}
    rows = [(fqn, Region.whole(plan.table[fqn].shape)) for fqn in plan.misc_fqns]
    return Layout.from_regions(rows, plan.table, [unit_of[fqn] for fqn in plan.misc_fqns])


def audience(plan: RefitPlan) -> tuple[int, ...]:
    """Ranks of the misc broadcast: the root and every generator."""
    return tuple(dict.fromkeys((plan.misc_root, *plan.world.generators)))


def broadcast(
    plan: RefitPlan, channel: Channel, rank: int, buffer: MiscBuffer, memory: torch.Tensor, end: float
) -> None:
    """This rank's part in one buffer's broadcast, done at monotonic time `end`.

    Raises:
        TransferError: naming the first tensors of the buffer and the root.
    """
    root = plan.misc_root
    if audience(plan) == (root,):
        return
    try:
        channel.broadcast(memory, root, audience(plan)).wait(end - time.monotonic())
    except RuntimeError as error:
        names = ", ".join(buffer.fqns[:4]) + (f" and {len(buffer.fqns) - 4} more" if len(buffer.fqns) > 4 else "")
        what = f"whole tensors {names} ({buffer.num_bytes} bytes)"
        peer = "the generators" if rank == root else plan.world.describe(root)
        raise TransferError(
            f"{'sending' if rank == root else 'receiving'} {what} {'to' if rank == root else 'from'} {peer}: {error}",
            rank=rank,
            phase="misc",
            remedy=f"look at the logs of {peer}; remake the session",
        ) from error


def unpack(plan: RefitPlan, buffer: MiscBuffer, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the whole tensors inside a packed uint8 buffer."""
    out = {}
    for fqn, start in zip(buffer.fqns, buffer.offsets, strict=True):
        meta = plan.table[fqn]
        out[fqn] = memory[start : start + meta.num_bytes].view(meta.dtype).view(meta.shape)
    return out


class RootSink:
    """The root's landing: a unit is a packed buffer, which leaves as a broadcast when it is whole.

    Args:
        end: deadline (monotonic).
        keep: takes each buffer and its memory afterwards, where the root generates too.
    """

    def __init__(
        self,
        plan: RefitPlan,
        channel: Channel,
        device: torch.device,
        end: float,
        keep: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        self._plan, self._channel, self._device, self._end, self._keep = plan, channel, device, end, keep
        self._row = {fqn: i for i, fqn in enumerate(plan.misc_fqns)}
        self._open: dict[int, torch.Tensor] = {}
        self._count = len(plan.misc_buffers)
        self._next = next((i for i, buffer in enumerate(plan.misc_buffers) if buffer.num_bytes), -1)
        self.staging_bytes = 0
        self.sent_bytes = 0

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        buffer = self._plan.misc_buffers[unit]
        self._open[unit] = torch.empty(buffer.num_bytes, dtype=torch.uint8, device=self._device)
        self.staging_bytes = max(self.staging_bytes, sum(m.nbytes for m in self._open.values()))
        return {self._row[f]: view for f, view in unpack(self._plan, buffer, self._open[unit]).items()}

    def close(self, unit: int) -> None:
        assert unit == self._next, f"buffer {unit} is whole before buffer {self._next}: receivers expect plan order"
        self._next = next((i for i in range(unit + 1, self._count) if self._plan.misc_buffers[i].num_bytes), -1)
        plan, memory = self._plan, self._open.pop(unit)
        broadcast(plan, self._channel, plan.misc_root, plan.misc_buffers[unit], memory, self._end)
        self.sent_bytes += memory.nbytes
        if self._keep is not None:
            self._keep(unit, memory)


class Receiver:
    """A generator's end: receives buffers of whole tensors and keeps the digests of what arrived.

    Args:
        end: deadline (monotonic).
    """

    def __init__(
        self, plan: RefitPlan, rank: int, channel: Channel, device: torch.device, end: float, verify: bool
    ) -> None:
        self._plan, self._rank, self._channel, self._verify = plan, rank, channel, verify
        self._device, self._end = device, end
        self.ledger = Ledger(len(plan.misc))
        self.received_bytes = 0
        self._copies: dict[str, list[int]] = {}
        for index, tensor in enumerate(plan.misc.tensor.tolist()):
            self._copies.setdefault(plan.names[tensor], []).append(index)

    def receive(self, buffer: MiscBuffer) -> dict[str, torch.Tensor]:
        """The tensors of `buffer`, the next one in plan order. Raises TransferError as `broadcast`."""
        memory = torch.empty(buffer.num_bytes, dtype=torch.uint8, device=self._device)
        if buffer.num_bytes:  # a buffer of empty tensors does not travel
            broadcast(self._plan, self._channel, self._rank, buffer, memory, self._end)
        self.received_bytes += buffer.num_bytes
        return self.take(buffer, memory)

    def take(self, buffer: MiscBuffer, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `buffer`, which is in `memory`."""
        tensors = unpack(self._plan, buffer, memory)
        if self._verify:
            self._digest(tensors)
        return tensors

    def _digest(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for fqn, full in tensors.items():
            whole = Region.whole(tuple(full.shape))
            for index in self._copies.get(fqn, ()):
                region = self._plan.region(self._plan.misc, index)
                self.ledger.take(index, full[region.slices_in(whole)], region)
