"""Strided boxes by the GPU's copy engines: rows of bytes without kernels; short rows by one kernel for all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nemo_rl.refit.strided import Axis, Form, Jobs

SHORT = 128  # bytes of a row below which engines are slower than a kernel
_DEVICE_TO_DEVICE = 3
_MAX_PITCH = (1 << 31) - 1

Rows = tuple[int, int, int, int, int, int]
"""dst, dst pitch, src, src pitch, width, height: a 2-D copy."""


def _cudart() -> ctypes.CDLL:
    """The runtime that torch has loaded."""
    major = str(torch.version.cuda).split(".")[0]
    library = ctypes.CDLL(f"libcudart.so.{major}")
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.cudaMemcpyAsync.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
    library.cudaMemcpy2DAsync.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
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

    def prepare(self, jobs: Jobs, num_streams: int, short: int = SHORT) -> list[Callable[[torch.cuda.Stream], None]]:
        """One starter for each stream; together they move `jobs`, rows of less than `short` bytes by kernel."""
        rows: list[Rows] = []
        by_kernel: list[int] = []
        for form, numbers in jobs.grouped().items():
            if form.run < short and form.axes:
                by_kernel += numbers.tolist()
            else:
                for i in numbers.tolist():
                    rows += _rows(int(jobs.src[i]), int(jobs.dst[i]), form)
        parts = [self._starter(rows[first::num_streams]) for first in range(num_streams)]
        if by_kernel:
            from nemo_rl.refit.transports.strided_kernel import StridedBatch  # Triton comes with CUDA builds of torch

            batch = StridedBatch(jobs, by_kernel, self._device)
            engine = parts[-1]

            def both(stream: torch.cuda.Stream) -> None:
                with torch.cuda.stream(stream):
                    batch.launch()
                engine(stream)

            parts[-1] = both
        return parts

    def _starter(self, rows: list[Rows]) -> Callable[[torch.cuda.Stream], None]:
        flat, two_d = self._library.cudaMemcpyAsync, self._library.cudaMemcpy2DAsync

        def start(stream: torch.cuda.Stream) -> None:
            handle = stream.cuda_stream
            with torch.cuda.device(self._device):
                for dst, dst_pitch, src, src_pitch, width, height in rows:
                    if height == 1:
                        error = flat(dst, src, width, _DEVICE_TO_DEVICE, handle)
                    else:
                        error = two_d(dst, dst_pitch, src, src_pitch, width, height, _DEVICE_TO_DEVICE, handle)
                    if error:
                        self._check(error)

        return start

    def _check(self, error: int) -> None:
        if error:
            name = self._library.cudaGetErrorName(error).decode()
            self._library.cudaGetLastError()
            raise OSError(error, f"a copy of the copy engine failed: {name}")


def _rows(src: int, dst: int, form: Form) -> Iterator[Rows]:
    """The 2-D copies that make up a box: one where it has at most one axis of runs, else one for each outer index."""
    if not form.axes:
        yield dst, form.run, src, form.run, form.run, 1
        return
    axis = max(form.axes, key=lambda a: a.size)
    outer = [a for a in form.axes if a is not axis]
    pitched = form.run <= min(axis.src, axis.dst) and max(axis.src, axis.dst) <= _MAX_PITCH
    if not pitched:
        outer, axis = [*outer, axis], Axis(1, form.run, form.run)
    offsets = np.zeros((1, 2), np.int64)
    for a in outer:
        steps = np.arange(a.size, dtype=np.int64)[:, None] * np.array([a.src, a.dst], np.int64)
        offsets = (offsets[:, None] + steps).reshape(-1, 2)
    for src_offset, dst_offset in offsets.tolist():
        yield dst + dst_offset, axis.dst, src + src_offset, axis.src, form.run, axis.size
