"""A phase of a session: how long it took, or what ended it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from nemo_rl.refit.errors import RefitError, named_error


class Phase:
    """What runs inside is timed; where it fails, that becomes a RefitError which names rank and phase.

    Args:
        name: of the phase.
        rank: this one.
        seconds: phase -> what it took, which the time inside is added to.
        fail: hears of any failure, and of an interruption, before it is raised.
    """

    def __init__(self, name: str, rank: int, seconds: dict[str, float], fail: Callable[[RefitError], None]) -> None:
        self._name, self._rank, self._seconds, self._fail = name, rank, seconds, fail
        self._started_s = 0.0

    def __enter__(self) -> None:
        self._started_s = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.monotonic() - self._started_s
        elif isinstance(error, RefitError):
            self._fail(error)
        elif isinstance(error, Exception):
            self._fail(named := named_error(error, self._rank, self._name))
            raise named from error
        else:  # KeyboardInterrupt, SystemExit, a cancelled task: what was under way is not finished
            said = f"interrupted by {type(error).__name__}"
            self._fail(RefitError(said, rank=self._rank, phase=self._name, remedy="remake the session"))
