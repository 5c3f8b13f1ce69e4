"""What ranks ask of a store, with a deadline for every answer: torch's client has none for a host that is stopped."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from nemo_rl.refit.device import within
from nemo_rl.refit.errors import StoreLost

T = TypeVar("T")
_OPEN = Path("/proc/self/fd")


class Client:
    """A store as its users ask it; a lost one is not asked again, as a late answer would be taken for the next one.

    Args:
        store: TCPStores have deadlines on Linux, on all connections of this process to that port.
        deadline_s: for each answer, and for each part of a long one.

    All methods are those of the store, and raise StoreLost where it did not answer, this time or before.
    """

    def __init__(self, store: dist.Store, deadline_s: float) -> None:
        self._store, self._deadline_s, self._lost = store, deadline_s, ""
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if isinstance(store, dist.TCPStore):
            _limit_answers(store.port, deadline_s)

    def set(self, key: str, value: bytes | str) -> None:
        self._ask(self._store.set, key, value)

    def add(self, key: str, value: int) -> int:
        return int(self._ask(self._store.add, key, value))

    def get(self, key: str) -> bytes:
        return bytes(self._ask(self._store.get, key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [bytes(value) for value in self._ask(self._store.multi_get, list(keys))]

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask(self._store.check, list(keys)))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return bytes(self._ask(self._store.compare_set, key, expected, desired))

    def delete_key(self, key: str) -> bool:
        return bool(self._ask(self._store.delete_key, key))

    def _ask(self, call: Callable[..., T], *given: object) -> T:
        if self._lost:
            raise StoreLost(self._lost)
        try:
            return call(*given)
        except dist.DistNetworkError as error:
            self._lost = (
                f"the store did not answer within {self._deadline_s:g} s, or not at all ({error}): the driver that "
                "hosts it ended, is stopped or out of reach"
            )
            raise StoreLost(self._lost) from error


def reach(host: str, port: int, deadline_s: float) -> dist.TCPStore:
    """A connection to the store there. Raises TimeoutError, or RuntimeError as torch does."""
    found: list[dist.TCPStore] = []

    def connect() -> None:
        timeout = timedelta(seconds=deadline_s)
        found.append(dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))

    # Torch's own deadline is for a host that does not accept; a stopped one does.
    within(1.1 * deadline_s, connect, f"connecting with {host}:{port}")
    return found[0]


def _limit_answers(port: int, seconds: float) -> None:
    """Reads and writes on connections with `port` fail where they wait longer; others of this process stay as they are.

    By the system's calls, as Python's sockets may change a descriptor that they are made of.
    """
    library = ctypes.CDLL(None, use_errno=True)
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    for descriptor in map(int, os.listdir(_OPEN) if _OPEN.exists() else ()):
        address, size = (ctypes.c_uint8 * 128)(), ctypes.c_uint32(128)
        if library.getpeername(descriptor, address, ctypes.byref(size)) != 0:
            continue
        family, peer = struct.unpack_from("=H", address)[0], struct.unpack_from("!H", address, 2)[0]
        if family in (socket.AF_INET, socket.AF_INET6) and peer == port:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                library.setsockopt(descriptor, socket.SOL_SOCKET, option, limit, len(limit))
