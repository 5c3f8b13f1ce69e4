"""How a run ends that is told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_rl import driver
from nemo_rl.schema import Config, LoggerConfig


def test_sigterm_closes_actors_and_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sets a handler of its own when it starts, under which the process would abort."""
    closed: list[str] = []

    def rays(*_: object) -> None:
        raise AssertionError("Ray's handler was called")

    @contextmanager
    def cluster(*_: Any) -> Iterator[None]:
        signal.signal(signal.SIGTERM, rays)
        yield

    @contextmanager
    def actors(*_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            closed.append("actors")

    fakes = {"validate": lambda _: [], "_model_path": lambda *_: tmp_path, "start_logging": lambda *_: None}
    fakes |= {"Cluster": cluster, "Actors": actors, "_train": lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
    for name, fake in fakes.items():
        monkeypatch.setattr(driver, name, fake)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            driver.run(Config(logger=LoggerConfig(log_dir=str(tmp_path))), "run", Console(file=StringIO()))
        assert closed == ["actors"] and signal.getsignal(signal.SIGTERM) is rays
    finally:
        signal.signal(signal.SIGTERM, before)
