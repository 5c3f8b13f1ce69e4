"""A pause between two steps: who waits for whom, and for how long."""

from __future__ import annotations

import threading
import time

import pytest

from nemo_rl.generator.gate import Gate, Laps, pause_parts
from nemo_rl.refit.base import RefitReport


def stepping(gate: Gate, inside: list[str], stop: threading.Event) -> threading.Thread:
    """A thread that takes step after step without a rest between them."""

    def work() -> None:
        while not stop.is_set():
            with gate.step():
                inside.append("step")
                time.sleep(0.002)
                inside.append("end")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_a_pause_comes_between_two_steps_and_no_step_into_a_pause() -> None:
    gate, inside, stop = Gate(5.0), [], threading.Event()
    thread = stepping(gate, inside, stop)
    for _ in range(20):
        with gate.pause():
            assert inside[-1:] in ([], ["end"])
            before = len(inside)
            time.sleep(0.004)
            assert len(inside) == before
        gate.resumed()
    while len(inside) == before:
        time.sleep(0.001)
    stop.set()
    thread.join(5)
    assert not thread.is_alive() and len(inside) > 40


def test_resumed_waits_until_the_step_that_waited_has_begun() -> None:
    gate, began = Gate(5.0), threading.Event()

    def one_step() -> None:
        with gate.step():
            began.set()

    with gate.pause():
        thread = threading.Thread(target=one_step)
        thread.start()
        time.sleep(0.02)
        assert not began.is_set()
    gate.resumed()
    assert began.wait(1)
    thread.join(5)


def test_waits_have_a_deadline() -> None:
    gate = Gate(0.05)
    with gate.pause():
        with pytest.raises(RuntimeError, match=r"a pause of the engine did not end within 0.05 s"), gate.step():
            pass
        with pytest.raises(RuntimeError, match="another pause"), gate.pause():
            pass
    with gate.step(), pytest.raises(RuntimeError, match="a step of the engine did not end"), gate.pause():
        pass
    with gate.step():  # a pause that was given up holds nothing
        pass


def test_a_step_that_fails_lets_go() -> None:
    gate = Gate(0.05)
    for hold in (gate.step, gate.pause):
        with pytest.raises(KeyError), hold():
            raise KeyError
    with gate.pause():
        pass


def report(total_s: float, **phases: float) -> RefitReport:
    return RefitReport(1, "peer", True, total_s, phases, 0, 0, 0)


def test_parts_of_a_pause_add_up() -> None:
    laps = Laps()
    for name in ("pause", "session", "caches", "pause"):
        time.sleep(0.002)
        laps.lap(name)
    assert set(laps.parts) == {"pause", "session", "caches"} and laps.parts["pause"] >= 0.004
    whole = {"pause": 0.1, "session": 1.0, "caches": 0.05, "resume": 0.02}
    reports = [report(0.5, agree=0.4, transfer=0.4), report(0.9, agree=0.3, begin=0.1, transfer=0.7)]
    parts = pause_parts(whole, reports, [{"agree": 0.4}, {"agree": 0.3}], {"pause": 0.01, "agree": 0.03})
    assert parts == pytest.approx(
        {"pause": 0.11, "agree": 0.03, "begin": 0.1, "transfer": 0.7, "call": 0.2, "caches": 0.05, "resume": 0.02}
    )
    assert sum(parts.values()) == pytest.approx(sum(whole.values()) + 0.04)
    alone = pause_parts(whole, reports, [], {})
    assert sum(alone.values()) == pytest.approx(sum(whole.values())) and alone["agree"] == 0.3
