"""Who moves what in which step: each copy once, in an order that pairs ranks, with no wait that goes in a circle."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_rl.refit.transports import carry
from nemo_rl.refit.transports.carry import Carrier
from nemo_rl.refit.transports.peer import _staged
from nemo_rl.refit.transports.steps import MOST_STEPS, Schedule, _cut

from .test_relay import case

STEP_BYTES = 1024


class Counters:
    """A board of one process: what every rank said, by lane."""

    def __init__(self):
        self.said = {}

    def of(self, rank):
        board = Counters()
        board.said, board.rank = self.said, rank
        return board

    def post(self, value, lane=0):
        assert value >= self.said.get((self.rank, lane), 0)
        self.said[self.rank, lane] = value

    def seen(self, rank, lane=0):
        return self.said.get((rank, lane), 0)

    def until(self, done, awaited, phase, end):
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(phase)
            time.sleep(0)


def together(calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def schedules(written, *args, **kwargs):
    plan, layouts, relay = case(*args, **kwargs)
    staged = _staged(plan.bulk, layouts)
    given = relay.applied(plan.bulk)
    return plan, given, staged, Schedule.of(given, staged, relay, set(layouts) if written else set(), STEP_BYTES)


CASES = [
    ((2, 1, 2, 1), {}),
    ((4, 1, 4, 1), {}),
    ((1, 1, 1, 3), {}),
    ((2, 1, 2, 3), {}),
    ((2, 2, 2, 2), {"units": True}),
    ((2, 1, 2, 1), {"shared": (1,)}),
]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("args", "kwargs"), CASES)
def test_every_copy_is_moved_once_by_one_end(args, kwargs, written):
    _, given, staged, schedule = schedules(written, *args, **kwargs)
    moved = np.concatenate([b.indices for b in schedule.batches])
    assert sorted(moved.tolist()) == np.flatnonzero(~staged).tolist() and len(moved)
    for batch in schedule.batches:
        assert set(given.src_rank[batch.indices]) == {batch.giver}
        assert set(given.dst_rank[batch.indices]) == {batch.taker}
        assert schedule.mover(batch) == (batch.giver if written else batch.taker)
        assert 0 <= batch.step < schedule.num_steps[batch.taker]


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_paired_at_every_turn(size, written):
    """As many trainers as generators, all of which have to do with each other: one peer a rank at a time."""
    _, _, _, schedule = schedules(written, size, 1, size, 1)
    first = {}
    for batch in schedule.batches:
        first.setdefault(batch.turn[0], set()).add((batch.giver, batch.taker))
    assert len(first) == size
    for pairs in first.values():
        assert len(pairs) == len({g for g, _ in pairs}) == len({t for _, t in pairs}) == size
    assert max(schedule.num_steps.values()) <= MOST_STEPS * size + 1


def test_only_the_last_steps_are_smaller():
    """What is left to digest when the last one landed is little, and no step is worth less than telling of it."""
    group, num_bytes = np.repeat([0, 1], 32 * MOST_STEPS), np.full(64 * MOST_STEPS, STEP_BYTES)
    sizes = np.bincount(_cut(group, num_bytes, STEP_BYTES), num_bytes) // STEP_BYTES
    assert sizes.tolist() == [32] * (2 * MOST_STEPS - 1) + [24, 6, 2]
    few = np.bincount(_cut(group[-8:], num_bytes[-8:], STEP_BYTES), num_bytes[-8:]) // STEP_BYTES
    assert few.tolist() == [1] * 8


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("args", "kwargs"), CASES)
def test_all_steps_land_once_those_of_a_mover_in_order_refit_after_refit(args, kwargs, written):
    """Carriers of all ranks on one thread, in turns; a giver that forwards has what it gives."""
    plan, _, _, schedule = schedules(written, *args, **kwargs)
    counters, ranks = Counters(), range(plan.world.size)
    carriers = [Carrier(counters.of(rank), schedule, rank) for rank in ranks]
    for _ in range(3):
        landed = {rank: [] for rank in ranks}
        parts = [set() for _ in ranks]

        def begin(batch, landed=landed, parts=parts):
            if batch.giver not in plan.world.trainers:
                held = parts[batch.giver]
                givers = {b.giver for b in schedule.batches if (b.taker, b.step) == (batch.giver, batch.step)}
                assert {(batch.step, giver) for giver in givers} <= held, "a forwarder has the step that it gives"
            parts[batch.taker].add((batch.step, batch.giver))

        def refit(rank, begin=begin, landed=landed):
            starts = [lambda b=b: begin(b) for b in schedule.moved_by(rank)]
            end = time.monotonic() + 10
            carriers[rank].run(starts, lambda: lambda: True, landed[rank].append, lambda: None, end)

        together([lambda rank=rank: refit(rank) for rank in ranks])
        for rank in ranks:
            assert sorted(landed[rank]) == list(range(schedule.num_steps.get(rank, 0)))
            for mover in schedule.movers_to(rank):
                own = {b.step for b in schedule.batches if b.taker == rank and schedule.mover(b) == mover}
                steps = [step for step in landed[rank] if step in own]
                assert steps == sorted(steps)


def test_a_taker_waits_for_all_of_its_movers():
    """What the others move is looked at meanwhile, as soon as it landed."""
    plan, _, _, schedule = schedules(True, 2, 1, 2, 1)
    counters, landed = Counters(), []
    assert schedule.movers_to(2) == [0, 1]

    def refit(rank):  # trainer 1 moves nothing
        starts = [lambda: None for _ in schedule.moved_by(rank)]
        carrier = Carrier(counters.of(rank), schedule, rank)
        carrier.run(starts, lambda: lambda: True, landed.append, lambda: None, time.monotonic() + 0.2)

    refit(0)
    with pytest.raises(TimeoutError):
        refit(2)
    assert landed == [b.step for b in schedule.batches if (b.giver, b.taker) == (0, 2)] and landed
    assert len(landed) < schedule.num_steps[2]


def test_what_is_said_at_the_last_moment_lands_too():
    _, _, _, schedule = schedules(True, 1, 1, 1, 1)
    counters, landed = Counters(), []
    last = schedule.num_steps[1]

    def idle():  # the mover ends behind this rank's look at what landed
        counters.of(0).post(last, 1)

    Carrier(counters.of(1), schedule, 1).run([], lambda: lambda: True, landed.append, idle, time.monotonic() + 5)
    assert landed == list(range(last))


def test_a_forwarder_that_is_late_holds_up_who_takes_from_it():
    """The first replica has only some steps; the others get no more than these."""
    plan, _, _, schedule = schedules(True, 1, 1, 1, 3)
    counters, started = Counters(), []
    mine = schedule.moved_by(2)
    assert [b.giver for b in mine] == [2] * len(mine) and len(mine) > 2
    counters.of(1).post(0, 2)
    for mover in schedule.movers_to(2):
        counters.of(mover).post(2, 2)
    starts = [lambda n=n: started.append(n) for n in range(len(mine))]
    with pytest.raises(TimeoutError):
        Carrier(counters.of(2), schedule, 2).run(
            starts, lambda: lambda: True, lambda step: None, lambda: None, time.monotonic() + 0.2
        )
    assert started == [0, 1]


def test_nothing_is_started_behind_the_deadline():
    """A process that was stopped, and goes on, does not write into engines that others gave up."""
    _, _, _, schedule = schedules(True, 1, 1, 1, 1)
    counters, started = Counters(), []
    count, end = len(schedule.moved_by(0)), time.monotonic() + 0.3
    assert count > 2

    def start(number):
        started.append(number)
        time.sleep(0.4 if number == 1 else 0)

    starts = [lambda n=n: start(n) for n in range(count)]
    with pytest.raises(TimeoutError):
        Carrier(counters.of(0), schedule, 0).run(starts, lambda: lambda: True, lambda step: None, lambda: None, end)
    assert started == [0, 1]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_link_has_enough_to_do_before_a_rank_does_something_else(at_once):
    """Where starting a batch moves it, there is time for that between two of them."""
    _, _, _, schedule = schedules(True, 1, 1, 1, 1)
    counters, done = Counters(), []
    count = len(schedule.moved_by(0))
    assert count > carry._ENOUGH > 1
    starts = [lambda n=n: done.append(n) for n in range(count)]

    def mark():
        looks = iter(range(50))
        return lambda: at_once or next(looks) > 9

    def idle():
        done.append("idle")

    Carrier(counters.of(0), schedule, 0).run(starts, mark, lambda step: None, idle, time.monotonic() + 10)
    assert [n for n in done if n != "idle"] == list(range(count))
    assert done.index("idle") == (1 if at_once else carry._ENOUGH)
    assert not at_once or done[: 2 * count] == [x for n in range(count) for x in (n, "idle")]


def test_the_end_of_the_last_step_is_looked_for_without_a_pause(monkeypatch):
    """Whoever pauses between two looks asks once more for each batch before the last one, and once for that."""
    monkeypatch.setattr(carry, "_CLOSELY_S", 10.0)  # also on a busy host
    _, _, _, schedule = schedules(True, 1, 1, 1, 1)
    counters, paused = Counters(), []
    count = len(schedule.moved_by(0))
    assert count > 2
    board = counters.of(0)

    def until(done, awaited, phase, end):
        while not done():
            paused.append(len(carrier._running))
            assert time.monotonic() < end

    def mark():
        looks = iter(range(20))
        return lambda: next(looks) == 19

    board.until = until
    carrier = Carrier(board, schedule, 0)
    carrier.run([lambda: None] * count, mark, lambda step: None, lambda: None, time.monotonic() + 10)
    assert paused and min(paused) > 1, "only with more than the last batch left"
    assert counters.seen(0, 1) == schedule.num_steps[1]


def test_looks_without_a_pause_end(monkeypatch):
    """A last step that takes long costs others little of the processor."""
    ticks = itertools.count()
    monkeypatch.setattr(carry, "time", SimpleNamespace(monotonic=lambda: 1e-5 * next(ticks)))
    _, _, _, schedule = schedules(True, 1, 1, 1, 1)
    counters, looks = Counters(), []
    counters.of(0).post(schedule.num_steps[1] - 1, 1)
    board = counters.of(1)

    def until(done, awaited, phase, end):
        while len(looks) < 1000:
            before, over = len(looks), done()
            assert not over
            turns.append(len(looks) - before)

    board.until, turns = until, []
    carrier = Carrier(board, schedule, 1)
    carrier.run([], lambda: lambda: True, lambda step: None, lambda: looks.append(1), 0.0)
    assert max(turns) > 1 and set(turns[-100:]) == {1}


def test_a_step_that_several_move_lands_when_all_have_counted_it():
    """Each mover alone, then both: the forwarder's and the source's part of one step."""
    plan, _, _, schedule = schedules(True, 2, 1, 2, 3)
    taker, step, movers = next(
        (b.taker, b.step, {schedule.mover(c) for c in schedule.batches if (c.taker, c.step) == (b.taker, b.step)})
        for b in schedule.batches
        if len({schedule.mover(c) for c in schedule.batches if (c.taker, c.step) == (b.taker, b.step)}) > 1
    )
    counters, landed = Counters(), []

    def look():
        with pytest.raises(TimeoutError):
            carrier = Carrier(counters.of(taker), schedule, taker)
            starts = [lambda: None for _ in schedule.moved_by(taker)]
            carrier.run(starts, lambda: lambda: False, landed.append, lambda: None, time.monotonic() + 0.05)

    for mover in sorted(movers):
        look()
        assert step not in landed
        counters.of(mover).post(step + 1, taker)
    look()
    assert step in landed
