"""NCCL's calls over a library that records them: what is called in which order, and errors by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemo_rl.refit.transports import nccl_calls
from nemo_rl.refit.transports.lanes import Post
from nemo_rl.refit.transports.nccl_calls import Communicator, NcclError, missing, unique_id

REMOTE_ERROR, IN_PROGRESS = 6, 7


class Function:
    """One of the library's; takes the attributes that ctypes' functions have."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Library:
    """Attributes: what was called, with plain arguments; what functions answer, where that is not success."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.answers: dict[str, int] = {}
        self.async_error = 0
        self.lacks = ""

    def __getattr__(self, name: str) -> Function:
        if name == self.lacks:
            raise AttributeError(f"undefined symbol: {name}")
        words = {"ncclGetErrorString": lambda code: f"error {code}".encode(), "ncclGetLastError": lambda _: b"a cable"}
        return Function(words.get(name, lambda *arguments: self._record(name, *arguments)))

    def _record(self, name: str, *arguments: Any) -> int:
        if name == "ncclCommGetAsyncError":
            arguments[1]._obj.value = self.async_error
        self.called.append((name, *(a for a in arguments if isinstance(a, int))))
        return self.answers.get(name, 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: made)
    nccl_calls.calls.cache_clear()
    yield made
    nccl_calls.calls.cache_clear()


def test_what_is_missing_is_named(library: Library) -> None:
    assert missing() is None
    nccl_calls.calls.cache_clear()
    library.lacks = "ncclCommInitRank"
    assert "undefined symbol: ncclCommInitRank" in (missing() or "") and "install a torch" in (missing() or "")


def test_a_library_that_torch_did_not_load_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl_calls.calls.cache_clear()
    monkeypatch.setattr(nccl_calls.Calls.__init__, "__defaults__", ("libno-such-nccl.so.2",))
    assert "libno-such-nccl.so.2" in (missing() or "")
    with pytest.raises(OSError):
        unique_id()


def test_a_group_starts_sends_receives_and_ends(library: Library) -> None:
    comm = Communicator(b"u" * 128, 1, 3)
    assert library.called.pop() == ("ncclCommInitRank", 3, 1)
    out, into = torch.zeros(5, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8)
    comm.exchange([Post(out, 2, 0), Post(out[1:], 2, 1)], [Post(into, 0, 0)], 77)
    assert library.called == [
        ("ncclGroupStart",),
        ("ncclSend", out.data_ptr(), 5, 1, 2, 77),
        ("ncclSend", out.data_ptr() + 1, 4, 1, 2, 77),
        ("ncclRecv", into.data_ptr(), 7, 1, 0, 77),
        ("ncclGroupEnd",),
    ]
    comm.abort()
    assert library.called[-1] == ("ncclCommAbort",)


@pytest.mark.parametrize("name", ["ncclGroupStart", "ncclSend", "ncclRecv", "ncclGroupEnd"])
def test_a_call_that_fails_is_named_and_no_group_stays_open(name: str, library: Library) -> None:
    comm = Communicator(b"u" * 128, 0, 2)
    library.answers[name] = 4
    one = [Post(torch.zeros(5, dtype=torch.uint8), 1, 0)]
    with pytest.raises(NcclError, match=rf"{name}: error 4 \(a cable\)"):
        comm.exchange(one, one, 0)
    assert library.called[-1][0] == ("ncclGroupStart" if name == "ncclGroupStart" else "ncclGroupEnd")


def test_communicators_that_cannot_be_made_are_errors(library: Library) -> None:
    library.answers = {"ncclCommInitRank": 1, "ncclGetUniqueId": 2, "ncclCommAbort": 3}
    with pytest.raises(NcclError, match="ncclCommInitRank: error 1"):
        Communicator(b"u" * 128, 0, 2)
    with pytest.raises(NcclError, match="ncclGetUniqueId: error 2"):
        unique_id()


def test_a_connection_that_broke_is_seen(library: Library) -> None:
    comm = Communicator(b"u" * 128, 0, 2)
    for fine in (0, IN_PROGRESS):
        library.async_error = fine
        comm.check()
    library.async_error = REMOTE_ERROR
    with pytest.raises(NcclError, match="a connection broke: error 6"):
        comm.check()


def test_a_unique_id_is_as_long_as_in_the_header() -> None:
    assert ctypes.sizeof(nccl_calls.UniqueId) == 128
