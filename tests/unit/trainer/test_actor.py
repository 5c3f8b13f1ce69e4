"""What an actor around a trainer rank tells its driver."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.trainer import actor

SAYS = logging.getLogger("nemo_rl.refit.session")


class Talking:
    """A session that says something in each phase."""

    def __init__(self, *args: Any, **given: Any) -> None:
        self.options = RefitOptions()

    def connect(self) -> None:
        SAYS.info("transport '%s' is not possible", "nccl")

    def plan(self, problems: Any) -> None:
        SAYS.info("transport 'peer'; predicted: %s", "peer 1.0 ms")
        SAYS.debug("details")

    def close(self) -> None:
        SAYS.info("closed")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> actor.TrainerActor:
    monkeypatch.setattr(actor, "RefitSession", Talking)
    made = actor.TrainerActor()
    made._policy = SimpleNamespace(rank=0, source=lambda: None, device=None)  # type: ignore[assignment]
    return made


def test_what_is_said_of_plan_and_transport_reaches_the_driver(trainer: actor.TrainerActor) -> None:
    handlers = list(actor.Heard._SAYS.handlers)
    for _ in range(2):
        trainer.refit_connect(World.of(1, 1), ("nowhere", 1), RefitOptions())
        logging.getLogger("elsewhere").warning("of no interest")
        assert trainer.refit_plan() == "transport 'nccl' is not possible\ntransport 'peer'; predicted: peer 1.0 ms"
    trainer.refit_connect(World.of(1, 1), ("nowhere", 1), RefitOptions())
    trainer.refit_close()
    assert actor.Heard._SAYS.handlers == handlers and actor.Heard._SAYS.level == logging.NOTSET
