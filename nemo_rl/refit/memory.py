"""Peak of this process's resident memory over a span, from the kernel's own high-water mark (Linux)."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakRss:
    """Resets the high-water mark when made; `extra_bytes` is how far it rose above the memory held then.

    Where the kernel does not offer the mark, `extra_bytes` is None: unknown, never 0.
    """

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")
            self._start = _field("VmRSS")
        except OSError:
            self._start = None

    @property
    def extra_bytes(self) -> int | None:
        if self._start is None:
            return None
        peak = _field("VmHWM")
        return None if peak is None else max(0, peak - self._start)


def _field(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
