"""Ranks of a benchmark meet, and one that fails holds nobody."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.trainer import families
from nemo_rl.trainer.model import Parallel
from scripts.bench import ceilings
from scripts.bench.cases import Case, Engines
from scripts.bench.model import DTYPE, BenchLanding, BenchSource, Store, generator_rows, trainer_rows
from scripts.bench.rank import Held, Meeting


def together(size: int, act: Any) -> list[Any]:
    """What `act(rank, store)` returns or raises in a thread each."""
    store, found = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = act(rank, store)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_all_say_and_hear_the_same() -> None:
    def act(rank: int, store: dist.Store) -> Any:
        meeting = Meeting(store, rank, 3, 10)
        return [meeting.say("first", rank), meeting.say("second", {"rank": rank})]

    assert together(3, act) == [[[0, 1, 2], [{"rank": 0}, {"rank": 1}, {"rank": 2}]]] * 3


def test_a_failure_reaches_those_who_wait() -> None:
    def act(rank: int, store: dist.Store) -> Any:
        meeting = Meeting(store, rank, 2, 10)
        if rank == 1:
            meeting.fail("planted")
            return None
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="another rank failed: rank 1: planted"):
            meeting.meet("refit")
        return time.monotonic() - started

    waited, _ = together(2, act)
    assert waited < 5


def test_nobody_waits_for_ever() -> None:
    with pytest.raises(TimeoutError, match="rank 0 waited 0.2 s for the others at refit 3"):
        Meeting(dist.HashStore(), 0, 2, 0.2).meet("refit 3")


def test_ranks_that_a_failure_left_apart_go_on_together() -> None:
    def act(rank: int, store: dist.Store) -> Any:
        case = Case("c", "small dense", Parallel(1), Engines(1), ())
        held = Held(case, World.of(1, 1), None, None, {}, {}, weights=3 + rank, version=20 - rank)
        held.agree(Meeting(store, rank, 2, 10))
        return held.weights, held.version

    assert together(2, act) == [(4, 20), (4, 20)]


def test_weights_differ_from_one_refit_to_the_next_and_the_check_follows() -> None:
    """What was right for the old weights is wrong for the others."""
    case = Case("c", "small dense", Parallel(1), Engines(1), ())
    table, cpu = families.table(case.shape, DTYPE), torch.device("cpu")
    store = Store(cpu)
    landing = BenchLanding(table, generator_rows(case.shape, case.engines, 0, store), store)
    source = BenchSource(table, trainer_rows(case.shape, case.trainers, 0, Store(cpu)))
    trainer = Held(case, World.of(1, 1), source, None, table, {})
    generator = Held(case, World.of(1, 1), None, landing, table, {})
    norm = "model.norm.weight"
    for _ in range(2):
        trainer.renew()
        generator.renew()
        before = generator.wrong()
        assert norm in before and len(before) == len(landing.rows)
        (_, _, view) = next(row for row in source.rows if row[0] == norm)
        landing.load_misc([(norm, view)])
        assert set(before) - set(generator.wrong()) == {norm}
    assert trainer.wrong() == []


def test_ceilings_are_measured_again_by_the_same_communicator() -> None:
    world = World.of(1, 1)

    def act(rank: int, store: dist.Store) -> Any:
        groups: dict[int, Any] = {}
        found = []
        for turn in range(2):
            meeting = Meeting(dist.PrefixStore(str(turn), store), rank, 2, 10)
            line = ceilings.Line(
                rank, world, torch.device("cpu"), meeting.store, meeting.meet, meeting.say, 1 << 16, True, groups
            )
            rows = list(ceilings.measure(line))
            found.append((groups[2], [row["variant"] for row in rows], all(row["gb_per_s"] > 0 for row in rows)))
        return found[0][0] is found[1][0], found[0][1:] == found[1][1:], found[0][2]

    assert together(2, act) == [(True, True, True)] * 2
