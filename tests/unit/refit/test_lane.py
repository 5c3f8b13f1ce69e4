"""Whole tensors beside bulk: they arrive while it moves, load after it, wait for room, and end with what ends them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from nemo_rl.refit import lane
from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.errors import PlanError, RefitError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.inproc import InprocChannel
from nemo_rl.refit.transports.mover import Fact

from .planted import caught, reload, two_by_two
from .simulated import PlainLanding, make_table, raise_any, same_bytes

TABLE = make_table({f"w{i}": ((8, 64), torch.float32) for i in range(24)})
WHOLE = tuple(f"w{i}" for i in range(16))
OPTIONS = RefitOptions(deadline_s=5, bucket_bytes=2048, num_streams=1)


class Landing(PlainLanding):
    """Says whether bulk had landed when its engine was given whole tensors."""

    def load_misc(self, tensors):
        before = [t.clone() for t in self.bulk()]
        self.seen = []
        for name, tensor in tensors:
            self.seen.append(name)
            time.sleep(0.002)
            super().load_misc([(name, tensor)])
        self.landed_before = all(same_bytes(a, b) for a, b in zip(before, self.bulk(), strict=True))

    def bulk(self):
        return [t for (name, _), t in zip(self.rows, self.storage, strict=True) if name not in self.misc]


def check(landings, full):
    for landing in landings:
        assert landing.landed_before and landing.seen == list(WHOLE)
        assert all(same_bytes(landing.whole[name], full[name]) for name in WHOLE)
        for (name, region), held in zip(landing.rows, landing.storage, strict=True):
            if name not in WHOLE:
                assert same_bytes(held, full[name][region.slices_in(Region.whole(TABLE[name].shape))])


def test_whole_tensors_arrive_while_bulk_moves_and_load_after_it():
    """Generators take no bulk byte before whole tensors are on their way: in sequence, they would wait forever."""
    arrived = threading.Event()

    class Ordered(InprocChannel):
        def broadcast(self, buffer, root, ranks):
            pending = super().broadcast(buffer, root, ranks)
            if self._rank != root:
                arrived.set()
            return pending

        def recv(self, buffer, src, tag):
            assert tag < 0 or self._rank < 2 or arrived.wait(3), "bulk came first"
            return super().recv(buffer, src, tag)

    sim, sources, landings, full = two_by_two(lambda r, t: Ordered(t._hub, r), OPTIONS, Landing, TABLE, misc=WHOLE)
    raise_any(sim.start())
    for version in range(1, 4):
        full = reload(sources, version)
        for landing in landings:
            landing.scramble()
        raise_any(reports := sim.refit(version))
        check(landings, full)
        assert reports[2].misc_bytes >= sum(TABLE[name].num_bytes for name in WHOLE)


@pytest.mark.parametrize("verify", [True, False])
def test_whole_tensors_wait_for_bulk_that_is_broadcast_on_the_same_channel(verify):
    """Messages of equal size, which nothing but their order tells apart."""
    options = RefitOptions("golden", deadline_s=5, bucket_bytes=2048, verify=verify)
    sim, sources, landings, _ = two_by_two(options=options, landing=Landing, table=TABLE, misc=WHOLE)
    raise_any(sim.start())
    for version in range(1, 6):
        full = reload(sources, version)
        raise_any(sim.refit(version))
        check(landings, full)


def test_no_more_buffers_wait_for_an_engine_than_there_is_room_for():
    sim, _, landings, full = two_by_two(options=OPTIONS, landing=Landing, table=TABLE, misc=WHOLE)
    raise_any(plans := sim.start())
    size = max(b.num_bytes for b in plans[0].misc_buffers)
    assert len(plans[0].misc_buffers) == 16, "more than the room"
    raise_any(reports := sim.refit(1))
    check(landings, full)
    room = 2 * OPTIONS.num_streams
    assert all(0 < reports[r].staging_bytes <= (room + 2 + 2 * OPTIONS.num_streams) * size for r in (2, 3))


@pytest.mark.parametrize("after", [0, 3])
def test_an_engine_that_fails_ends_the_lanes_of_all_ranks(after):
    class Broken(Landing):
        def load_misc(self, tensors):
            for number, _ in enumerate(tensors):
                if number == after:
                    raise OSError("the engine is out of memory")

    sim, _, landings, _ = two_by_two(options=OPTIONS, landing=Broken, table=TABLE, misc=WHOLE)
    raise_any(sim.start())
    started = time.monotonic()
    caught(sim.refit(1), landings, RefitError, "the engine is out of memory")
    assert time.monotonic() - started < 2 * OPTIONS.deadline_s
    end = time.monotonic() + 3
    while (left := [t for t in threading.enumerate() if t.name == lane.THREAD]) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left, "threads end with their session"


def test_a_lane_that_fails_is_named_while_its_engine_waits():
    class Torn(InprocChannel):
        def broadcast(self, buffer, root, ranks):
            if self._rank == 3:
                raise RuntimeError("connection closed by peer")
            return super().broadcast(buffer, root, ranks)

    sim, _, landings, _ = two_by_two(lambda r, t: Torn(t._hub, r), OPTIONS, Landing, TABLE, misc=WHOLE)
    raise_any(sim.start())
    caught(sim.refit(1), landings, RefitError, "receiving whole tensors w0", "connection closed by peer")


@pytest.mark.parametrize(
    ("world", "gpus", "words"),
    [
        (World((0, 1), (1, 2)), "abc", r"trainer 1 and generator 0 \(rank 1\) cannot serve on GPUs"),
        (World.of(1, 2), "aba", "ranks 0 and 2 are on one GPU"),
        (World.of(1, 2), "abc", None),
    ],
)
def test_gpus_that_cannot_carry_whole_tensors_refuse_the_plan(world, gpus, words):
    rows = Layout.from_regions([(name, Region.whole(m.shape)) for name, m in TABLE.items()], TABLE)
    declared = {r: Declaration(rows, {"w3": "cast"}) for r in world.generators}
    plan = plan_refit(world, dict.fromkeys(world.trainers, rows), declared, TABLE)
    facts = {r: Fact("boot", "cuda", False, gpu=gpu) for r, gpu in enumerate(gpus)}
    if words is None:
        assert lane._refuse(plan, 1, facts) is None
        return
    with pytest.raises(PlanError, match=rf"1 tensors must travel whole \(w3: cast\): .*{words}"):
        lane._refuse(plan, 1, facts)
    bulk = plan_refit(world, dict.fromkeys(world.trainers, rows), {r: Declaration(rows) for r in declared}, TABLE)
    assert lane._refuse(bulk, 1, facts) is None, "nothing travels whole"
