"""A file in memory that processes of one host share, and whether those processes live."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO


def made(num_bytes: int) -> tuple[int, str]:
    """A file in memory of so many bytes, which are 0; or -1 and why there is none."""
    try:
        file = os.memfd_create("refit-board")
    except OSError as error:
        return -1, f"no board can be made: {error}"
    try:
        os.ftruncate(file, num_bytes)
    except OSError as error:
        os.close(file)
        return -1, f"no board of {num_bytes} bytes can be made: {error}"
    return file, ""


def opened(
    processes: Sequence[tuple[int, int | None]], pid: int, number: int, inode: int
) -> tuple[BinaryIO | None, str]:
    """File `inode` that process `pid` has open under `number`, or why ranks cannot share it; that it could not make one
    is for that process to say."""
    if number < 0:
        return None, ""
    if platform.machine() != "x86_64":
        return None, f"on {platform.machine()}, ranks may see each other's counters before what was done"
    strange = next((p for p, since in set(processes) if since is None or born(p) != since), None)
    if strange is not None:
        return None, f"process {strange} is not seen or another one here: no common process ids"
    try:
        file = os.fdopen(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0)
    except OSError as error:
        return None, f"the board of process {pid} cannot be opened: {error}"
    if os.fstat(file.fileno()).st_ino != inode:
        file.close()
        return None, f"process {pid} has another file here than it says: no common process ids"
    return file, ""


def born(pid: int) -> int | None:
    """When the process started, in ticks since boot; None where it is gone, or dead and its parent has not waited."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
