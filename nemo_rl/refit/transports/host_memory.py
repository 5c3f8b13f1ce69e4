"""CPU memory of other processes of the host, read straight from where it lies: one pass, no message, no staging."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np
import torch

from nemo_rl.refit.strided import Axis, Form, Jobs

_MAX_PIECES = 1024  # of a call; the kernel's limit
_LONG = 4096  # bytes of a run from which on a piece costs less than its bytes
_SCRATCH = 1 << 20
_SPREAD = 4  # bytes read for one that is wanted, at most
_PR_SET_PTRACER, _ANY = 0x59616D61, -1

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
_readv.restype = _writev.restype = ctypes.c_ssize_t
_PAIRS = ctypes.c_void_p, ctypes.c_ulong  # of addresses and lengths, and how many
_readv.argtypes = _writev.argtypes = [ctypes.c_int, *_PAIRS, *_PAIRS, ctypes.c_ulong]

_BEACON = ctypes.create_string_buffer(secrets.token_bytes(16), 16)


class HostMemory:
    """Reads CPU memory of processes of this user on this host; the owner takes no part.

    Where the kernel restricts tracing (Yama), `beacon` permits it for processes of the same user.
    """

    step_bytes = 4 << 20
    puts = False  # reads may take short runs together with what lies between them

    def __init__(self) -> None:
        self.staging_bytes = 0
        self.num_copies = self.num_launches = 0  # the processor moves all

    def beacon(self) -> str:
        """Where this process holds a secret, and the secret: whoever can read it there can read all its memory."""
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_ANY), 0, 0, 0)
        return json.dumps([os.getpid(), ctypes.addressof(_BEACON), _BEACON.raw.hex()])

    def probe(self, beacon: str) -> str | None:
        """Why memory of the process that lit `beacon` cannot be read; None where it can."""
        pid, address, secret = json.loads(beacon)
        found = ctypes.create_string_buffer(16)
        try:
            _read(pid, np.array([[address, 16]], np.int64), np.array([[ctypes.addressof(found), 16]], np.int64))
        except OSError as error:
            return f"memory of process {pid} cannot be read: {error.strerror}"
        return None if found.raw.hex() == secret else f"process {pid} is another one here: no common process ids"

    def show(self, views: Sequence[torch.Tensor]) -> tuple[list[str], np.ndarray]:
        """This process is one window, and views stand in it at their addresses."""
        where = [(0, view.data_ptr()) for view in views]
        return [str(os.getpid())], np.array(where, np.int64).reshape(-1, 2)

    def open(self, windows: Sequence[str]) -> tuple[int, np.ndarray]:
        """(process id, address of each window's first byte)."""
        return int(windows[0]), np.zeros(1, np.int64)

    def keep(self, windows: Collection[str]) -> None:
        """Nothing is mapped."""

    def own(self) -> int:
        """What stands for this process itself in `prepare`."""
        return os.getpid()

    def prepare(self, peer: int, jobs: Jobs, *, put: bool, ordered: bool) -> Callable[[], None]:
        """What copies `jobs` between process `peer` and this one; it raises OSError where the memory is gone."""
        return (lambda: self._write_all(peer, jobs)) if put else (lambda: self._read_all(peer, jobs))

    def _write_all(self, pid: int, jobs: Jobs) -> None:
        remote = [_pieces(form, "dst") + (dst, 0) for form, dst in zip(jobs.forms, jobs.dst, strict=True)]
        local = [_pieces(form, "src") + (src, 0) for form, src in zip(jobs.forms, jobs.src, strict=True)]
        if remote:
            _move(_writev, pid, np.concatenate(remote), np.concatenate(local))

    def _read_all(self, pid: int, jobs: Jobs) -> None:
        straight: list[int] = []
        for form, numbers in jobs.grouped().items():
            if form.run < _LONG and _span(form, "src") <= _SPREAD * form.num_bytes:
                self.staging_bytes = max(self.staging_bytes, min(_span(form, "src"), _SCRATCH))
                for number in numbers:
                    _read_span(pid, int(jobs.src[number]), int(jobs.dst[number]), form)
            else:
                straight += numbers.tolist()
        remote = [_pieces(jobs.forms[i], "src") + (jobs.src[i], 0) for i in straight]
        local = [_pieces(jobs.forms[i], "dst") + (jobs.dst[i], 0) for i in straight]
        if straight:
            _read(pid, np.concatenate(remote), np.concatenate(local))

    def mark(self) -> Callable[[], bool]:
        """Reads are done when they return."""
        return lambda: True

    def wait(self, end: float) -> None:
        """Reads are done when they return. Raises TimeoutError where `end` (monotonic) has passed."""
        if time.monotonic() > end:
            raise TimeoutError("reading took longer than the deadline")

    def close(self) -> None:
        return None


def _span(form: Form, side: str) -> int:
    """Bytes from the first to behind the last of a box at one end."""
    return form.run + sum((axis.size - 1) * (axis.src if side == "src" else axis.dst) for axis in form.axes)


@lru_cache(maxsize=256)
def _pieces(form: Form, side: str) -> np.ndarray:
    """(n, 2): offset and length of every run at one end, in the order that both ends share."""
    offsets = np.zeros(1, np.int64)
    for axis in form.axes:
        step = axis.src if side == "src" else axis.dst
        offsets = (offsets[:, None] + np.arange(axis.size, dtype=np.int64) * step).reshape(-1)
    return np.column_stack([offsets, np.full(len(offsets), form.run, np.int64)])


def _read(pid: int, remote: np.ndarray, local: np.ndarray) -> None:
    """Read pieces (address, length) of `pid` into as many of this process. Raises OSError."""
    _move(_readv, pid, remote, local)


def _move(call: Callable[..., int], pid: int, remote: np.ndarray, local: np.ndarray) -> None:
    for start in range(0, len(remote), _MAX_PIECES):
        there, here = (np.ascontiguousarray(p[start : start + _MAX_PIECES], np.int64) for p in (remote, local))
        wanted = int(there[:, 1].sum())
        while wanted:
            got = call(pid, here.ctypes.data, len(here), there.ctypes.data, len(there), 0)
            if got <= 0:
                number = ctypes.get_errno()
                raise OSError(number, f"{os.strerror(number)} ({wanted} bytes of process {pid} were due)")
            wanted -= got
            if wanted:
                there, here = _behind(there, got), _behind(here, got)


def _behind(pieces: np.ndarray, done: int) -> np.ndarray:
    """What is left of `pieces` after `done` bytes: the kernel moves at most 2 GiB and stops where pages are missing."""
    ends = np.cumsum(pieces[:, 1])
    first = int(np.searchsorted(ends, done, side="right"))
    rest = pieces[first:].copy()
    skipped = done - (int(ends[first - 1]) if first else 0)
    rest[0] += (skipped, -skipped)
    return rest


def _read_span(pid: int, src: int, dst: int, form: Form) -> None:
    """Read short runs together with what lies between them, then pick them out."""
    span = _span(form, "src")
    if span > _SCRATCH and form.axes:
        outer, *rest = sorted(form.axes, key=lambda axis: -axis.src)
        inner = tuple(rest)
        step = max(1, (_SCRATCH - _span(Form(inner, form.run, form.item), "src")) // outer.src)
        for i in range(0, outer.size, step):
            size = min(step, outer.size - i)
            part = Form((Axis(size, outer.src, outer.dst), *inner) if size > 1 else inner, form.run, form.item)
            _read_span(pid, src + i * outer.src, dst + i * outer.dst, part)
        return
    scratch = np.empty(span, np.uint8)
    _read(pid, np.array([[src, span]], np.int64), np.array([[scratch.ctypes.data, span]], np.int64))
    shape = (*(axis.size for axis in form.axes), form.run)
    picked = np.lib.stride_tricks.as_strided(scratch, shape, (*(axis.src for axis in form.axes), 1))
    room = np.ctypeslib.as_array((ctypes.c_uint8 * _span(form, "dst")).from_address(dst))
    np.lib.stride_tricks.as_strided(room, shape, (*(axis.dst for axis in form.axes), 1))[...] = picked
