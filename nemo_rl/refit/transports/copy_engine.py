"""Strided boxes by the GPU's copy engines, few and large, or by one kernel where copies would be many or short."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_rl.refit.strided import MAX_PITCH, Axis, Form, Jobs, merged

_COPY_S = 3.5e-6  # of a copy beside its bytes
_ENGINE, _KERNEL = 395e9, 373e9  # bytes a second between GPUs: long copies by engine, any by kernel
_SHORT = 1 << 16  # bytes of a row below which engines lose speed
_DEVICE_TO_DEVICE = 3


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
    return library


class CopyEngine:
    """Starts copies between addresses that `device` can reach."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._library = _cudart()

    def copy(self, dst: int, src: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Contiguous bytes. Raises OSError."""
        with torch.cuda.device(self._device):
            self._check(self._library.cudaMemcpyAsync(dst, src, num_bytes, _DEVICE_TO_DEVICE, stream.cuda_stream))

    def prepare(
        self, jobs: Jobs, room: np.ndarray, num_streams: int, by_kernel: bool | None = None
    ) -> list[Callable[[torch.cuda.Stream], None]]:
        """One starter for each stream; together they move `jobs`.

        Args:
            room: as `merged` takes it: the allocations of both ends of each copy, as one number.
            by_kernel: whether a kernel moves the bytes or engines do; None for what is faster, copy by copy.
        """
        blocks: list[Block] = []
        numbers: list[int] = []
        jobs = merged(jobs, room)
        for i, form in enumerate(jobs.forms):
            own = list(_blocks(int(jobs.src[i]), int(jobs.dst[i]), form))
            if _kernel_is_faster(form, len(own)) if by_kernel is None else by_kernel:
                numbers.append(i)
            else:
                blocks += own
        parts = [self._starter(blocks[first::num_streams]) for first in range(num_streams)]
        if numbers:
            parts[-1] = self._with_kernel(jobs, numbers, parts[-1])
        return parts

    def _with_kernel(
        self, jobs: Jobs, numbers: list[int], engine: Callable[[torch.cuda.Stream], None]
    ) -> Callable[[torch.cuda.Stream], None]:
        from nemo_rl.refit.transports.strided_kernel import StridedBatch  # Triton comes with CUDA builds of torch

        batch = StridedBatch(jobs, numbers, self._device)

        def both(stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream):
                batch.launch()
            engine(stream)

        return both

    def _starter(self, blocks: list[Block]) -> Callable[[torch.cuda.Stream], None]:
        calls = [self._call(block) for block in blocks]

        def start(stream: torch.cuda.Stream) -> None:
            handle = stream.cuda_stream
            with torch.cuda.device(self._device):
                for function, arguments in calls:
                    if error := function(*arguments, handle):
                        self._check(error)

        return start

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
            raise OSError(error, f"a copy of the copy engine failed: {name}")


def _kernel_is_faster(form: Form, num_blocks: int) -> bool:
    if form.axes and form.run < _SHORT:
        return True
    return num_blocks * _COPY_S + form.num_bytes / _ENGINE > form.num_bytes / _KERNEL


def _blocks(src: int, dst: int, form: Form) -> Iterator[Block]:
    """The copies of the engine that make up a box: rows along its longest axis, planes along one that fits over it."""
    flat = Axis(1, form.run, form.run)
    rows = [a for a in form.axes if form.run <= min(a.src, a.dst) and max(a.src, a.dst) <= MAX_PITCH]
    alone = [(row, Axis(1, row.size * row.src, row.size * row.dst)) for row in [*rows, flat]]
    pairs = [(row, plane) for row in rows for plane in form.axes if plane is not row and _over(row, plane)]
    row, plane = max(alone + pairs, key=lambda pair: pair[0].size * pair[1].size)
    rest = [a for a in form.axes if a is not row and a is not plane]
    offsets = np.zeros((1, 2), np.int64)
    for a in rest:
        steps = np.arange(a.size, dtype=np.int64)[:, None] * np.array([a.src, a.dst], np.int64)
        offsets = (offsets[:, None] + steps).reshape(-1, 2)
    dst_height, src_height = plane.dst // row.dst, plane.src // row.src
    for s, d in offsets.tolist():
        yield Block(dst + d, row.dst, dst_height, src + s, row.src, src_height, form.run, row.size, plane.size)


def _over(row: Axis, plane: Axis) -> bool:
    """Whether planes along `plane` start whole rows apart, behind each other, at both ends."""
    return all(
        outer % inner == 0 and outer >= inner * row.size
        for outer, inner in ((plane.src, row.src), (plane.dst, row.dst))
    )
