"""Two threads and one engine: one steps it, the other stops it between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from nemo_rl.refit.base import RefitReport


class Gate:
    """Whoever steps an engine does so inside `step()`; whoever needs it at rest, inside `pause()`.

    A pause goes before the next step, however fast steps follow each other.

    Args:
        deadline_s: longest that a step waits for a pause to end, and a pause for a step or another pause.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._changed = threading.Condition()
        self._stepping = self._paused = False
        self._waiting = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the engine for one step. Raises RuntimeError where a pause does not end within the deadline."""
        with self._changed:
            self._waiting += 1
            try:
                self._wait(lambda: not self._paused and not self._stepping, "a pause of the engine did not end")
                self._stepping = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the engine at rest. Raises RuntimeError where a step does not end within the deadline."""
        with self._changed:
            self._wait(lambda: not self._paused, "another pause of the engine did not end")
            self._paused = True
            try:
                self._wait(lambda: not self._stepping, "a step of the engine did not end")
            except RuntimeError:
                self._open()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._open()

    def resumed(self) -> None:
        """After a pause: until a step that waited for its end has begun. Raises RuntimeError past the deadline."""
        with self._changed:
            self._wait(lambda: self._paused or not self._waiting, "no step began after a pause of the engine")

    def _open(self) -> None:
        self._paused = False
        self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(ready, self.deadline_s):
            raise RuntimeError(f"{what} within {self.deadline_s:g} s; see the engine's log")


class Laps:
    """A stretch of time split into named parts that add up to it."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.parts: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """The part since the last lap is called `name`; its seconds."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self.parts[name] = self.parts.get(name, 0.0) + seconds
        return seconds


def pause_parts(
    laps: Mapping[str, float],
    reports: Sequence[RefitReport],
    prepared: Sequence[Mapping[str, float]],
    earlier: Mapping[str, float],
) -> dict[str, float]:
    """Laps of a refit, the one called `session` split by the phases of its slowest worker; what is left is `call`.

    Args:
        prepared: phases that each worker's report tells although they ran before the first lap.
        earlier: laps of those.
    """
    slowest = max(range(len(reports)), key=lambda i: reports[i].total_s)
    before = prepared[slowest] if prepared else {}
    inside = {name: s - before.get(name, 0.0) for name, s in reports[slowest].phase_s.items()}
    parts = {**laps, **inside, "call": laps["session"] - sum(inside.values())}
    del parts["session"]
    for name, seconds in earlier.items():
        parts[name] = parts.get(name, 0.0) + seconds
    return {name: seconds for name, seconds in parts.items() if seconds}
