"""A worker's side of a refit, without an engine."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.generator.worker import RefitWorker


class Session:
    """Writes down when it refits."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def refit(self, version: int) -> int:
        self.said.append("refit")
        return version


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["rest", "refit", "rest"]), ("cpu", ["refit"])])
def test_a_device_rests_before_and_after_a_refit(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]
) -> None:
    """Steps of the engine may run on another thread's stream, which waits for nothing of the refit's."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: said.append("rest"))
    worker = RefitWorker()
    worker.device, worker.rank = torch.device(device), 0
    worker._refit_session = Session(said)  # type: ignore[assignment]
    outcome = worker.refit(3)
    assert outcome.value == 3 and outcome.error is None and said == expected
