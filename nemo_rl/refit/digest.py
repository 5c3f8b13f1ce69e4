"""Position-sensitive digests of tensor pieces that add up: any partition of a tensor gives the same total.

The digest of a piece is `sum(bits[i, j, ...] * w0[i] * w1[j] * ... ) mod 2**64` over the piece's elements, where `bits`
are an element's bits as an integer and `w_axis[index]` is a pseudo-random odd number of the *global* index along that
axis. An odd weight maps every single-bit change to a change of the sum. Weights are random, so that swapped, shifted or
stale pieces agree with a chance of about 2**-63, or 2**-33 where they differ in nothing but sign bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_rl.refit.device import await_event
from nemo_rl.refit.digest_planes import Located, odd_weights
from nemo_rl.refit.region import Region

if TYPE_CHECKING:
    from nemo_rl.refit.digest_kernel import KernelBatch

_CHUNK_ELEMENTS = 1 << 18  # bounds the int64 scratch; larger ones are no faster
_LONGEST_S = 120.0  # that digests of a whole model may take; on GPUs they take milliseconds
HIGH_HALF = 0x2545F4914F6CDD1D
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=64)
def _weights(axis: int, length: int, device: str) -> torch.Tensor:
    """Weights of indices `0 .. length - 1` along `axis`."""
    return torch.from_numpy(odd_weights(axis, np.arange(length)).view(np.int64)).to(device)


def _axis_weights(axis: int, offset: int, size: int, device: torch.device) -> torch.Tensor:
    length = max(1024, 1 << (offset + size - 1).bit_length()) if offset + size else 1024
    return _weights(axis, length, str(device))[offset : offset + size]


def digest_view(view: torch.Tensor, region: Region) -> int:
    """Digest of `view`, which holds `region` of its tensor, as a signed 64-bit number. Waits for the device.

    Raises:
        ValueError: the view's shape is not the region's.
    """
    return int(digest_on_device(view, region, Scratch()).item())


class Scratch:
    """Reused int64 memory of digests, one piece a device; at most `_CHUNK_ELEMENTS` long."""

    def __init__(self) -> None:
        self._held: dict[torch.device, torch.Tensor] = {}

    def take(self, count: int, device: torch.device) -> torch.Tensor:
        held = self._held.get(device)
        if held is None or held.numel() < count:
            held = self._held[device] = torch.empty(count, dtype=torch.int64, device=device)
        return held[:count]


class Ledger:
    """Digests of numbered pieces, taken where the pieces lie; only `read` waits, once for each device.

    A ledger that is cleared keeps its memory: what is taken again and again makes one once.

    Attributes:
        taken: which numbers have a digest.
        on_the_way: to the host, all of them, since `fetch`.
    """

    def __init__(self, count: int) -> None:
        self.taken = np.zeros(count, bool)
        self._found: dict[torch.device, torch.Tensor] = {}
        self._hosts: dict[torch.device, tuple[torch.Tensor, torch.cuda.Event]] = {}  # pinned, and when it is filled
        self._clean, self.on_the_way = True, False
        self._scratch = Scratch()

    def clear(self) -> None:
        """Nothing is taken, behind what the current streams were given; who reads reads what is taken from now on."""
        if self._clean:
            return
        self.taken[:] = False
        self._clean, self.on_the_way = True, False
        for found in self._found.values():
            found.zero_()

    def take(self, number: int, view: torch.Tensor, region: Region) -> None:
        """Digest piece `number`. Raises ValueError where the view's shape is not the region's."""
        self.room(view.device)[number] = digest_on_device(view, region, self._scratch)
        self.taken[number] = True

    def take_all(self, numbers: slice | np.ndarray, batch: KernelBatch, device: torch.device) -> None:
        """Digest pieces `numbers`, those of `batch`, on the current stream of `device`; does not wait."""
        batch.launch(self.room(device))
        self.taken[numbers] = True

    def room(self, device: torch.device) -> torch.Tensor:
        """To take digests on `device`: int64, one a number, 0 where there is none."""
        self._clean, self.on_the_way = False, False
        if device not in self._found:
            self._found[device] = torch.zeros(len(self.taken), dtype=torch.int64, device=device)
        return self._found[device]

    def fetch(self) -> None:
        """Bring what was taken to the host, behind what the current streams were given; does not wait. Once is enough,
        until more is taken."""
        if self.on_the_way:
            return
        self.on_the_way = True
        for device, found in self._found.items():
            if found.is_cuda:
                if device not in self._hosts:
                    self._hosts[device] = torch.empty_like(found, device="cpu", pin_memory=True), torch.cuda.Event()
                host, filled = self._hosts[device]
                host.copy_(found, non_blocking=True)
                filled.record(torch.cuda.current_stream(device))

    @property
    def fetched(self) -> bool:
        """Whether `read` would not wait, after `fetch`."""
        return self.on_the_way and all(filled.query() for _, filled in self._hosts.values())

    def read(self, deadline_s: float = _LONGEST_S) -> np.ndarray:
        """int64, one a number; 0 where none was taken. Raises TimeoutError where a device takes longer."""
        end = time.monotonic() + deadline_s
        self.fetch()
        found: list[np.ndarray] = [digests.numpy() for digests in self._found.values() if not digests.is_cuda]
        for device, (host, filled) in self._hosts.items():
            if not filled.query():
                await_event(filled, f"the digest of {len(self.taken)} pieces on {device}", end)
            found.append(host.numpy())
        if len(found) == 1:
            return found[0].copy()
        total: np.ndarray = np.sum([np.zeros(len(self.taken), np.int64), *found], axis=0)
        return total


@dataclass(frozen=True, slots=True)
class Piece:
    """Piece `number` of a ledger: the box `region` of a tensor, inside view `row`, which holds `held` of it."""

    number: int
    row: int
    region: Region
    held: Region

    def of(self, view: torch.Tensor) -> torch.Tensor:
        return view[self.region.slices_in(self.held)]


class Pieces:
    """Fixed pieces of views that are digested again and again; all those of one GPU in one launch."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = tuple(pieces)
        self._numbers = _span(np.array([p.number for p in pieces], np.int64))
        self._rows = tuple(dict.fromkeys(p.row for p in pieces))
        self._batch: tuple[list[tuple[int, tuple[int, ...]]], KernelBatch] | None = None
        self._views: Mapping[int, torch.Tensor] | None = None  # what the batch was last found to fit

    def take(self, views: Mapping[int, torch.Tensor], ledger: Ledger) -> None:
        """Digest what `views` (row -> view) hold into `ledger`. Raises ValueError as `digest_view`."""
        if (batch := self.prepare(views)) is not None:
            ledger.take_all(self._numbers, batch, views[self._rows[0]].device)
            return
        for piece in self._pieces:
            ledger.take(piece.number, piece.of(views[piece.row]), piece.region)

    def all_taken(self, ledger: Ledger) -> bool:
        """Whether `ledger` has the digests of all pieces."""
        return bool(ledger.taken[self._numbers].all())

    def prepare(self, views: Mapping[int, torch.Tensor]) -> KernelBatch | None:
        """What digests pieces of `views` on a GPU, made again only where storage moved; None elsewhere."""
        if views is self._views and self._batch is not None:
            return self._batch[1]
        if not self._pieces or not all(views[row].is_cuda for row in self._rows):
            return None
        from nemo_rl.refit.digest_kernel import KernelBatch  # Triton comes with CUDA builds of torch only

        where = [(views[row].data_ptr(), views[row].stride()) for row in self._rows]
        if self._batch is None or self._batch[0] != where:
            self._batch = where, KernelBatch(views[self._rows[0]].device, self.located(views))
        self._views = views
        return self._batch[1]

    def located(self, views: Mapping[int, torch.Tensor]) -> list[Located]:
        """Where the pieces lie, by number of axes."""
        slot = {row: i for i, row in enumerate(self._rows)}
        address = np.array([views[row].data_ptr() for row in self._rows], np.int64)
        item = np.array([views[row].element_size() for row in self._rows], np.int64)
        found = []
        for axes in sorted({len(p.region.sizes) for p in self._pieces}):
            some = [p for p in self._pieces if len(p.region.sizes) == axes]
            shape, row = (len(some), axes), np.array([slot[p.row] for p in some], np.int64)
            offsets = np.array([p.region.offsets for p in some], np.int64).reshape(shape)
            inner = offsets - np.array([p.held.offsets for p in some], np.int64).reshape(shape)
            strides = np.array([views[p.row].stride() for p in some], np.int64).reshape(shape)
            start = address[row] + (inner * strides).sum(axis=1) * item[row]
            sizes = np.array([p.region.sizes for p in some], np.int64).reshape(shape)
            number = np.array([p.number for p in some], np.int64)
            found.append(Located(number, start, item[row], offsets, sizes, strides))
        return found


def _span(numbers: np.ndarray) -> slice | np.ndarray:
    """`numbers` as an index that is cheap where they are neighbours in order."""
    if len(numbers) and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers


def digest_on_device(view: torch.Tensor, region: Region, scratch: Scratch) -> torch.Tensor:
    """Digest of `view` (strided, on any device) as an int64 scalar on its device, without waiting for the device.

    Raises:
        ValueError: the view's shape is not the region's.
    """
    if tuple(view.shape) != region.sizes:
        raise ValueError(f"view of shape {tuple(view.shape)} does not hold region {region}")
    if region.volume == 0:
        return torch.zeros((), dtype=torch.int64, device=view.device)
    if view.element_size() == 16:  # complex128: real and imaginary parts along one more axis
        parts = Region((*region.offsets, 0), (*region.sizes, 2))
        return digest_on_device(torch.view_as_real(view.detach()), parts, scratch)
    bits = view.detach().view(_BITS[view.element_size()])
    weights = [_axis_weights(a, region.offsets[a], region.sizes[a], view.device) for a in range(bits.ndim)]
    if view.element_size() < 8:
        return _sum(bits, weights, scratch)
    # Times an odd weight, the top bit of 64 is the same for every position; halves of 32 bits keep it apart.
    low, high = _sum(bits, weights, scratch, mask=True), _sum(bits, weights, scratch, shift=32)
    return low + high * HIGH_HALF


def _sum(
    bits: torch.Tensor, weights: list[torch.Tensor], scratch: Scratch, *, mask: bool = False, shift: int = 0
) -> torch.Tensor:
    """Weighted sum of `bits` in runs of at most `_CHUNK_ELEMENTS`, whatever the shape."""
    if bits.ndim == 0:
        return _half(bits.to(torch.int64, copy=True), mask, shift)
    inner = bits.numel() // bits.shape[0]
    if inner > _CHUNK_ELEMENTS:
        rows = [_sum(row, weights[1:], scratch, mask=mask, shift=shift) for row in bits]
        return (torch.stack(rows) * weights[0]).sum()
    step = min(max(1, _CHUNK_ELEMENTS // inner), bits.shape[0])
    total = torch.zeros(inner, dtype=torch.int64, device=bits.device)
    for start in range(0, bits.shape[0], step):
        part = bits[start : start + step]
        wide = scratch.take(part.numel(), bits.device)
        wide.view(part.shape).copy_(part)
        total += _contract(weights[0][start : start + step], _half(wide, mask, shift).view(len(part), inner))
    total = total.view(bits.shape[1:])
    for weight in reversed(weights[1:]):
        total = (total * weight).sum(-1)
    return total.view(())


def _contract(weights: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """`weights @ wide` modulo 2**64; `wide` may be overwritten."""
    if wide.device.type == "cpu" and wide.shape[1] > 1:
        return torch.mv(wide.t(), weights)  # one pass; other devices have no integer product of matrices
    return wide.mul_(weights[:, None]).sum(0)


def _half(wide: torch.Tensor, mask: bool, shift: int) -> torch.Tensor:
    """The 32-bit half of every number, in place."""
    if shift:
        wide >>= shift
    if mask:
        wide &= 0xFFFFFFFF
    return wide
