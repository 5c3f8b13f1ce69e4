"""What a channel is: it carries flat buffers between ranks and knows neither plans nor models."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch


class Pending(Protocol):
    """A transfer that was started."""

    def wait(self, deadline_s: float) -> None:
        """Block until the buffer may be used again. Raises RuntimeError where the peer failed or time ran out."""


class Channel(Protocol):
    """Point-to-point messages and a broadcast of uint8 buffers among the ranks of one session.

    Both ends start the transfers between them in the same order. Buffers are contiguous and stay alive until waited
    for.
    """

    name: str

    def send(self, buffer: torch.Tensor, dst: int, tag: int) -> Pending:
        """Start sending `buffer` (uint8, contiguous) to rank `dst`."""

    def recv(self, buffer: torch.Tensor, src: int, tag: int) -> Pending:
        """Start receiving into `buffer` (uint8, contiguous) from rank `src`."""

    def broadcast(self, buffer: torch.Tensor, root: int, ranks: Sequence[int]) -> Pending:
        """Start a broadcast of `buffer` from `root` among `ranks`; each of them calls it in the same order."""

    def close(self) -> None:
        """Give up connections, which makes waits of peers on this rank fail; idempotent."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as a flat uint8 tensor, without a copy."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() == 1:  # counts as contiguous with any stride, which a change of dtype does not accept
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


class Slots:
    """Reusable message buffers of one direction, made on first use; `num_bytes` is their high-water."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._free: deque[torch.Tensor] = deque(torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count))
        self.num_bytes = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of at least `num_bytes`; the pipeline's window never asks for more than there are."""
        slot = self._free.popleft()
        if slot.numel() < num_bytes:
            self.num_bytes += num_bytes - slot.numel()
            slot = torch.empty(num_bytes, dtype=torch.uint8, device=slot.device)
        return slot

    def give(self, slot: torch.Tensor) -> None:
        self._free.append(slot)
