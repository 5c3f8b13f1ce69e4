"""Replicas that read from each other over mapped memory: equality, wrong bytes, a forwarder that dies."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

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
def test_messages_may_be_longer_than_steps(puts, monkeypatch):
    monkeypatch.setattr(HostMemory, "puts", puts)
    monkeypatch.setattr(HostMemory, "step_bytes", 256)
    sim, sources, landings = world_of(1, 1, 3)
    assert sim.sessions[0]._agreed.plan.bulk.messages[:, 5].max() > 2 * 256
    refits(sim, sources, landings)


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
    mark, run, steps, flips = mover._memory.mark, mover.run, iter(range(99)), []

    def flip():
        damaged[77] ^= 4
        flips.append(damaged[77].item())

    def mark_and_damage():
        if next(steps) == mover._relay.step[row]:
            flip()
        return mark()

    def run_and_repair(*args):
        traffic = run(*args)  # returns when others have read all that they read here
        flip()
        return traffic

    mover._memory.mark, mover.run = mark_and_damage, run_and_repair
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


COMES = 4  # of the process that comes for a dead rank


class OneRank:
    """A process of 1 trainer -> 3 replicas; plays a session in which the victim dies, and one without it after that."""

    def __init__(self, rank, port):
        self.rank, world = rank, World.of(1, 3)
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        self.source = PlainSource.of(model(TABLE), TABLE, rows(0, 1, 0)) if rank == 0 else None
        self.landing = PlainLanding(rows(0, 1, 0), seed=rank) if rank else None
        self.make = lambda name: RefitSession(
            rank, world, dist.PrefixStore(name, self.store), OPTIONS, self.source, self.landing
        )

    def play(self, name, versions, victim=None):
        """Refits, the last of which ends by the death of `victim`, if any. Raises AssertionError."""
        session = self.make(name)
        session.connect()
        session.plan()
        for version in versions:
            if victim == self.rank and version == versions[-1]:
                dies_in_the_middle(session._agreed.mover)
            full, started = model(TABLE, seed=version), time.monotonic()
            if self.source:
                self.source.load(full)
            if self.landing:
                self.landing.scramble()
            try:
                session.refit(version)
            except RefitError as error:
                assert version == versions[-1] and f"generator {victim - 1} (rank {victim})" in str(error)
                assert time.monotonic() - started < 5, "long before the deadline"
                assert not self.landing or (self.landing.version == version - 1 and self.landing.rejected)
                return
            assert not self.landing or not wrong_rows(self.landing, full)
        assert victim is None

    def meet(self):
        self.store.add("meet", 1)
        while self.store.add("meet", 0) < 4:
            time.sleep(0.01)


@pytest.mark.parametrize("victim", [1, 2])
def test_a_forwarder_that_dies_ends_the_others_at_once_and_the_next_session_works(victim):
    def work(number, port):
        one = OneRank(victim if number == COMES else number, port)
        if number != COMES:
            one.play("first", (1, 2, 3), victim)
        one.meet()
        one.play("second", (4, 5))

    codes = Forked((*range(4), COMES), work).codes()
    assert codes == {number: -signal.SIGKILL if number == victim else 0 for number in (*range(4), COMES)}


def test_a_forwarder_that_hangs_is_named_at_the_deadline(monkeypatch):
    monkeypatch.setitem(globals(), "OPTIONS", RefitOptions(transport="peer", bucket_bytes=1024, deadline_s=2))
    sim, _, landings = world_of(1, 1, 2)
    sim.sessions[1]._agreed.mover._memory.mark = lambda: lambda: False
    results = sim.refit(1)
    assert all(isinstance(r, RefitError) for r in results.values())
    assert "waited until the deadline for generator 0 (rank 1), which said 0 of 1" in str(results[2])
    assert all(landing.rejected for landing in landings)
