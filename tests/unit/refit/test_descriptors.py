"""Memory in chunks, and descriptors handed to other processes: all that were asked for, in order, or the reason."""

from __future__ import annotations

import os
import time

import pytest

from nemo_rl.refit.transports import descriptors
from nemo_rl.refit.transports.chunks import Run, place, runs_of
from nemo_rl.refit.transports.descriptors import DescriptorServer, fetch


def file_of(number):
    if number == 13:
        raise OSError("memory 13 was not shown")
    if number == 14:
        raise TypeError("the driver takes no 14")
    made = os.memfd_create("test")
    os.write(made, f"memory {number}".encode())
    return made


def read(descriptor):
    return os.pread(descriptor, 100, 0).decode()


def num_open():
    return len(os.listdir("/proc/self/fd"))


def all_closed(before):
    """The server's thread closes a moment after its client."""
    end = time.monotonic() + 2
    while num_open() != before and time.monotonic() < end:
        time.sleep(0.005)
    return num_open() == before


@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
def test_another_process_gets_what_it_asks_for_in_order(count):
    server, before = DescriptorServer(file_of), num_open()
    pid = os.fork()
    if pid == 0:
        code, got = 1, []
        try:
            fetch(server.name, range(100, 100 + count), lambda d: got.append(read(d)))
            code = 0 if got == [f"memory {i}" for i in range(100, 100 + count)] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    fetch(server.name, [1], lambda d: None)
    assert all_closed(before), "what was sent is closed"


def test_what_is_not_there_is_refused_with_the_reason(monkeypatch):
    server, got = DescriptorServer(file_of), []
    with pytest.raises(OSError, match="memory 13 was not shown"):
        fetch(server.name, [*range(100, 170), 13], lambda d: got.append(read(d)))
    assert len(got) == 64
    with pytest.raises(OSError, match="the driver takes no 14"):
        fetch(server.name, [14], got.append)
    with descriptors.socket.socket(descriptors.socket.AF_UNIX) as stranger:
        stranger.connect(f"\0{server.name}")
        stranger.sendall(b"{}[\n")
    fetch(server.name, [100], lambda d: got.append(read(d)))
    assert got[-1] == "memory 100", "it goes on whatever it was asked"
    with pytest.raises(OSError, match="refused"):
        fetch("refit-nobody", [1], got.append)
    monkeypatch.setattr(descriptors, "_WAIT_S", 0.1)
    deaf = descriptors.socket.socket(descriptors.socket.AF_UNIX)
    deaf.bind("\0refit-deaf")
    deaf.listen(1)
    with pytest.raises(OSError, match="timed out"):
        fetch("refit-deaf", [1], got.append)


def test_chunks_that_touch_are_one_run():
    runs = runs_of({4096: 64, 8192: 64, 4160: 32, 4192: 8})
    assert runs == [Run(((4096, 64), (4160, 32), (4192, 8))), Run(((8192, 64),))]
    assert [(run.address, run.num_bytes) for run in runs] == [(4096, 104), (8192, 64)]
    assert [place(a, runs) for a in (4096, 4199, 8192, 8255)] == [(0, 0), (0, 103), (1, 0), (1, 63)]
    with pytest.raises(AssertionError, match="0x1068 lies in no run"):
        place(4200, runs)
    assert runs_of({}) == []
