"""Shared-memory files of an engine's processes, which a killed engine leaves behind."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path


def mapped_shared_memory() -> set[str]:
    """Files under /dev/shm that this process or a child of it has mapped."""
    found = set()
    for pid in _family():
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:  # not Linux, or the child ended
            continue
        paths = (line.split(maxsplit=5)[-1] for line in lines if " /dev/shm/" in line)
        found |= {p for p in paths if not p.endswith("(deleted)")}
    return found


def _family() -> list[int]:
    return [os.getpid(), *(p.pid for p in multiprocessing.active_children() if p.pid is not None)]


def made_since(path: str, started: float) -> bool:
    try:
        return Path(path).stat().st_ctime >= started - 1.0
    except OSError:
        return False
