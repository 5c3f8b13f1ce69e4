"""Who forwards what: chains among replicas, decided by bytes; every giver has what it gives, one step before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.relay import MOST_STEPS, relay_of

from .simulated import make_table

TABLE = make_table(
    {f"layers.{i}.{n}": ((32, 48), torch.bfloat16) for i in range(6) for n in ("up", "down")}
    | {"embed": ((96, 16), torch.float32), "norm": ((16,), torch.float32)}
)


def part(meta, index, count, axis=0):
    """The `index`-th of `count` equal parts along `axis`; one-dimensional tensors are whole everywhere."""
    if len(meta.shape) == 1:
        return Region.whole(meta.shape)
    offsets, sizes = [0, 0], list(meta.shape)
    sizes[axis] //= count
    offsets[axis] = index * sizes[axis]
    return Region(tuple(offsets), tuple(sizes))


def rows(index, count, axis=0):
    return [(f, part(m, index, count, axis)) for f, m in TABLE.items()]


def staged(layout, names=("layers.0.up", "layers.0.down")):
    unit = np.array([0 if layout.fqn(i) in names else -1 for i in range(len(layout))], np.int32)
    return Layout(layout.names, layout.metas, layout.tensor, layout.offsets, layout.sizes, unit)


def case(trainers, num_dp, tp, replicas, units=False, shared=()):
    """`trainers`-way shards held `num_dp` times -> `replicas` engines of `tp` ranks each."""
    parts = [Layout.from_regions(rows(i, trainers), TABLE) for i in range(trainers)]
    sources = {r: parts[r % trainers] for r in range(trainers * num_dp)}
    engine = [Layout.from_regions(rows(i, tp, axis=1), TABLE) for i in range(tp)]
    engine = [staged(lay) for lay in engine] if units else engine
    first = len(sources) - len(shared)
    layouts = {first + r: engine[r % tp] for r in range(tp * replicas)}
    world = World(tuple(sources), tuple(layouts))
    assert world.shared == tuple(shared)
    declared = {r: Declaration(lay) for r, lay in layouts.items()}
    plan = plan_refit(world, sources, declared, TABLE, bucket_bytes=1024)
    return plan, layouts, relay_of(plan, layouts, step_bytes=1024)


def sent_and_received(plan, relay):
    """Bytes out of and into each rank, counted by hand."""
    total = np.zeros((2, plan.world.size), np.int64)
    for i in range(len(plan.bulk)):
        copy = plan.copy(plan.bulk, i)
        size = int(np.prod(copy.region.sizes)) * plan.table[copy.fqn].dtype.itemsize
        if relay.giver[i] != copy.dst_rank:
            total[0, relay.giver[i]] += size
            total[1, copy.dst_rank] += size
    assert total.T.tolist() == [list(relay.wire_bytes(plan.bulk, r)) for r in range(plan.world.size)]
    return total


def check_givers(plan, layouts, relay):
    """Whatever a generator gives has landed there, in final storage, in the same step of its own."""
    copies = plan.bulk
    for i in np.flatnonzero(relay.giver != copies.src_rank).tolist():
        giver, row, region = int(relay.giver[i]), int(relay.row[i]), plan.region(copies, i)
        layout = layouts[giver]
        assert giver != copies.dst_rank[i] and layout.unit[row] == -1 and layout.unit[copies.dst_row[i]] == -1
        assert layout.fqn(row) == plan.names[copies.tensor[i]]
        region.slices_in(layout.region(row))
        landed = np.flatnonzero((copies.dst_rank == giver) & (copies.dst_row == row))
        own = [j for j in landed.tolist() if plan.region(copies, j) == region]
        assert len(own) == 1 and 0 <= relay.step[own[0]] == relay.step[i] < relay.num_steps[giver]
        assert relay.num_steps[giver] == relay.num_steps[int(copies.dst_rank[i])] <= MOST_STEPS
    forwarded = relay.giver != copies.src_rank
    edges = set(zip(relay.giver[forwarded].tolist(), copies.dst_rank[forwarded].tolist(), strict=True))
    assert len({d for _, d in edges}) == len(edges) == len({g for g, _ in edges}), "one giver, one reader"
    giver_of = {d: g for g, d in edges}
    for rank in layouts:
        for _ in layouts:
            rank = giver_of.get(rank, rank)
        assert rank not in giver_of, "every chain begins at a rank that reads from trainers"


@pytest.mark.parametrize(
    ("trainers", "num_dp", "tp", "replicas", "chains"),
    [
        (1, 1, 1, 3, 1),
        (1, 1, 1, 2, 1),
        (2, 1, 1, 3, 2),
        (2, 1, 1, 4, 2),
        (2, 1, 2, 4, 1),
        (1, 2, 1, 6, 2),
        (1, 1, 2, 2, 1),
    ],
)
def test_replicas_form_as_many_chains_as_trainers_can_feed(trainers, num_dp, tp, replicas, chains):
    plan, layouts, relay = case(trainers, num_dp, tp, replicas)
    check_givers(plan, layouts, relay)
    direct = {int(d) for d, g in zip(plan.bulk.dst_rank, relay.giver, strict=True) if g in plan.world.trainers}
    assert len(direct) == chains * tp and set(relay.num_steps) == set(layouts)
    sent, received = sent_and_received(plan, relay)
    assert sent.max() <= max(received.max(), sum(m.num_bytes for m in TABLE.values())) * 1.1
    before = np.array([plan.bulk.wire_bytes(r)[0] for r in range(plan.world.size)])
    assert sent.sum() == before.sum() and before.max() > 1.4 * sent.max()
    assert "gets from generator 0" in relay.describe(plan.world, plan.bulk)


@pytest.mark.parametrize(
    ("trainers", "num_dp", "tp", "replicas"), [(1, 1, 1, 1), (2, 1, 1, 2), (1, 1, 2, 1), (2, 2, 2, 2), (4, 1, 1, 3)]
)
def test_nobody_forwards_where_trainers_can_feed_all(trainers, num_dp, tp, replicas):
    plan, _, relay = case(trainers, num_dp, tp, replicas)
    assert (relay.giver == plan.bulk.src_rank).all() and (relay.row == plan.bulk.src_row).all()
    assert (relay.step == -1).all() and not relay.num_steps
    assert relay.describe(plan.world, plan.bulk) == "nobody forwards"


def test_what_is_staged_comes_from_trainers():
    plan, layouts, relay = case(1, 1, 1, 3, units=True)
    check_givers(plan, layouts, relay)
    units = np.array([layouts[d].unit[r] for d, r in zip(plan.bulk.dst_rank, plan.bulk.dst_row, strict=True)])
    assert (units >= 0).any() and (relay.giver[units >= 0] == 0).all() and (relay.step[units >= 0] == -1).all()
    assert (relay.giver != plan.bulk.src_rank).sum() == 2 * (units[plan.bulk.dst_rank == 1] == -1).sum()


def test_ranks_that_train_too_neither_forward_nor_are_forwarded_to():
    plan, layouts, relay = case(1, 1, 1, 4, shared=(0,))
    check_givers(plan, layouts, relay)
    assert 0 not in relay.num_steps and set(relay.num_steps) == {1, 2, 3}


def test_steps_are_of_about_equal_bytes_and_whole_messages():
    plan, _, relay = case(1, 1, 1, 3)
    copies, messages = plan.bulk, plan.bulk.messages
    for m in messages[messages[:, 2] == 1]:
        assert len(set(relay.step[m[3] : m[4]].tolist())) == 1
    mine = messages[messages[:, 2] == 1]
    steps = relay.step[mine[:, 3]]
    assert (np.diff(steps) >= 0).all(), "in the order of the plan"
    size = np.bincount(steps, mine[:, 5])
    assert len(size) == relay.num_steps[1] > 5 and size.max() <= 3 * 1024 and len(copies)


def test_layouts_that_differ_do_not_forward():
    parts = [Layout.from_regions(rows(0, 1), TABLE)]
    layouts = {1: Layout.from_regions(rows(0, 1)[:6], TABLE), 2: Layout.from_regions(rows(0, 1)[3:], TABLE)}
    declared = {r: Declaration(lay) for r, lay in layouts.items()}
    plan = plan_refit(World.of(1, 2), dict(enumerate(parts)), declared, TABLE, bucket_bytes=1024)
    relay = relay_of(plan, layouts, step_bytes=1024)
    assert (relay.giver == 0).all() and not relay.num_steps
