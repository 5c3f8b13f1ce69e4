"""GPU memory of other processes of the host, mapped through CUDA IPC or chunk by chunk, and read by copy engines.

Handles are those of the driver's allocations behind the caching allocator's tensors, so that processes which see one
GPU each can use them. Memory that the driver maps by other means (expandable segments) has descriptors instead
(`vmm.py`), or none, and a process that keeps its tensors in such memory is refused.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from cuda.bindings import driver, runtime

from nemo_rl.refit.device import finish
from nemo_rl.refit.strided import Jobs
from nemo_rl.refit.transports import vmm
from nemo_rl.refit.transports.chunks import place, runs_of
from nemo_rl.refit.transports.copy_engine import CopyEngine, Parts, Start

log = logging.getLogger(__name__)

_BEACONS: dict[int, tuple[torch.Tensor, bytes]] = {}
_REST_S, _PAUSE_S = 5.0, 1e-4  # longest wait for copies that are under way at the end, which take milliseconds


class CudaMemory:
    """Reads memory of other GPUs, or of other processes on this one, into tensors of `device`."""

    step_bytes = 64 << 20
    puts = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes: _Lanes | None = None
        self._open: dict[str, int | vmm.Mapped] = {}
        self._engine = CopyEngine(device)
        self.staging_bytes = 0
        self.num_copies = self.num_launches = 0

    def beacon(self) -> str:
        """Handle and place of a tensor that holds a secret, and the secret."""
        index = self._device.index or 0
        if index not in _BEACONS:
            secret = secrets.token_bytes(16)
            tensor = torch.frombuffer(bytearray(secret), dtype=torch.uint8).to(self._device)
            _BEACONS[index] = tensor, secret
        tensor, secret = _BEACONS[index]
        try:
            (window,), where = self.show([tensor])
        except OSError as error:
            return json.dumps({"error": str(error)})
        return json.dumps({"window": window, "offset": int(where[0, 1]), "secret": secret.hex()})

    def probe(self, beacon: str) -> str | None:
        """Why memory of the process that lit `beacon` cannot be read; None where it can."""
        said = json.loads(beacon)
        if "error" in said:
            return f"it cannot show its memory: {said['error']}"
        try:
            pointer = self._map(said["window"])
            found = torch.zeros(16, dtype=torch.uint8, device=self._device)
            self._engine.copy(found.data_ptr(), pointer + said["offset"], 16, torch.cuda.current_stream(self._device))
            got = bytes(found.cpu().tolist())
        except OSError as error:
            return f"its memory cannot be mapped: {error}"
        finally:
            self.close()
        return None if got.hex() == said["secret"] else "its memory reads differently here"

    def show(self, views: Sequence[torch.Tensor]) -> tuple[list[str], np.ndarray]:
        """One window for each allocation of the driver. Raises OSError where memory has no handle."""
        handles: dict[int, str | None] = {}
        chunks: dict[int, int] = {}
        with torch.cuda.device(self._device):
            for view in views:
                base = _base(view.data_ptr())
                if base not in handles:
                    handles[base] = _handle(base)
                if handles[base] is None:
                    chunks |= vmm.chunks_of(view.data_ptr(), _end(view))
            runs = runs_of(chunks)
            whole = {base: handle for base, handle in handles.items() if handle is not None}
            windows = [*whole.values(), *map(vmm.show, runs)]
        numbers = {base: number for number, base in enumerate(whole)}
        where = np.zeros((len(views), 2), np.int64)
        for i, view in enumerate(views):
            base = _base(view.data_ptr())
            if base in numbers:
                where[i] = numbers[base], view.data_ptr() - base
            else:
                number, offset = place(view.data_ptr(), runs)
                where[i] = len(whole) + number, offset
        return windows, where

    def open(self, windows: Sequence[str]) -> tuple[int, np.ndarray]:
        """Map `windows`. Raises OSError where one cannot be."""
        return 0, np.array([self._map(window) for window in windows], np.int64)

    def keep(self, windows: Collection[str]) -> None:
        """Unmap all others."""
        with torch.cuda.device(self._device):
            for window in self._open.keys() - set(windows):
                opened = self._open.pop(window)
                if isinstance(opened, vmm.Mapped):
                    opened.close()
                else:
                    runtime.cudaIpcCloseMemHandle(opened)

    def own(self) -> int:
        """Addresses alone say where to read."""
        return 0

    def prepare(self, peer: int, jobs: Jobs, *, put: bool, ordered: bool) -> Callable[[], None]:
        """What starts `jobs`: beside the current stream, or, `ordered`, after all it was given and before what it is
        given next. `mark` says when they are done."""
        parts = self._engine.prepare(jobs, self._rooms(jobs))

        def start() -> None:
            self._lanes = self._lanes or _Lanes(self._device)
            self._lanes.start(parts, ordered)
            self.num_copies += parts.num_copies
            self.num_launches += parts.num_launches

        return start

    def _rooms(self, jobs: Jobs) -> np.ndarray:
        """One number for each pair of allocations that a copy reads and writes."""
        with torch.cuda.device(self._device):
            pairs = [(_base(src), _base(dst)) for src, dst in zip(jobs.src.tolist(), jobs.dst.tolist(), strict=True)]
        numbers: dict[tuple[int, int], int] = {}
        return np.array([numbers.setdefault(pair, len(numbers)) for pair in pairs], np.int64)

    def mark(self) -> Callable[[], bool]:
        """Whether all copies that were started so far are done. What that returns raises OSError."""
        events = [] if self._lanes is None else self._lanes.mark()

        def done() -> bool:
            try:
                return all(event.query() for event in events)
            except RuntimeError as error:
                raise OSError(str(error)) from error

        return done

    def wait(self, end: float) -> None:
        """Until the current stream is done. Raises TimeoutError, OSError."""
        try:
            finish(self._device, end)
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Unmap all windows, behind copies that are under way, which would fail otherwise and the GPU with them.

        Idempotent.
        """
        done, end = self.mark(), time.monotonic() + _REST_S
        try:
            while not done():
                if time.monotonic() > end:
                    log.error("copies were not done within %g s; what they use stays mapped", _REST_S)
                    return
                time.sleep(_PAUSE_S)
        except OSError as error:
            log.warning("copies that were under way failed: %s", error)
        self.keep(())

    def _map(self, window: str) -> int:
        if window not in self._open:
            with torch.cuda.device(self._device):
                self._open[window] = self._opened(window)
        opened = self._open[window]
        return int(opened.address) if isinstance(opened, vmm.Mapped) else opened

    def _opened(self, window: str) -> int | vmm.Mapped:
        if window.startswith("["):
            return vmm.Mapped(window, self._device.index or 0)
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = bytes.fromhex(window)
        flag = runtime.cudaIpcMemLazyEnablePeerAccess
        return int(vmm.ask(runtime.cudaIpcOpenMemHandle(handle, flag), "mapping memory")[0])


class _Lanes:
    """Two streams of copies, one for engines and one for kernels, which batches go through one behind the other.

    A kernel never runs ahead of the engines' batch, and engines are at most one batch ahead of kernels: neither waits
    while the other ends a batch, and no batch is far from its place in the order that pairs ranks. Both come before
    what else the device computes, such as digests of what landed. A batch costs its stream nothing that it has no part
    in: calls to the runtime are what small batches wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._engines, self._kernels = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._behind: deque[torch.cuda.Event | None] = deque([None, None], maxlen=2)  # kernels of the last two batches
        self._ends: dict[torch.cuda.Stream, torch.cuda.Event] = {}  # of what each was given last

    def start(self, parts: Parts, ordered: bool) -> None:
        """See `CudaMemory.prepare`."""
        if ordered:
            for stream in (self._engines, self._kernels):
                stream.wait_stream(torch.cuda.current_stream(self._device))
        if parts.kernel is not None and self._engines in self._ends:
            self._kernels.wait_event(self._ends[self._engines])  # as they are before this batch
        if parts.engines is not None:
            if (kernel := self._behind[0]) is not None:
                self._engines.wait_event(kernel)
            self._begin(self._engines, parts.engines)
        if parts.kernel is not None:
            self._begin(self._kernels, parts.kernel)
        self._behind.append(None if parts.kernel is None else self._ends[self._kernels])
        if ordered:
            for event in self._ends.values():
                torch.cuda.current_stream(self._device).wait_event(event)

    def _begin(self, stream: torch.cuda.Stream, start: Start) -> None:
        start(stream)
        self._ends[stream] = stream.record_event()

    def mark(self) -> list[torch.cuda.Event]:
        """Events that come when all that was started so far is done."""
        return list(self._ends.values())


def _base(address: int) -> int:
    """First byte of the driver's allocation, or chunk, that holds `address`. Raises OSError where none does."""
    return int(vmm.ask(driver.cuMemGetAddressRange(address), "finding an allocation")[0])


def _handle(base: int) -> str | None:
    """The CUDA IPC handle of an allocation; None where the driver has none for it."""
    error, handle = runtime.cudaIpcGetMemHandle(base)
    if int(error) != 0:
        runtime.cudaGetLastError()
        return None
    text: str = bytes(handle.reserved).hex()
    return text


def _end(view: torch.Tensor) -> int:
    """Address behind the last byte of `view`."""
    steps = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    end: int = view.data_ptr() + (steps + 1) * view.element_size() if view.numel() else view.data_ptr() + 1
    return end
