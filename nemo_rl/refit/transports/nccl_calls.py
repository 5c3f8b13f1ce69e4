"""NCCL's own calls, in the library that torch loaded: a group of messages is posted in microseconds.

Torch's groups keep a record, a watchdog and several events for each of theirs, which takes the host longer than NCCL
itself. Functions are those of nccl.h since NCCL 2.13.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from typing import Any

from nemo_rl.refit.transports.lanes import Post

LIBRARY = "libnccl.so.2"
_UINT8 = 1
_IN_PROGRESS = 7
_NO_LOAD = 4  # RTLD_NOLOAD: what torch loaded, and nothing else


class NcclError(RuntimeError):
    """A call that failed: its name and NCCL's words."""


class UniqueId(ctypes.Structure):
    """What ranks of one communicator share."""

    _fields_ = (("data", ctypes.c_char * 128),)


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, UniqueId, c_int),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclRecv": (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclCommAbort": (c_void_p,),
}


class Calls:
    """The functions of one library; each raises NcclError where it does not succeed.

    Raises:
        OSError: the process has not loaded the library.
        AttributeError: it lacks a function.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        found = ctypes.CDLL(library, mode=ctypes.DEFAULT_MODE | _NO_LOAD)
        self._functions = {name: getattr(found, name) for name in _ARGUMENTS}
        for name, function in self._functions.items():
            function.argtypes, function.restype = _ARGUMENTS[name], c_int
        found.ncclGetLastError.argtypes, found.ncclGetLastError.restype = (c_void_p,), c_char_p
        found.ncclGetErrorString.argtypes, found.ncclGetErrorString.restype = (c_int,), c_char_p
        self._words, self._last = found.ncclGetErrorString, found.ncclGetLastError
        self.send, self.recv = self._functions["ncclSend"], self._functions["ncclRecv"]

    def __call__(self, name: str, *arguments: Any) -> None:
        self.check(name, self._functions[name](*arguments))

    def check(self, name: str, result: int) -> None:
        if result:
            last = (self._last(None) or b"").decode(errors="replace").strip()
            raise NcclError(f"{name}: {self._words(result).decode()}{f' ({last})' if last else ''}")


@cache
def calls() -> Calls:
    """Of the library that torch loaded. Raises as `Calls`."""
    return Calls()


def missing() -> str | None:
    """Why NCCL's calls cannot be made from here, with the remedy; None where they can."""
    try:
        calls()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY} is not loaded with all that is called ({error}): install a torch that comes with shared NCCL"
    return None


def unique_id() -> bytes:
    """For all ranks of a communicator that is about to be made; its first rank asks for it."""
    found = UniqueId()
    calls()("ncclGetUniqueId", byref(found))
    return bytes(found)


class Communicator:
    """Of `size` ranks on the current device; all of them make it at the same time.

    Args:
        unique: what `unique_id` gave to one of them.

    Raises:
        NcclError: it cannot be made.
    """

    def __init__(self, unique: bytes, rank: int, size: int) -> None:
        self._calls, self._handle = calls(), c_void_p()
        self._calls("ncclCommInitRank", byref(self._handle), size, UniqueId.from_buffer_copy(unique), rank)

    def exchange(self, sends: Sequence[Post], recvs: Sequence[Post], stream: int) -> None:
        """One group on `stream`; messages between two ranks match in their order. Raises NcclError."""
        nccl, handle = self._calls, self._handle
        nccl("ncclGroupStart")
        try:
            for post in sends:
                buffer = post.buffer
                nccl.check("ncclSend", nccl.send(buffer.data_ptr(), buffer.numel(), _UINT8, post.peer, handle, stream))
            for post in recvs:
                buffer = post.buffer
                nccl.check("ncclRecv", nccl.recv(buffer.data_ptr(), buffer.numel(), _UINT8, post.peer, handle, stream))
        finally:
            nccl("ncclGroupEnd")

    def check(self) -> None:
        """Raises NcclError where a connection of what is in flight broke."""
        found = c_int()
        self._calls("ncclCommGetAsyncError", self._handle, byref(found))
        if found.value != _IN_PROGRESS:
            self._calls.check("a connection broke", found.value)

    def abort(self) -> None:
        """End what is in flight, and give up connections; nothing else may be called then. Raises NcclError."""
        self._calls("ncclCommAbort", self._handle)
