"""What holds for every device that tensors of a refit are on: its environment, waiting for it, and work beside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

MULTICAST_OFF: Mapping[str, str] = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
"""What every process that uses GPUs needs in its environment before it loads NCCL.

NVLink multicast needs a fabric manager that containers often lack, and can take all GPUs of a host out of service.
"""

_CLOSELY_S = 2e-4
"""For so long waits look without a pause: a sleep takes longer than what is about to end."""

_SIDE: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}  # of `aside` and `follow`
_ALL: dict[torch.device, tuple[torch.cuda.Event, Any, Any]] = {}  # of `await_rest`: with handles of context and event


def one_device(device: torch.device) -> torch.device:
    """`device` as its tensors name it: `cuda` is the current GPU of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def finish(device: torch.device, end: float, look: Callable[[], None] = lambda: None) -> None:
    """Until the current stream of `device` is done; nothing to wait for on the CPU.

    Args:
        look: called again and again; what it raises ends the wait.

    Raises:
        TimeoutError: not done at `end` (monotonic).
        RuntimeError: work on the stream failed.
    """
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    if not stream.query():
        await_event(stream.record_event(), f"work on {device}", end, look)


def await_event(done: torch.cuda.Event, what: str, end: float, look: Callable[[], None] = lambda: None) -> None:
    """Until `done`, which `what` names. `look` and errors are those of `finish`."""
    pause, closely = 20e-6, time.monotonic() + _CLOSELY_S
    while not done.query():
        if time.monotonic() < closely:
            continue
        if time.monotonic() > end:
            raise TimeoutError(f"{what} was not done within the deadline")
        look()
        time.sleep(pause)
        pause = min(2 * pause, 2e-4)


def await_rest(device: torch.device) -> Callable[[float], None]:
    """What waits, until a deadline (monotonic), for all that this process has started on `device` before, on whichever
    stream. It raises as `finish`."""
    if device.type != "cuda":
        return lambda end: None
    what = f"what this process started on {device}"
    if (done := _behind_all(device)) is not None:
        return lambda end: await_event(done, what, end)
    return lambda end: within(max(end - time.monotonic(), 0.0), lambda: torch.cuda.synchronize(device), what)


def within(deadline_s: float, work: Callable[[], None], what: str) -> None:
    """Do `work` in a thread. Raises TimeoutError where it takes longer, and what it raises."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        raise TimeoutError(f"{what} took longer than {round(deadline_s, 2):g} s")
    if failures:
        raise failures[0]


def _behind_all(device: torch.device) -> torch.cuda.Event | None:
    """An event behind what all streams of the context were given; None where the driver has none."""
    from cuda.bindings import driver  # comes with CUDA builds of torch only

    if device not in _ALL:
        with torch.cuda.device(device):
            event = torch.cuda.Event()
            event.record()  # makes it
            _, context = driver.cuCtxGetCurrent()
        _ALL[device] = event, context, driver.CUevent(event.cuda_event)
    event, context, handle = _ALL[device]
    try:
        (error,) = driver.cuCtxRecordEvent(context, handle)
    except (AttributeError, RuntimeError):
        return None  # of before CUDA 12.5
    return event if int(error) == 0 else None


def aside(device: torch.device) -> AbstractContextManager[object]:
    """What starts inside runs beside all streams of `device`, behind what was started aside before."""
    return torch.cuda.stream(_side(device)[0]) if device.type == "cuda" else nullcontext()


def follow(device: torch.device) -> None:
    """What is started `aside` from now on runs behind what the current stream of `device` was given."""
    if device.type == "cuda":
        side, before = _side(device)
        before.record(torch.cuda.current_stream(device))
        side.wait_event(before)


def rejoin(device: torch.device) -> None:
    """What the current stream of `device` is given next runs behind all that was started `aside`."""
    if device in _SIDE:
        torch.cuda.current_stream(device).wait_stream(_SIDE[device][0])


def _side(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device), torch.cuda.Event()
    return _SIDE[device]
