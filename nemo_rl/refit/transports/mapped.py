"""Memory that processes of one host map from each other, and where the rows that they move lie in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch

from nemo_rl.refit.layout import Layout
from nemo_rl.refit.packed import pack, unpack
from nemo_rl.refit.strided import Jobs, Rows
from nemo_rl.refit.transports.host_memory import HostMemory

Side: TypeAlias = Literal["source", "landing"]
End: TypeAlias = "tuple[int, Side]"
"""A rank, and which of its two layouts: what it trains, or where weights land in place."""


class Memory(Protocol):
    """How memory of one kind of device is shown to other processes, read and written by them.

    Attributes:
        staging_bytes: the most that reads took beside their destinations.
        step_bytes: of copies, take a few times as long as telling another process that they are done.
        puts: writing to others is faster than reading from them.
        num_copies, num_launches: of engines and of kernels, by which bytes were moved so far.
    """

    staging_bytes: int
    step_bytes: int
    puts: bool
    num_copies: int
    num_launches: int

    def beacon(self) -> str:
        """Where other processes find a piece of this process's memory, and what it says."""

    def probe(self, beacon: str) -> str | None:
        """Why memory of the process that lit `beacon` cannot be read; None where it can."""

    def show(self, views: Sequence[torch.Tensor]) -> tuple[list[str], np.ndarray]:
        """(windows, int64 (n, 2): window and offset of each view's first byte). Raises OSError where it cannot."""

    def open(self, windows: Sequence[str]) -> tuple[int, np.ndarray]:
        """(what stands for the process in `prepare`, address here of each window's first byte)."""

    def keep(self, windows: Collection[str]) -> None:
        """Unmap all others: memory that its owner gave back is free only then, and a place may come again with other
        memory behind it. Nothing is under way."""

    def own(self) -> int:
        """What stands for this process itself in `prepare`."""

    def prepare(self, peer: int, jobs: Jobs, *, put: bool, ordered: bool) -> Callable[[], None]:
        """What starts copying `jobs`, as often as wanted; it raises OSError where the memory is gone.

        Args:
            peer: the other process.
            put: bytes go from here to `peer`; otherwise they come from there.
            ordered: copies start behind all that this rank has started on the device, not beside it.
        """

    def mark(self) -> Callable[[], bool]:
        """What tells whether all copies started so far are done; it raises OSError where one failed."""

    def wait(self, end: float) -> None:
        """Until all copies are done. Raises TimeoutError at `end` (monotonic), OSError where one failed."""

    def close(self) -> None:
        """Unmap; idempotent."""


def memory_of(device: torch.device) -> Memory:
    if device.type == "cpu":
        return HostMemory()
    from nemo_rl.refit.transports.cuda_memory import CudaMemory  # its bindings come with CUDA builds of torch only

    return CudaMemory(device)


class Windows:
    """Where the rows of this rank and of those that it moves bytes with lie; told again only where storage moved.

    Attributes:
        ends: what stands for the process, and its rows, of every end that is known here.
        changes: grows whenever one of them does.
    """

    def __init__(self, memory: Memory, rank: int, layouts: Mapping[End, Layout]) -> None:
        self._memory, self._rank, self._layouts = memory, rank, layouts
        self.ends: dict[End, tuple[int, Rows]] = {}
        self.changes = 0
        self._mapped: dict[End, Sequence[str]] = {}
        self._seen: dict[Side, object] = {}

    def locate(self, side: Side, held: object, views: Callable[[], Mapping[int, torch.Tensor]], shown: bool) -> bytes:
        """Find this rank's rows of `side`; what to tell others of them, empty where they know it.

        Args:
            held: the same object again says that storage stayed where it was.
            views: row -> view, of rows that bytes go into or come from.
            shown: whether others are told.

        Raises:
            OSError: memory that others are told of cannot be shown to them.
        """
        if self._seen.get(side) is held:
            return b""
        found = {row: view for row, view in views().items() if view.numel()}  # nothing lies nowhere
        rows, known = Rows.of(found, self._layouts[self._rank, side]), self.ends.get((self._rank, side))
        self._seen[side] = held
        if known is not None and rows.equals(known[1]):
            return b""
        self._know((self._rank, side), self._memory.own(), rows)
        if not shown:
            return b""
        windows, where = self._memory.show(list(found.values()))
        return pack(windows, {"row": np.array(list(found), np.int64), "where": where, "strides": rows.strides})

    def open(self, end: End, told: bytes) -> None:
        """Map what `end` told, in place of what it told before. Raises OSError where that is not possible."""
        windows, arrays = unpack(told)
        process, bases = self._memory.open(windows)
        self._mapped[end] = windows
        self._memory.keep({window for known in self._mapped.values() for window in known})
        address = np.zeros(len(self._layouts[end]), np.int64)
        address[arrays["row"]] = bases[arrays["where"][:, 0]] + arrays["where"][:, 1]
        self._know(end, process, Rows(address, arrays["strides"]))

    def _know(self, end: End, process: int, rows: Rows) -> None:
        self.ends[end] = process, rows
        self.changes += 1
