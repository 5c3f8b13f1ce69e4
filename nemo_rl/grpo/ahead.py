"""When rollouts happen: each in its step, or one step ahead, beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from nemo_rl.grpo.types import RunError, Sample

Roll = Callable[[int], list[Sample]]
"""Step -> its samples; bounded by a deadline of its own."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Samples of one step, and when they were made (monotonic seconds)."""

    samples: list[Sample]
    started_s: float
    ended_s: float


class Rollouts(Protocol):
    """Rollouts of all steps, in order."""

    def take(self, step: int) -> Rollout:
        """That of `step`; raises what it raised."""

    def before_refit(self, drain: bool) -> None:
        """Raise what the rollout under way raised; with `drain`, wait for its end first."""


def timed(roll: Roll, step: int) -> Rollout:
    started = time.monotonic()
    samples = roll(step)
    return Rollout(samples, started, time.monotonic())


class InTurn:
    """Each step's rollout when it is asked for."""

    def __init__(self, roll: Roll) -> None:
        self._roll = roll

    def take(self, step: int) -> Rollout:
        return timed(self._roll, step)

    def before_refit(self, drain: bool) -> None:
        """Nothing is under way."""


class Ahead:
    """The rollout of step n + 1 starts, in a thread, when that of step n is taken.

    Args:
        last_step: the last one that has a rollout.
        deadline_s: longest that any rollout may take.
    """

    def __init__(self, roll: Roll, last_step: int, deadline_s: float) -> None:
        self._roll, self._last_step, self._deadline_s = roll, last_step, deadline_s
        self._pending: tuple[int, Future[Rollout]] | None = None

    def take(self, step: int) -> Rollout:
        if self._pending is None:
            self._start(step)
        rollout = self._wait()
        self._pending = None
        if step < self._last_step:
            self._start(step + 1)
        return rollout

    def before_refit(self, drain: bool) -> None:
        if self._pending is not None and (drain or self._pending[1].done()):
            self._wait()

    def _start(self, step: int) -> None:
        future: Future[Rollout] = Future()
        self._pending = step, future

        def work() -> None:
            try:
                future.set_result(timed(self._roll, step))
            except BaseException as error:  # told to whoever takes the rollout
                future.set_exception(error)

        # A daemon: a run that fails elsewhere ends without waiting for it.
        threading.Thread(target=work, name=f"rollout {step}", daemon=True).start()

    def _wait(self) -> Rollout:
        assert self._pending is not None
        step, future = self._pending
        try:
            return future.result(self._deadline_s)
        except TimeoutError as error:
            if future.done():
                raise
            raise RunError(f"the rollout of step {step} did not end within {self._deadline_s:g} s") from error
