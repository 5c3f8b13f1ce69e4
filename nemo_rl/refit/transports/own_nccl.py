"""NCCL communicators of this library's own, in which a peer's death is an error of whoever waits for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

log = logging.getLogger(__name__)

_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_ABORT_S = 12.0  # longest wait for aborts, which take milliseconds; m2n has limits of its own


def make_group(
    store: dist.Store, rank: int, size: int, options: dist.ProcessGroupNCCL.Options
) -> dist.ProcessGroupNCCL:
    """A group whose failures and deadlines are left to who waits for its transfers.

    By default torch's watchdog ends the process where a connection breaks, and with it the weights that this rank holds
    and the groups of its engine. Torch takes that from the environment alone, when a group is made; the process's other
    groups keep what they have.
    """
    with _variable(_HANDLING, "0"):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def variable(name: str) -> str | None:
    """What a library of NCCL's finds in the environment; None where it finds nothing."""
    return os.environ.get(name)


def abort_together(aborts: Sequence[Callable[[], object]]) -> None:
    """Call all of `aborts` at once, and come back when they are done or take unreasonably long.

    An abort frees memory, which waits for all that runs on the device: also for kernels of communicators that are still
    waiting for a dead peer, and that only an abort of their own would end.
    """
    threads = [threading.Thread(target=_quietly, args=(abort,), name="abort", daemon=True) for abort in aborts]
    for thread in threads:
        thread.start()
    end = time.monotonic() + _ABORT_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if late := sum(thread.is_alive() for thread in threads):
        log.error("%d of %d communicators were not aborted within %g s", late, len(threads), _ABORT_S)


def _quietly(abort: Callable[[], object]) -> None:
    try:
        abort()
    except Exception as error:  # others are still to be aborted, and the failure that led here is what counts
        log.warning("a communicator's abort failed: %s", error)


def keep_variable(name: str, value: str) -> None:
    """Set what a library of NCCL's takes from the environment alone, at a time of its own."""
    os.environ[name] = value


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
