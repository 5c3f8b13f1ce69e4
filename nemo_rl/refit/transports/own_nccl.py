"""NCCL communicators of this library's own, in which a peer's death is an error of whoever waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


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
