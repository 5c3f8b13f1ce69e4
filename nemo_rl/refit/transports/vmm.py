"""GPU memory that the driver maps chunk by chunk (expandable segments): shown to other processes, and mapped here.

Such memory has no CUDA IPC handle. Each of its chunks has a file descriptor where it was created to have one, as torch
does for expandable segments unless TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0; pools that engines make for sleeping do not.
Chunks that follow each other are one run, mapped in one piece.
"""

from __future__ import annotations

import json
from typing import Any

from cuda.bindings import driver

from nemo_rl.refit.transports.chunks import Run
from nemo_rl.refit.transports.descriptors import DescriptorServer, fetch

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_SERVER: list[DescriptorServer] = []
_SHOWN: set[int] = set()


def ask(answer: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """Results of a CUDA call. Raises OSError where it failed."""
    error, *values = answer
    if int(error) != 0:
        raise OSError(f"{what}: {error.name}")
    return tuple(values)


def chunks_of(first: int, end: int) -> dict[int, int]:
    """Address -> bytes of the chunks that hold `first` up to `end`. Raises OSError where nothing is mapped."""
    found: dict[int, int] = {}
    while first < end:
        base, size = map(int, ask(driver.cuMemGetAddressRange(first), "finding an allocation"))
        found[base] = size
        first = base + size
    return found


def show(run: Run) -> str:
    """What another process maps `run` by. Raises OSError where its memory was not created to be shown."""
    handle = ask(driver.cuMemRetainAllocationHandle(run.address), "finding a handle")[0]
    try:
        properties = ask(driver.cuMemGetAllocationPropertiesFromHandle(handle), "reading a handle")[0]
    finally:
        driver.cuMemRelease(handle)
    if not int(properties.requestedHandleTypes) & int(_FD):
        raise OSError(
            f"memory at {run.address:#x} was not created to be shown to other processes: set "
            "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1, or keep it out of expandable segments and sleep-mode pools"
        )
    if not _SERVER:
        _SERVER.append(DescriptorServer(_export))
    _SHOWN.update(base for base, _ in run.chunks)
    return json.dumps([_SERVER[0].name, run.chunks])


def _export(address: int) -> int:
    """A descriptor of the chunk at `address`, which must have been shown."""
    if address not in _SHOWN:
        raise OSError(f"memory at {address:#x} was not shown")
    handle = ask(driver.cuMemRetainAllocationHandle(address), "finding a handle")[0]
    try:
        return int(ask(driver.cuMemExportToShareableHandle(handle, _FD, 0), "exporting memory")[0])
    finally:
        driver.cuMemRelease(handle)


class Mapped:
    """A run of another process, mapped for device `index` of this one; a context must be current.

    Attributes:
        address: here.
    """

    def __init__(self, window: str, index: int) -> None:
        name, chunks = json.loads(window)
        self._sizes: list[int] = [size for _, size in chunks]
        self._mapped = 0
        self._num_bytes = sum(self._sizes)
        self.address = int(ask(driver.cuMemAddressReserve(self._num_bytes, 0, 0, 0), "reserving addresses")[0])
        self._end = self.address
        try:
            fetch(name, [base for base, _ in chunks], self._take)
            ask(driver.cuMemSetAccess(self.address, self._num_bytes, [_access(index)], 1), "permitting access")
        except OSError:
            self.close()
            raise

    def _take(self, descriptor: int) -> None:
        """Map the next chunk."""
        handle = ask(driver.cuMemImportFromShareableHandle(descriptor, _FD), "importing memory")[0]
        try:
            size = self._sizes[self._mapped]
            ask(driver.cuMemMap(self._end, size, 0, handle, 0), "mapping memory")
            self._mapped, self._end = self._mapped + 1, self._end + size
        finally:
            driver.cuMemRelease(handle)  # the mapping keeps the memory

    def close(self) -> None:
        """Unmap; idempotent."""
        at = self.address
        for size in self._sizes[: self._mapped]:
            driver.cuMemUnmap(at, size)
            at += size
        if self._num_bytes:
            driver.cuMemAddressFree(self.address, self._num_bytes)
        self._mapped = self._num_bytes = 0


def _access(index: int) -> Any:
    access = driver.CUmemAccessDesc()
    access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = index
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access
