"""A store whose host stops answering ends waits in time, by name; sockets of others stay as they are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import RefitError, StoreLost, TransferError, VerificationError, named_error
from nemo_rl.refit.store import Client

WORLD = World.of(1, 1)


HOSTS = """
import time
from datetime import timedelta
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=9), wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def process():
    """A process that hosts a store, and the store's port."""
    with subprocess.Popen([sys.executable, "-c", HOSTS], stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline()), process
        process.kill()


@pytest.fixture
def host(process):
    """(port, process) of a store that another process hosts."""
    port, hosts = process
    yield port, hosts.pid
    hosts.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("given", [False, True])
def test_a_host_that_is_stopped_is_named_within_the_deadline(host, given):
    port, pid = host
    address = ("127.0.0.1", port)
    in_hand = dist.PrefixStore("x", dist.TCPStore(*address, is_master=False, wait_for_workers=False))
    control = Control(0, WORLD, in_hand if given else address, 0.5)
    assert control.gather("connect", b"here", ranks=(0,)) == {0: b"here"}
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreLost, match="did not answer within 0.5 s"):
        control.gather("begin", b"")
    assert time.monotonic() - started < 3
    control.abort(RefitError("gone", rank=0, phase="begin", remedy="none"))
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.1)
    with pytest.raises(StoreLost, match="0.5 s"):  # the answer that comes late is that of another question
        control.read(["0/0/"])


def test_a_host_that_is_stopped_cannot_be_connected_with(host):
    port, pid = host
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TransferError, match=rf"the store at 127.0.0.1:{port} did not answer within 0.2 s"):
        Control(0, WORLD, ("127.0.0.1", port), 0.2)


def test_connections_with_others_keep_their_limits(host):
    port, _ = host
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as other:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        Client(store, 0.25)
        limits = [s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) for s in (server, other)]
        assert limits == [bytes(16)] * 2


def test_a_wait_that_ended_is_a_failed_transfer_in_every_phase():
    for error in (StoreLost("it is gone"), TimeoutError("it is late")):
        assert isinstance(named_error(error, 0, "verify"), TransferError)
    assert isinstance(named_error(ValueError("it differs"), 0, "verify"), VerificationError)
