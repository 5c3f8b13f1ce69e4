"""File descriptors handed to other processes of the host, one by one as they ask: a server and its client."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_BATCH = 64  # descriptors of a message; the kernel's limit is 253
_WAIT_S = 20.0
_PAUSE_S = 0.01
_MOST = 1 << 24  # bytes of a question


class DescriptorServer:
    """Answers whoever knows its name with a descriptor for each number asked for.

    Args:
        make: number -> descriptor, which is closed once it was sent. Raises OSError where there is none.

    Attributes:
        name: of a socket without a file; it holds a secret, so that only who was told it can ask.
    """

    def __init__(self, make: Callable[[int], int]) -> None:
        self._make = make
        self.name = f"refit-{os.getpid()}-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(64)
        threading.Thread(target=self._serve, name="refit-descriptors", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
                with client:
                    client.settimeout(_WAIT_S)
                    self._answer(client)
            except Exception as error:  # whoever asks next is to be answered
                log.warning("descriptors were not handed out: %s", error)
                time.sleep(_PAUSE_S)  # a process out of descriptors cannot even refuse

    def _answer(self, client: socket.socket) -> None:
        with client.makefile("rb") as asked:
            numbers = json.loads(asked.readline(_MOST))
        for start in range(0, len(numbers), _BATCH):
            made: list[int] = []
            try:
                for number in numbers[start : start + _BATCH]:
                    made.append(self._make(int(number)))
                socket.send_fds(client, [b"\0"], made)
            except Exception as error:  # the asker's answer
                client.sendall(f"!{error}".encode())
                return
            finally:
                for descriptor in made:
                    os.close(descriptor)


def fetch(name: str, numbers: Sequence[int], take: Callable[[int], None]) -> None:
    """Ask the server `name` for a descriptor of each number; `take` gets each in order, and it is closed then.

    Raises:
        OSError: the server is gone, does not answer, or has no descriptor for a number; its reason.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.settimeout(_WAIT_S)
        server.connect(f"\0{name}")
        server.sendall(json.dumps(list(numbers)).encode() + b"\n")
        got = 0
        while got < len(numbers):
            text, descriptors, _, _ = socket.recv_fds(server, 4096, _BATCH)
            try:
                if not descriptors:
                    raise OSError(text.decode(errors="replace").lstrip("!") or "the owner of the memory ended")
                for descriptor in descriptors:
                    take(descriptor)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            got += len(descriptors)
