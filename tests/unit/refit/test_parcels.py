"""Parcels over lanes without GPUs: who sends what in which order, that nobody waits in a circle, and equality."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.digest import Ledger, digest_on_device
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.pipeline import Tracker
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports import grouped, parcels, registry
from nemo_rl.refit.transports.inproc import Hub, InprocChannel

from .layouts import random_table, shard_out
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes

WHOLE = Region.whole


@pytest.fixture
def on_cpu(monkeypatch):
    """The mover of `nccl` over channels of CPU tensors, with small parcels."""
    monkeypatch.setitem(registry.TRANSPORTS, "nccl", replace(registry.TRANSPORTS["nccl"], unsupported=lambda *_: None))
    for name, value in (("PARCEL_BYTES", 2048), ("PACKED_BYTES", 1024), ("LEAST_BYTES", 512)):
        monkeypatch.setattr(parcels, name, value)
    monkeypatch.setattr(parcels, "LEAST_IN_PLACE", 64)
    monkeypatch.setattr(grouped, "STAGING_BYTES", 4096)
    monkeypatch.setattr(grouped, "DIGEST_BYTES", 1024)


def full_model(table, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bytes(meta.shape, meta.dtype, generator) for name, meta in table.items()}


def check(landing, full):
    for (fqn, region), storage in zip(landing.rows, landing.storage, strict=True):
        assert same_bytes(storage, full[fqn][region.slices_in(WHOLE(tuple(full[fqn].shape)))]), f"{fqn} {region}"


@pytest.mark.parametrize("seed", range(12))
def test_three_refits_are_equal(seed, on_cpu):
    rng = random.Random(seed)
    table = random_table(rng, 8)
    trainers, generators = rng.randint(1, 4), rng.randint(1, 4)
    src, dst = shard_out(rng, table, trainers), shard_out(rng, table, generators)
    full = full_model(table, seed)
    sources = [PlainSource.of(full, table, rows) for rows in src]
    landings = [
        PlainLanding(rows, [rng.choice((-1, i // 2)) for i in range(len(rows))], seed=i) for i, rows in enumerate(dst)
    ]
    options = RefitOptions("nccl", rng.choice((1024, 2048)), rng.randint(1, 3), deadline_s=20)
    sim = SimulatedWorld(sources, landings, options)
    raise_any(plans := sim.start())
    for version in range(3):
        full = full_model(table, seed + version)
        for source in sources:
            source.load(full)
            if version == 2:  # the same regions in other storage
                source.held = [replace(h, view=h.view.clone()) for h in source.held]
        for landing in landings:
            landing.scramble()
            if version == 2:
                landing.storage = [t.clone() for t in landing.storage]
        raise_any(reports := sim.refit(version))
        for landing in landings:
            check(landing, full)
        assert sum(r.bulk_bytes for r in reports.values()) == 2 * plans[0].required_bytes
        limit = max(options.bucket_bytes, 1024)
        assert all(r.staging_bytes <= 4 * limit for r in reports.values()), "what is allowed in all"


def two_sides(rng, trainers, generators, units=False):
    table = make_table({f"layers.{i}.w": ((12, 16), torch.bfloat16) for i in range(10)} | {"n": ((9,), torch.uint8)})
    src, dst = shard_out(rng, table, trainers), shard_out(rng, table, generators)
    full = full_model(table, 1)
    landings = [PlainLanding(rows, [i // 2 if units else -1 for i in range(len(rows))]) for rows in dst]
    return full, [PlainSource.of(full, table, rows) for rows in src], landings


def test_a_rank_on_both_sides_copies_within_itself(on_cpu):
    world, store, hub = World((0, 1, 2), (1, 2, 3)), dist.HashStore(), Hub()
    for seed, units in ((1, False), (2, True)):
        full, sources, landings = two_sides(random.Random(seed), 3, 3, units)
        held, taken = dict(enumerate(sources)), dict(zip(world.generators, landings, strict=True))
        sim = SimulatedWorld.__new__(SimulatedWorld)
        sim.world, sim.store = world, dist.PrefixStore(str(seed), store)
        sim.sessions = [
            RefitSession(
                rank,
                world,
                sim.store,
                RefitOptions("nccl", 1024, deadline_s=20),
                held.get(rank),
                taken.get(rank),
                channel=InprocChannel(hub, rank),
            )
            for rank in range(4)
        ]
        raise_any(sim.start())
        raise_any(sim.refit(1))
        for landing in landings:
            check(landing, full)


def test_parcels_that_went_before_are_looked_at_as_soon_as_they_landed(on_cpu, monkeypatch):
    inner, seen = Tracker.digest_in_place, []

    def looked(self):
        seen.append(bool(self.ledger.taken.all()))
        inner(self)

    monkeypatch.setattr(Tracker, "digest_in_place", looked)
    full, sources, landings = two_sides(random.Random(2), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    for version in range(3):
        landings[0].scramble()
        raise_any(sim.refit(version))
    landings[0].storage = [t.clone() for t in landings[0].storage]  # other places
    raise_any(sim.refit(3))
    check(landings[0], full)
    assert seen == [False, True, True, False]


def test_others_are_served_between_groups(on_cpu, monkeypatch):
    _, sources, landings = two_sides(random.Random(2), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    session, sends, served = sim.sessions[0], [], []
    lanes, idle = session._agreed.mover._lanes, session._link.control.idle
    exchange = lanes.exchange
    monkeypatch.setattr(lanes, "exchange", lambda *group: (sends.append(group), exchange(*group))[1])
    monkeypatch.setattr(session._link.control, "idle", lambda: (served.append(len(sends)), idle())[1])
    raise_any(sim.refit(1))
    assert len(sends) > 2 and {*range(1, len(sends) + 1)} <= {*served}


def test_what_was_looked_at_in_part_is_looked_at_again(on_cpu, monkeypatch):
    """Kernels add digests to the room of a ledger: none may be added twice."""

    def added(self, number, view, region):
        self.room(view.device)[number] += digest_on_device(view, region, self._scratch)
        self.taken[number] = True

    monkeypatch.setattr(Ledger, "take", added)
    full, sources, landings = two_sides(random.Random(2), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    raise_any(sim.refit(0))
    inner, turn = Tracker.digest, iter(range(99))
    monkeypatch.setattr(Tracker, "digest", lambda self, part: inner(self, part) if next(turn) % 2 == 0 else None)
    raise_any(sim.refit(1))
    assert next(turn) > 2
    check(landings[0], full)


def test_receivers_get_in_place_what_lies_together(on_cpu):
    """Experts in parallel to halves of every expert: strewn at the trainers, in one buffer at the generators."""
    table = make_table({f"experts.{e}.w": ((8, 16), torch.float32) for e in range(8)})
    full = full_model(table, 5)
    sources = [
        PlainSource.of(full, table, [(f, WHOLE((8, 16))) for i, f in enumerate(table) if i // 4 == rank])
        for rank in range(2)
    ]
    landings = [PlainLanding([(f, Region((0, 8 * half), (8, 8))) for f in table]) for half in range(2)]
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    for landing in landings:
        landing.declare(table)
    raise_any(sim.start())
    for landing in landings:  # after planning: where it lands is seen at the first refit
        buffer = torch.zeros(8, 8, 8)
        landing.storage = list(buffer)[::-1]  # rows in the opposite order of memory
    raise_any(reports := sim.refit(1))
    for landing in landings:
        check(landing, full)
    staging = [reports[rank].staging_bytes for rank in range(4)]
    assert staging[2:] == [0, 0], "nothing is unpacked"
    assert min(staging[:2]) > 0, "trainers pack halves of four experts"


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_a_range_are_even_and_bounded(seed):
    rng = np.random.default_rng(seed)
    num_bytes = rng.integers(1, 50, 40)
    parts = parcels._even(np.arange(40), num_bytes, 100)
    assert np.concatenate(parts).tolist() == list(range(40))
    sizes = [int(num_bytes[p].sum()) for p in parts]
    assert max(sizes) <= 100 and len(sizes) <= 2 * -(-int(num_bytes.sum()) // 100)


def random_schedule(rng):
    """What every rank of a random world posts, and the number of lanes."""
    trainers, generators, lanes = rng.randint(1, 5), rng.randint(1, 5), rng.randint(1, 3)
    shared = rng.randint(0, min(trainers, generators))
    world = World(tuple(range(trainers)), tuple(range(trainers - shared, trainers - shared + generators)))
    full_plan = random_plan(rng, world)
    orders = {}
    for src in world.trainers:
        for dst in world.generators:
            mine = np.flatnonzero((full_plan.src_rank == src) & (full_plan.dst_rank == dst))
            named = rng.sample(range(len(mine)), rng.randint(0, len(mine)))
            ends = sorted({rng.randint(1, len(named)) for _ in range(3)} | {len(named)}) if named else []
            cuts = sorted({*ends, *(rng.randint(1, len(named)) for _ in range(3))}) if named else []
            orders[src, dst] = parcels.Order(*(np.array(said, np.int64) for said in (named, cuts, ends)))
    posted = []
    for rank in range(world.size):
        rules = rules_of(rank, world, full_plan, parcels.Limits(400, 200, lanes))
        posted.append(parcels.groups_of(parcels.parcels_of(rules, {pair: orders[pair] for pair in rules.pairs})))
    return full_plan, posted, lanes


def rules_of(rank, world, copies, limits):
    mine = np.flatnonzero(copies.touches(rank))
    return parcels.Rules(world, copies, copies.sizes.prod(axis=1), mine, limits)


def random_plan(rng, world):
    table = random_table(rng, 12)
    src = shard_out(rng, table, len(world.trainers))
    dst = shard_out(rng, table, len(world.generators))
    sources = {r: Layout.from_regions(rows, table) for r, rows in zip(world.trainers, src, strict=True)}
    takers = {
        r: Declaration(Layout.from_regions(rows, table, [rng.choice((-1, i // 3)) for i in range(len(rows))]))
        for r, rows in zip(world.generators, dst, strict=True)
    }
    return plan_refit(world, sources, takers, table, bucket_bytes=64).bulk


def left_over(posted, lanes, depth):
    """Groups that never finish: ranks post in order, lanes run in order, `depth` groups are posted and not settled."""
    done = [0] * len(posted)  # groups are settled in the order of posting
    finished = [set() for _ in posted]
    met = set()
    while True:
        running = {}
        for rank, groups in enumerate(posted):
            busy = set()
            for number, group in enumerate(groups[: done[rank] + depth]):
                if number not in finished[rank] and group[0].lane not in busy:
                    running.update({(rank, p.src_rank, p.dst_rank, p.number): number for p in group})
                    busy.add(group[0].lane)
        met |= {key for key in running if all((end, *key[1:]) in running for end in key[1:3])}
        moved = False
        for rank, groups in enumerate(posted):
            for number, group in enumerate(groups):
                if number not in finished[rank] and {(rank, p.src_rank, p.dst_rank, p.number) for p in group} <= met:
                    finished[rank].add(number)
                    moved = True
            while done[rank] in finished[rank]:
                done[rank] += 1
        if not moved:
            return sum(len(groups) for groups in posted) - sum(map(len, finished))


@pytest.mark.parametrize("seed", range(40))
def test_nobody_waits_in_a_circle(seed):
    rng = random.Random(seed)
    copies, posted, lanes = random_schedule(rng)
    for rank, groups in enumerate(posted):
        numbers = np.concatenate([np.zeros(0, int), *(p.copies for group in groups for p in group)])
        mine = np.flatnonzero((copies.src_rank == rank) | (copies.dst_rank == rank))
        assert sorted(numbers.tolist()) == mine.tolist(), "every copy of the rank, once"
        for group in groups:
            assert sum(p.src_rank == rank for p in group) <= 1 and sum(p.dst_rank == rank for p in group) <= 1
    ends = {}
    for groups in posted:
        for p in (p for group in groups for p in group):
            ends.setdefault((p.src_rank, p.dst_rank, p.number), []).append((p.key, p.lane, tuple(p.copies)))
    assert all(len(set(said)) == 1 for said in ends.values()), "both ends say the same"
    for depth in (1, 2, lanes + 1):
        assert left_over(posted, lanes, depth) == 0


def test_a_rank_stays_with_a_peer():
    """Two trainers, two generators: while one pair moves its parcels, the two others move theirs."""
    table = make_table({f"{i}.w": ((4, 64), torch.uint8) for i in range(10)})
    ranks = {r: [(f, Region((0, 0), (2, 64)) if r % 2 else Region((2, 0), (2, 64))) for f in table] for r in (2, 3)}
    held = {r: [(f, WHOLE((4, 64))) for f in list(table)[5 * r : 5 * r + 5]] for r in (0, 1)}
    sources = {r: Layout.from_regions(rows, table) for r, rows in held.items()}
    takers = {r: Declaration(Layout.from_regions(rows, table)) for r, rows in ranks.items()}
    copies = plan_refit(World.of(2, 2), sources, takers, table, bucket_bytes=128).bulk
    each = parcels.Order(np.arange(5), np.arange(1, 6), np.arange(1, 6))
    rules = [rules_of(r, World.of(2, 2), copies, parcels.Limits(128, 128, 3)) for r in (0, 1)]
    found = [parcels.parcels_of(own, dict.fromkeys(own.pairs, each)) for own in rules]
    first, second = ("".join(str(p.dst_rank) for p in own) for own in found)
    assert first == "2222233333" and all(a != b for a, b in zip(first, second, strict=True))


def test_pairs_that_move_little_have_smaller_parcels():
    copies = random_plan(random.Random(1), World.of(1, 1))
    total = int(copies.sizes.prod(axis=1).sum())

    def limit(most):
        return rules_of(0, World.of(1, 1), copies, parcels.Limits(most, most, 3)).limit_of(0, 1)

    assert limit(total) == total // 4 and limit(total // 4) == total // 8 and limit(total // 64) == total // 64


@pytest.mark.parametrize(("ranks", "streams"), [((0, 1), 1), ((0, 1), 3), ((0, 1), 7), ((0, 0), 2)])
def test_a_direction_has_a_slot_more_than_lanes(ranks, streams, monkeypatch):
    monkeypatch.setitem(registry.TRANSPORTS, "nccl", replace(registry.TRANSPORTS["nccl"], unsupported=lambda *_: None))
    full, sources, landings = two_sides(random.Random(2), 1, 1)
    world, store, hub = World((ranks[0],), (ranks[1],)), dist.HashStore(), Hub()
    sim = SimulatedWorld.__new__(SimulatedWorld)
    options = RefitOptions("nccl", 1024, streams, deadline_s=20)
    sim.world, sim.store = world, store
    sim.sessions = [
        RefitSession(
            rank,
            world,
            store,
            options,
            sources[0] if rank in world.trainers else None,
            landings[0] if rank in world.generators else None,
            channel=InprocChannel(hub, rank),
        )
        for rank in range(world.size)
    ]
    raise_any(sim.start())
    for session in sim.sessions:
        mover = session._agreed.mover
        directions = 2 if world.shared else 1
        slots = mover._staging_bytes // mover._limits.packed
        assert slots > mover._num_lanes, "what is packed next waits for no lane"
        assert directions * mover._staging_bytes <= 512 << 20
        assert mover._limits.packed >= 64 << 20


@pytest.mark.parametrize(("bucket", "fits"), [(2048, True), (2049, False)])
def test_messages_beyond_the_slots_are_refused(bucket, fits, on_cpu):
    """Of 4096 bytes, each direction of a rank has a half, and two slots."""
    full, sources, landings = two_sides(random.Random(2), 2, 2)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", bucket, deadline_s=20))
    results = sim.start().values()
    assert fits or all("bucket_bytes=2049, but slots take messages of 2048 bytes at most" in str(r) for r in results)
    if fits:
        raise_any(sim.refit(1))
        for landing in landings:
            check(landing, full)
        for session in sim.sessions:
            mover = session._agreed.mover
            assert max(mover._out.staging_bytes, mover._in.staging_bytes) <= grouped.STAGING_BYTES


def test_a_rank_that_posts_in_another_order_is_a_circle():
    found = 0
    for seed in range(20):
        _, posted, lanes = random_schedule(random.Random(seed))
        posted[0].reverse()
        found += left_over(posted, 1, 1) > 0
    assert found > 5


def test_ranks_that_differ_on_the_order_are_caught_by_digests(on_cpu):
    full, sources, landings = two_sides(random.Random(4), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    mover = sim.sessions[0]._agreed.mover
    inner = mover._lanes.exchange

    def swapped(lane, sends, recvs, end, look):
        for post in sends:
            post.buffer.copy_(post.buffer.flip(0))
        return inner(lane, sends, recvs, end, look)

    mover._lanes.exchange = swapped
    results = sim.refit(1)
    assert "VerificationError" in {type(r).__name__ for r in results.values()} and landings[0].version == -1


def test_a_silent_trainer_is_named_with_round_and_parameter(on_cpu):
    full, sources, landings = two_sides(random.Random(4), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=1))
    raise_any(sim.start())
    raise_any(sim.refit(1))
    sim.sessions[1]._agreed.mover.run = lambda *_: time.sleep(1.5)
    error = sim.refit(2)[2]
    assert isinstance(error, TransferError) and "receiving from trainer 1 (rank 1) in round" in str(error)
    assert "layers." in str(error) and landings[0].version == 1 and landings[0].rejected


def test_a_trainer_that_does_not_say_where_its_copies_lie_is_named(on_cpu):
    """By the generator that waits for it, before another trainer reports the generator that it waits for."""
    full, sources, landings = two_sides(random.Random(4), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=1))
    raise_any(sim.start())
    sim.sessions[1]._agreed.mover.run = lambda *_: time.sleep(1.5)
    errors = sim.refit(1)
    assert all("for trainer 1 (rank 1)" in str(errors[rank]) for rank in (0, 2))
    assert landings[0].version == -1 and landings[0].rejected


def test_a_peer_that_does_not_connect_is_named_with_the_parcel(on_cpu):
    _, sources, landings = two_sides(random.Random(4), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=1))
    raise_any(sim.start())

    left = []

    def exchange(lane, sends, recvs, end, look):
        left.append(end - time.monotonic())
        raise TimeoutError("connecting lane 0 took longer than 1 s")

    sim.sessions[1]._agreed.mover._lanes.exchange = exchange
    error = sim.refit(1)[1]
    assert 0 < left[0] < 0.9, "what is left of the transfer's deadline"
    assert isinstance(error, TransferError) and "receiving from trainer 0 (rank 0) in round" in str(error)
    assert "connecting lane 0" in str(error) and "layers." in str(error)


def test_who_waits_for_a_peer_to_connect_hears_why_it_does_not(on_cpu):
    _, sources, landings = two_sides(random.Random(4), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())

    def exchange(lane, sends, recvs, end, look):
        while True:
            look()
            time.sleep(0.01)

    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    sim.sessions[0]._agreed.mover._fit = out_of_memory
    sim.sessions[1]._agreed.mover._lanes.exchange = exchange
    started = time.monotonic()
    errors = sim.refit(1)
    assert "out of memory" in str(errors[0]) and "out of memory" in str(errors[1])
    assert time.monotonic() - started < 10 and landings[0].version == -1


def test_a_look_that_fails_while_a_peer_is_waited_for_is_not_blamed_on_the_peer(on_cpu):
    _, sources, landings = two_sides(random.Random(4), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    raise_any(sim.refit(1))
    lanes, verifier = sim.sessions[0]._agreed.mover._lanes, sim.sessions[0]._agreed.verifier
    inner = lanes.exchange

    def exchange(lane, sends, recvs, end, look):
        look()
        return inner(lane, sends, recvs, end, look)

    def out_of_memory(*_):
        raise RuntimeError("CUDA out of memory")

    lanes.exchange, verifier.look = exchange, out_of_memory
    error = sim.refit(2)[0]
    assert isinstance(error, TransferError) and "RuntimeError: CUDA out of memory" in str(error)
    assert "sending to" not in str(error) and "alive" not in str(error)


@pytest.mark.parametrize(("transport", "first"), [("nccl", "send"), ("gloo", "look")])
def test_bytes_are_on_their_way_before_sources_are_looked_at_where_ranks_look_meanwhile(on_cpu, transport, first):
    _, sources, landings = two_sides(random.Random(4), 1, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions(transport, 1024, deadline_s=20))
    raise_any(sim.start())
    raise_any(sim.refit(1))
    channel, verifier, seen = sim.sessions[0]._link.channel, sim.sessions[0]._agreed.verifier, []
    send, look = channel.send, verifier.look
    channel.send = lambda *message: (seen.append("send"), send(*message))[1]
    verifier.look = lambda holdings: (seen.append("look"), look(holdings))[1]
    raise_any(sim.refit(2))
    assert seen[0] == first and seen.count("look") == 2 and "send" in seen


def through(exchange, *posts):
    flight = exchange(*posts)
    flight.done = lambda: True
    return flight


@pytest.mark.parametrize("late", [True, False])
def test_the_host_is_a_few_groups_ahead_of_the_device(late, on_cpu, monkeypatch):
    """Where a peer died, it ends at the deadline and not in the driver; elsewhere, it looks on until there is room."""
    monkeypatch.setattr(grouped, "MOST_RUNNING", 2)
    _, sources, landings = two_sides(random.Random(4), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=2))
    raise_any(sim.start())
    *others, lanes = (session._agreed.mover._lanes for session in sim.sessions)
    inner, looks = lanes.exchange, []
    for other in others:
        other.exchange = partial(through, other.exchange)

    def exchange(*posts):
        flight, number = inner(*posts), len(looks)
        looks.append(0)

        def done():
            looks[number] += 1
            return not late and looks[number] > 5

        flight.done = done
        return flight

    lanes.exchange = exchange
    result = sim.refit(1)[2]
    if late:
        assert isinstance(result, TransferError) and "was not done within the deadline" in str(result)
        assert "receiving from trainer" in str(result) and len(looks) == 3
    else:
        assert landings[0].version == 1 and len(looks) > 4
        assert looks == [6] * (len(looks) - 2) + [0, 0]


def test_the_first_parcel_that_is_late_is_named(on_cpu):
    """As on GPUs, where the host posts everything and waits at the end."""
    _, sources, landings = two_sides(random.Random(4), 2, 1)
    sim = SimulatedWorld(sources, landings, RefitOptions("nccl", 1024, deadline_s=3))
    raise_any(sim.start())
    lanes = sim.sessions[2]._agreed.mover._lanes
    inner, flights = lanes.exchange, []

    def exchange(*posts):
        flights.append(inner(*posts))
        late = len(flights) > 1
        flights[-1].done = lambda: not late
        return flights[-1]

    def finish(end, look):
        look()
        raise TimeoutError("work on the device was not done within the deadline")

    lanes.exchange, lanes.finish = exchange, finish
    error = sim.refit(1)[2]
    assert isinstance(error, TransferError) and f"1 of {len(flights)} groups were" in str(error)
    assert "receiving from trainer" in str(error) and "layers." in str(error) and "remake" in str(error)
