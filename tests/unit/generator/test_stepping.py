"""Tokens carry the version of the weights that computed them, also where an engine schedules ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState

from nemo_rl.generator.stepping import Growing, Stepper

LENGTH = 6


@dataclass
class Engine:
    """An engine with the interface of vLLM's that computes a batch ahead: a token is the weights that computed it.

    At most `room` requests run at once; `ahead` batches are computed before the first is given out.
    """

    ahead: int = 1
    room: int = 2
    weights: int = 100
    finish: str = "length"
    running: dict[str, int] = field(default_factory=dict)
    salts: dict[str, str] = field(default_factory=dict)
    recomputed: int = 0
    batch_queue: deque[list[tuple[str, int, bool]]] = field(default_factory=deque)
    state: PauseState = PauseState.UNPAUSED

    @property
    def llm_engine(self) -> Engine:
        return self

    @property
    def engine_core(self) -> Any:
        return SimpleNamespace(engine_core=SimpleNamespace(batch_queue=self.batch_queue, scheduler=self))

    def set_pause_state(self, state: PauseState) -> None:
        self.state = state

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        assert reset_running_requests and not self.batch_queue
        self.recomputed += 1

    def add_request(self, name: str, asked: Any, params: Any, lora_request: Any) -> None:
        self.running[name], self.salts[name] = 0, asked["cache_salt"]

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.running[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.batch_queue)

    def step(self) -> list[Any]:
        if self.state is PauseState.UNPAUSED:
            batch = []
            for name in list(self.running)[: self.room]:
                self.running[name] += 1
                ended = self.running[name] == LENGTH
                batch.append((name, self.weights, ended))
                if ended:
                    del self.running[name]
            self.batch_queue.append(batch)
            if len(self.batch_queue) <= self.ahead and self.running:
                return []
        return [self._output(*entry) for entry in self.batch_queue.popleft()]

    def _output(self, name: str, token: int, ended: bool) -> Any:
        part = SimpleNamespace(token_ids=[token], logprobs=[{token: SimpleNamespace(logprob=-1.0)}])
        part.finish_reason = self.finish if ended else None
        return SimpleNamespace(request_id=name, outputs=[part], finished=ended)


def answer(
    engine: Engine, change_at: int, *, settle: bool = True, recompute: bool = False, room: int = 3
) -> list[Growing]:
    """Three samples; before turn `change_at` of the stepper, weights become others, of version 7.

    With `room` of 2 the third waits in the stepper, with 3 it waits in the engine.
    """
    stepper, turns, version = Stepper(engine, room), 0, 3

    @contextmanager
    def weights() -> Iterator[int]:
        nonlocal turns, version
        turns += 1
        if turns == change_at:
            if settle:
                stepper.settle(version)
                assert not engine.batch_queue and engine.state is PauseState.UNPAUSED
            engine.weights, version = 200, 7
            stepper.renew(version, recompute)
        yield version

    grown = [samples[0] for samples in stepper.answer([[1], [2], [3]], [["p"]] * 3, weights)]
    assert stepper.num_running == 0
    return grown


def right(grown: list[Growing]) -> bool:
    return all(g.versions == [{100: 3, 200: 7}[t] for t in g.tokens] for g in grown)


@pytest.mark.parametrize("room", [2, 3])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("change_at", range(2, 7))
def test_each_token_has_the_version_of_the_weights_that_computed_it(room: int, ahead: int, change_at: int) -> None:
    engine = Engine(ahead)
    grown = answer(engine, change_at, room=room)
    assert right(grown) and all(len(g.tokens) == LENGTH == len(g.logprobs) for g in grown)
    assert {3, 7} == {v for g in grown for v in g.versions}
    waited = grown[2]  # it had no token when the weights changed
    assert set(waited.versions) == {7} and list(engine.salts.values())[-1] == "weights 7"
    assert len(engine.salts) == {2: 3, 3: 4}[room], "only what waits in the engine is added anew"


@pytest.mark.parametrize("change_at", range(5, 10))
def test_an_update_may_take_in_the_last_tokens(change_at: int) -> None:
    grown = answer(Engine(ahead=2, room=3), change_at)
    assert right(grown) and all(len(g.tokens) == LENGTH for g in grown)


def test_what_was_scheduled_ahead_would_get_another_version() -> None:
    """The negative control of `settle`."""
    assert not right(answer(Engine(ahead=1), 3, settle=False))


def test_caches_are_recomputed_where_that_is_wanted() -> None:
    kept, again = Engine(), Engine()
    answer(kept, 3)
    answer(again, 3, recompute=True)
    assert (kept.recomputed, again.recomputed) == (0, 1)


def test_requests_that_the_engine_gives_up_or_loses_are_errors() -> None:
    with pytest.raises(RuntimeError, match="the engine ended a request as 'abort'"):
        answer(Engine(finish="abort"), 99)

    class Forgetful(Engine):
        def has_unfinished_requests(self) -> bool:
            return False

    with pytest.raises(RuntimeError, match="the engine lost 3 requests"):
        answer(Forgetful(), 99)
