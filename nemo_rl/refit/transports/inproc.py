"""Messages between threads of one process: simulated ranks run the same pipeline on CPU tensors."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Hub:
    """Mailboxes shared by the ranks of one simulated world, by (source, destination, tag)."""

    boxes: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = field(default_factory=dict)

    def box(self, src: int, dst: int, tag: int) -> queue.Queue[torch.Tensor]:
        return self.boxes.setdefault((src, dst, tag), queue.Queue())  # atomic: threads race for new boxes


class _Sent:
    def wait(self, deadline_s: float) -> None:
        return None


@dataclass
class _Received:
    box: queue.Queue[torch.Tensor]
    buffer: torch.Tensor

    def wait(self, deadline_s: float) -> None:
        try:
            message = self.box.get(timeout=deadline_s)
        except queue.Empty:
            raise RuntimeError(f"no message within {deadline_s:g} s") from None
        if message.numel() != self.buffer.numel():
            raise RuntimeError(f"message of {message.numel()} bytes arrived where {self.buffer.numel()} were due")
        self.buffer.copy_(message)


class InprocChannel:
    """One rank's end of a `Hub`. A send copies, so that the sender's buffer is free at once."""

    name = "inproc"

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self._rank = hub, rank

    def send(self, buffer: torch.Tensor, dst: int, tag: int) -> _Sent:
        self._hub.box(self._rank, dst, tag).put(buffer.clone())
        return _Sent()

    def recv(self, buffer: torch.Tensor, src: int, tag: int) -> _Received:
        return _Received(self._hub.box(src, self._rank, tag), buffer)

    def broadcast(self, buffer: torch.Tensor, root: int, ranks: Sequence[int]) -> _Sent | _Received:
        if self._rank != root:
            return self.recv(buffer, root, -1)
        for rank in ranks:
            if rank != root:
                self.send(buffer, rank, -1)
        return _Sent()

    def close(self) -> None:
        return None
