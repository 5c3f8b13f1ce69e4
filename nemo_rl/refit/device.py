"""Waiting for a device with a deadline."""

from __future__ import annotations

import time

import torch


def finish(device: torch.device, end: float) -> None:
    """Until the current stream of `device` is done; nothing to wait for on the CPU.

    Raises:
        TimeoutError: not done at `end` (monotonic).
        RuntimeError: work on the stream failed.
    """
    if device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    pause = 20e-6
    while not done.query():
        if time.monotonic() > end:
            raise TimeoutError(f"work on {device} was not done within the deadline")
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
