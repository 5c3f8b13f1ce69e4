"""Strided boxes by the GPU's copy engines, few or long, and by one kernel where copies would be many and short.

What moves a copy fastest was measured between two H200s over NVLink, with 396 GB/s for one long contiguous copy:

- contiguous pieces of 1.5 MB: 240 GB/s in calls of their own (more streams or a CUDA graph change nothing), 387 in
  batched calls of 64, 357 in batched calls of 1000;
- 64 x 2 runs of 1.5 MB in one three-dimensional copy: 392; 64 x 2048 rows of 768 bytes: 388 written to the peer, 364
  read from it; batched calls of such copies are no faster than calls of their own;
- any box by kernel: 371 written, 353 to 374 read; kernel and engines at once reach what engines alone reach.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from nemo_rl.refit.strided import MAX_PITCH, Axis, Form, Jobs, merged, offsets_of

_ENGINE, _KERNEL = 395e9, 371e9  # bytes a second between GPUs
_CALL_S = 3.5e-6  # of a copy in a call of its own, beside its bytes
_PIECE_S, _LEAST_PIECE_S = 0.1e-6, 0.5e-6  # of a piece in a batched call, beside its bytes; and the least in all
_BATCH = 64  # pieces of a call; the first bytes move while later calls are made
_NARROW = 768  # bytes of a row below which engines lose speed
_PROGRAMS = 64
"""Of a kernel beside engines that move more than it does: the rest of the device is left to digests."""
_DEVICE_TO_DEVICE = 3
_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream

Start = Callable[[torch.cuda.Stream], None]
Way = Literal["calls", "pieces", "kernel"]
"""How a box is copied: in calls of its own, as contiguous pieces in batched calls, or by kernel."""


class _Position(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("x", "y", "z")]


class _Pitched(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), *((name, ctypes.c_size_t) for name in ("pitch", "width", "height"))]


class _Copy3D(ctypes.Structure):
    """cudaMemcpy3DParms."""

    _fields_ = [
        ("src_array", ctypes.c_void_p),
        ("src_at", _Position),
        ("src", _Pitched),
        ("dst_array", ctypes.c_void_p),
        ("dst_at", _Position),
        ("dst", _Pitched),
        ("extent", _Position),
        ("kind", ctypes.c_int),
    ]


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes; the places of memory that moves about are not of use here."""

    _fields_ = [("order", ctypes.c_int), ("places", ctypes.c_int * 4), ("flags", ctypes.c_uint)]


class Block(NamedTuple):
    """A copy of the engine: `depth` planes of `height` rows of `width` bytes.

    Planes start as many row pitches apart as `dst_height` and `src_height` say.
    """

    dst: int
    dst_pitch: int
    dst_height: int
    src: int
    src_pitch: int
    src_height: int
    width: int
    height: int
    depth: int


def _cudart() -> ctypes.CDLL:
    """The runtime that torch has loaded."""
    major = str(torch.version.cuda).split(".")[0]
    library = ctypes.CDLL(f"libcudart.so.{major}")
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.cudaMemcpyAsync.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
    library.cudaMemcpy2DAsync.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    library.cudaMemcpy3DAsync.argtypes = [ctypes.POINTER(_Copy3D), pointer]
    library.cudaGetErrorName.restype = ctypes.c_char_p
    if int(major) >= 13:
        library.cudaMemcpyBatchAsync.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
    return library


@dataclass(frozen=True, slots=True)
class Parts:
    """Two starters that move jobs together, on streams of their own where there are both.

    Attributes:
        engines, kernel: start copies; None where there are none.
        num_copies, num_launches: of engines and of kernels.
    """

    engines: Start | None
    kernel: Start | None
    num_copies: int
    num_launches: int


class CopyEngine:
    """Starts copies between addresses that `device` can reach."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library = _cudart()
        self._batched = int(str(torch.version.cuda).split(".")[0]) >= 13

    def copy(self, dst: int, src: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Contiguous bytes. Raises OSError."""
        with torch.cuda.device(self._device):
            self._check(self._library.cudaMemcpyAsync(dst, src, num_bytes, _DEVICE_TO_DEVICE, stream.cuda_stream))

    def prepare(self, jobs: Jobs, room: np.ndarray, way: Way | None = None) -> Parts:
        """What moves `jobs`, as often as wanted.

        Args:
            room: as `merged` takes it: the allocations of both ends of each copy, as one number.
            way: of all copies; None for the fastest, copy by copy.
        """
        blocks: list[Block] = []
        pieces: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
        numbers: list[int] = []
        jobs = merged(jobs, room)
        for i, form in enumerate(jobs.forms):
            src, dst = int(jobs.src[i]), int(jobs.dst[i])
            own = list(_blocks(src, dst, form))
            chosen = way or _fastest(form, len(own), self._batched)
            if chosen == "kernel":
                numbers.append(i)
            elif chosen == "pieces":
                pieces.append(_pieces(src, dst, form))
            else:
                blocks += own
        return self._parts(jobs, blocks, np.concatenate(pieces), numbers)

    def _parts(self, jobs: Jobs, blocks: Sequence[Block], pieces: np.ndarray, numbers: Sequence[int]) -> Parts:
        batch, engines = None, None
        if len(blocks) or len(pieces):
            engines = self._starter([self._call(b) for b in blocks] + self._batches(pieces))
        if numbers:
            from nemo_rl.refit.transports.strided_kernel import StridedBatch  # Triton comes with CUDA builds of torch

            mostly = 2 * sum(jobs.forms[i].num_bytes for i in numbers) > sum(form.num_bytes for form in jobs.forms)
            batch = StridedBatch(jobs, numbers, self._device, None if mostly else _PROGRAMS)
        launch = None if batch is None else batch.launch
        return Parts(engines, launch, len(blocks) + len(pieces), 0 if batch is None else batch.num_launches)

    def _starter(self, calls: Sequence[tuple[Callable[..., int], tuple[Any, ...]]]) -> Start:
        def start(stream: torch.cuda.Stream) -> None:
            handle = stream.cuda_stream
            with torch.cuda.device(self._device):
                for function, arguments in calls:
                    if error := function(*arguments, handle):
                        self._check(error)

        return start

    def _batches(self, pieces: np.ndarray) -> list[tuple[Callable[..., int], tuple[Any, ...]]]:
        """Calls of at most `_BATCH` pieces, (n, 3): destinations, sources, sizes."""
        return [self._batch(pieces[i : i + _BATCH]) for i in range(0, len(pieces), _BATCH)]

    def _batch(self, pieces: np.ndarray) -> tuple[Callable[..., int], tuple[Any, ...]]:
        count = len(pieces)
        columns = [(ctypes.c_size_t * count)(*column) for column in pieces.T.tolist()]
        same, first = _Attributes(_STREAM_ORDER), ctypes.c_size_t(0)
        return self._library.cudaMemcpyBatchAsync, (*columns, count, ctypes.byref(same), ctypes.byref(first), 1)

    def _call(self, block: Block) -> tuple[Callable[..., int], tuple[Any, ...]]:
        """A function of the runtime, and its arguments before the stream."""
        dst, dst_pitch, dst_height, src, src_pitch, src_height, width, height, depth = block
        if depth > 1:
            there, here = _Pitched(src, src_pitch, width, src_height), _Pitched(dst, dst_pitch, width, dst_height)
            extent = _Position(width, height, depth)
            copy = _Copy3D(None, _Position(), there, None, _Position(), here, extent, _DEVICE_TO_DEVICE)
            return self._library.cudaMemcpy3DAsync, (copy,)
        if height > 1:
            planar = dst, dst_pitch, src, src_pitch, width, height, _DEVICE_TO_DEVICE
            return self._library.cudaMemcpy2DAsync, planar
        return self._library.cudaMemcpyAsync, (dst, src, width, _DEVICE_TO_DEVICE)

    def _check(self, error: int) -> None:
        if error:
            name = self._library.cudaGetErrorName(error).decode()
            self._library.cudaGetLastError()
            raise OSError(f"a copy of the copy engine failed: {name}")


def _fastest(form: Form, num_blocks: int, batched: bool) -> Way:
    """By what each way takes for the box alone."""
    seconds: dict[Way, float] = {"kernel": form.num_bytes / _KERNEL}
    if form.run >= _NARROW or not form.axes:
        seconds["calls"] = num_blocks * _CALL_S + form.num_bytes / _ENGINE
    if batched:
        seconds["pieces"] = form.num_runs * max(_PIECE_S + form.run / _ENGINE, _LEAST_PIECE_S)
    return min(seconds.items(), key=operator.itemgetter(1))[0]


def _pieces(src: int, dst: int, form: Form) -> np.ndarray:
    """int64 (n, 3): destination, source and size of every run."""
    offsets = offsets_of(form.axes)
    return np.column_stack([dst + offsets[:, 1], src + offsets[:, 0], np.full(len(offsets), form.run, np.int64)])


def _blocks(src: int, dst: int, form: Form) -> Iterator[Block]:
    """The copies of the engine that make up a box: rows along its longest axis, planes along one that fits over it."""
    flat = Axis(1, form.run, form.run)
    rows = [a for a in form.axes if form.run <= min(a.src, a.dst) and max(a.src, a.dst) <= MAX_PITCH]
    alone = [(row, Axis(1, row.size * row.src, row.size * row.dst)) for row in [*rows, flat]]
    pairs = [(row, plane) for row in rows for plane in form.axes if plane is not row and _over(row, plane)]
    row, plane = max(alone + pairs, key=lambda pair: pair[0].size * pair[1].size)
    offsets = offsets_of(a for a in form.axes if a is not row and a is not plane)
    dst_height, src_height = plane.dst // row.dst, plane.src // row.src
    for s, d in offsets.tolist():
        yield Block(dst + d, row.dst, dst_height, src + s, row.src, src_height, form.run, row.size, plane.size)


def _over(row: Axis, plane: Axis) -> bool:
    """Whether planes along `plane` start whole rows apart, behind each other, at both ends."""
    return all(
        outer % inner == 0 and outer >= inner * row.size
        for outer, inner in ((plane.src, row.src), (plane.dst, row.dst))
    )
