"""Replicas that read from each other over mapped memory: equality, wrong bytes, a forwarder that dies."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import RefitError, VerificationError
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports.host_memory import HostMemory

from .forked import Forked
from .planted import model
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, same_bytes

TABLE = make_table(
    {f"layers.{i}.{n}": ((24, 16), torch.bfloat16) for i in range(6) for n in ("up", "down")}
    | {"embed": ((50, 16), torch.float32), "norm": ((16,), torch.float32)}
)
OPTIONS = RefitOptions(transport="peer", bucket_bytes=1024, deadline_s=10)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(HostMemory, "step_bytes", 1024)


def shard(meta, index, count, axis):
    if len(meta.shape) == 1:
        return Region.whole(meta.shape)
    offsets, sizes = [0, 0], list(meta.shape)
    sizes[axis] //= count
    offsets[axis] = index * sizes[axis]
    return Region(tuple(offsets), tuple(sizes))


def rows(index, count, axis):
    return [(f, shard(m, index, count, axis)) for f, m in TABLE.items()]


def world_of(trainers, tp, replicas, units=None):
    full = model(TABLE)
    sources = [PlainSource.of(full, TABLE, rows(i, trainers, 0)) for i in range(trainers)]
    landings = [PlainLanding(rows(i % tp, tp, 1), units, seed=i) for i in range(tp * replicas)]
    sim = SimulatedWorld(sources, landings, OPTIONS)
    raise_any(sim.start())
    return sim, sources, landings


def wrong_rows(landing, full):
    return [
        (f, r)
        for (f, r), t in zip(landing.rows, landing.storage, strict=True)
        if not same_bytes(t, full[f][r.slices_in(Region.whole(TABLE[f].shape))])
    ]


def refits(sim, sources, landings, versions=(1, 2, 3)):
    for version in versions:
        full = model(TABLE, seed=version)
        for source in sources:
            source.load(full)
        for landing in landings:
            landing.scramble()
            assert wrong_rows(landing, full)
        raise_any(reports := sim.refit(version))
        assert not any(wrong_rows(landing, full) for landing in landings)
    return reports


UNITS = [0 if f.startswith("layers.0") else 1 if f.startswith("layers.3") else -1 for f in TABLE]


@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize(
    ("trainers", "tp", "replicas", "units"), [(1, 1, 3, None), (2, 1, 5, None), (1, 2, 3, None), (2, 2, 3, UNITS)]
)
def test_every_replica_gets_the_trainers_bytes(trainers, tp, replicas, units, puts, monkeypatch):
    monkeypatch.setattr(HostMemory, "puts", puts)
    sim, sources, landings = world_of(trainers, tp, replicas, units)
    chained = sorted(sim.sessions[0]._agreed.mover._relay.num_steps)
    assert chained == list(sim.world.generators)
    reports = refits(sim, sources, landings)
    whole = sum(m.num_bytes for m in TABLE.values())
    received = sum(r.bulk_bytes for r in reports.values()) // 2
    assert received == sim.sessions[0]._agreed.plan.bulk_bytes
    if units is None:
        assert all(reports[r].bulk_bytes <= (1.1 if tp == 1 else 1.4) * whole for r in sim.world.trainers)


@pytest.mark.parametrize("puts", [False, True])
def test_storage_of_a_forwarder_that_moved_is_shown_again(puts, monkeypatch):
    monkeypatch.setattr(HostMemory, "puts", puts)
    sim, sources, landings = world_of(1, 1, 3)
    refits(sim, sources, landings, (1, 2))
    windows = sim.sessions[0 if puts else 2]._agreed.mover._windows  # of who moves bytes with it
    seen = windows.ends[1, "landing"]
    old, landings[0].storage = landings[0].storage, [t.clone() for t in landings[0].storage]
    for tensor in old:
        tensor.view(-1).view(torch.uint8).zero_()
    refits(sim, sources, landings, (3, 4))
    assert windows.ends[1, "landing"] is not seen


def test_replicas_whose_memory_cannot_be_shown_do_not_forward(caplog):
    sim, sources, landings = world_of(1, 1, 4)
    movers = [s._agreed.mover for s in sim.sessions]

    def refuse(views):
        raise OSError("memory without a handle")

    movers[1]._memory.show = refuse
    reports = refits(sim, sources, landings, (1, 2))
    assert [sorted(m._hears) for m in movers] == [[], [0], [0], [2], [3]] and sorted(movers[0]._tells) == [1, 2]
    assert "generator 0 (rank 1) neither forwards nor is written to: memory without a handle" in caplog.text
    assert reports[1].bulk_bytes < 1.1 * reports[4].bulk_bytes


def test_wrong_bytes_of_a_forwarder_are_caught_where_they_land():
    """A byte is wrong at the first replica from the step in which it landed, and right again once others read it."""
    sim, _, landings = world_of(1, 1, 3)
    mover, place = sim.sessions[1]._agreed.mover, list(TABLE).index("layers.2.up")
    copies = mover._plan.bulk
    row = np.flatnonzero((copies.dst_rank == 1) & (copies.dst_row == place))[0]
    damaged = landings[0].storage[place].view(-1).view(torch.uint8)
    mark, collect, steps, flips = mover._memory.mark, mover._control.collect, iter(range(99)), []

    def flip():
        damaged[77] ^= 4
        flips.append(damaged[77].item())

    def mark_and_damage():
        if next(steps) == mover._relay.step[row]:
            flip()
        return mark()

    def collect_and_repair(ticket, phase, ranks):
        answer = collect(ticket, phase, ranks)
        if len(flips) == 1:
            flip()
        return answer

    mover._memory.mark, mover._control.collect = mark_and_damage, collect_and_repair
    results = sim.refit(1)
    assert len(flips) == 2 and 0 < mover._relay.step[row] < mover._relay.num_steps[1] - 1
    assert not wrong_rows(landings[0], model(TABLE)), "the forwarder itself is right"
    for rank in (2, 3):
        assert isinstance(results[rank], VerificationError) and "1 pieces differ: layers.2.up" in str(results[rank])
    assert all(isinstance(r, RefitError) for r in results.values())
    assert [landing.version for landing in landings] == [-1] * 3 and all(landing.rejected for landing in landings)


def dies_in_the_middle(mover):
    steps = iter(range(99))

    def mark():
        if next(steps) == mover._relay.num_steps[mover._rank] // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda: True

    mover._memory.mark = mark


def one_rank(rank, world, port, victim, versions):
    """Three refits; the victim dies in the middle of the steps of the last one. Exit 7: a named error came in time."""
    source = PlainSource.of(model(TABLE), TABLE, rows(0, 1, 0)) if rank == 0 else None
    landing = PlainLanding(rows(0, 1, 0), seed=rank) if rank else None
    session = RefitSession(rank, world, ("127.0.0.1", port), OPTIONS, source, landing)
    session.connect()
    session.plan()
    for version in range(1, versions + 1):
        if rank == victim and version == versions:
            dies_in_the_middle(session._agreed.mover)
        full = model(TABLE, seed=version)
        if source:
            source.load(full)
        if landing:
            landing.scramble()
        started = time.monotonic()
        try:
            session.refit(version)
        except RefitError as error:
            named = f"generator {victim - 1} (rank {victim})" in str(error)
            kept = landing is None or (landing.version == version - 1 and bool(landing.rejected))
            return 7 if named and kept and time.monotonic() - started < 5 else 8
        if landing and wrong_rows(landing, full):
            return 9
    return 0


@pytest.mark.parametrize("victim", [1, 2, None])
def test_a_forwarder_that_dies_ends_the_others_at_once(victim):
    ranks = Forked(range(4), lambda rank, port: one_rank(rank, World.of(1, 3), port, victim, 3))
    codes = list(ranks.codes().values())
    expected = [0] * 4 if victim is None else [-signal.SIGKILL if rank == victim else 7 for rank in range(4)]
    assert codes == expected


def test_a_forwarder_that_hangs_is_named_at_the_deadline(monkeypatch):
    monkeypatch.setitem(globals(), "OPTIONS", RefitOptions(transport="peer", bucket_bytes=1024, deadline_s=2))
    sim, _, landings = world_of(1, 1, 2)
    sim.sessions[1]._agreed.mover._memory.mark = lambda: lambda: False
    results = sim.refit(1)
    assert all(isinstance(r, RefitError) for r in results.values())
    assert "waited until the deadline for generator 0 (rank 1), which said 0 of 1" in str(results[2])
    assert all(landing.rejected for landing in landings)
