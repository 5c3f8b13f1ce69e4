"""Plans of random layouts against brute force over element sets; refusals name everything that is wrong."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.proof import Refusal, prove
from nemo_rl.refit.region import Region
from nemo_rl.refit.rounds import color_edges

from .layouts import elements, random_table, shard_out
from .simulated import make_table

WHOLE = Region.whole


def declare(rows, table, units=None, **kw):
    return Declaration(Layout.from_regions(rows, table, units), **kw)


def random_case(seed):
    rng = random.Random(seed)
    table = random_table(rng, rng.randint(1, 8))
    world = World.of(rng.randint(1, 4), rng.randint(1, 4))
    src = shard_out(rng, table, len(world.trainers))
    dst = shard_out(rng, table, len(world.generators))
    units = [[rng.choice((-1, rng.randint(0, 2))) for _ in rows] for rows in dst]
    sources = {r: Layout.from_regions(src[r], table) for r in world.trainers}
    declared = {r: declare(d, table, u) for r, d, u in zip(world.generators, dst, units, strict=True)}
    bucket = rng.choice((1 << 10, 1 << 12, 1 << 20))
    return table, world, sources, declared, plan_refit(world, sources, declared, table, bucket_bytes=bucket)


@pytest.mark.parametrize("seed", range(60))
def test_random_layouts_are_covered_exactly(seed):
    table, _, sources, declared, plan = random_case(seed)
    written = {(r, row): Counter() for r, d in declared.items() for row in range(len(d.layout))}
    for i in range(len(plan.bulk)):
        copy = plan.copy(plan.bulk, i)
        inside = elements(copy.region, table[copy.fqn].shape)
        assert inside <= elements(sources[copy.src_rank].region(copy.src_row), table[copy.fqn].shape)
        assert sources[copy.src_rank].fqn(copy.src_row) == copy.fqn
        written[copy.dst_rank, copy.dst_row].update(inside)
    for (rank, row), seen in written.items():
        layout = declared[rank].layout
        assert set(seen) == elements(layout.region(row), table[layout.fqn(row)].shape)
        assert all(n == 1 for n in seen.values())
    assert plan.bulk_bytes == plan.required_bytes == sum(d.layout.num_bytes for d in declared.values())


@pytest.mark.parametrize("seed", range(20))
def test_rounds_are_matchings_and_plans_survive_the_wire(seed):
    plan = random_case(seed)[-1]
    m = plan.bulk.messages
    for column in (1, 2):
        assert all(n == 1 for n in Counter(map(tuple, m[:, [0, column]].tolist())).values())
    assert RefitPlan.from_bytes(plan.to_bytes()).digest == plan.digest


@pytest.mark.parametrize("seed", range(30))
def test_coloring_is_proper_and_least(seed):
    rng = np.random.default_rng(seed)
    src, dst = rng.integers(0, 5, 40), rng.integers(0, 6, 40)
    colors = color_edges(src, dst)
    for side in (src, dst):
        assert len(set(zip(side.tolist(), colors.tolist(), strict=True))) == len(src)
    assert colors.max() + 1 == max(np.bincount(src).max(), np.bincount(dst).max())


def test_replicas_share_the_load_and_each_serves_few():
    table = make_table({f"layers.{i}.w": ((64, 64), torch.float32) for i in range(8)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    world = World.of(8, 8)
    layout = Layout.from_regions(rows, table)
    plan = plan_refit(
        world, dict.fromkeys(world.trainers, layout), {r: declare(rows, table) for r in world.generators}, table
    )
    sent = [plan.bulk.wire_bytes(r)[0] for r in world.trainers]
    assert len(set(sent)) == 1 and sum(sent) == plan.required_bytes
    pairs = {(int(a), int(b)) for a, b in plan.bulk.messages[:, 1:3]}
    assert len(pairs) == 8, "DP8 -> DP8 pairs ranks one to one"


def test_overlapping_unequal_sources_are_cut_into_cells():
    table = make_table({"w": ((10, 4), torch.float32)})
    parts = [Region((0, 0), (6, 4)), Region((4, 0), (6, 4)), Region((0, 0), (10, 2))]
    world = World.of(3, 1)
    sources = {r: Layout.from_regions([("w", parts[r])], table) for r in world.trainers}
    plan = plan_refit(world, sources, {3: declare([("w", WHOLE((10, 4)))], table)}, table)
    assert sum(int(s.prod()) for s in plan.bulk.sizes) == 40


def test_a_hole_and_a_foreign_tensor_and_a_dtype_are_refused_at_once():
    table = make_table({"a": ((8,), torch.float32), "b": ((4,), torch.float32)})
    other = make_table({"a": ((8,), torch.bfloat16), "b": ((4,), torch.float32), "c": ((2,), torch.float32)})
    sources = {0: Layout.from_regions([("a", Region((0,), (8,)))], table)}
    with pytest.raises(Refusal) as caught:
        bad = declare([("a", Region((0,), (8,))), ("c", Region((0,), (2,)))], other, problems=("bytes 0:4 of x",))
        plan_refit(World.of(1, 1), sources, {1: bad}, table)
    text = str(caught.value)
    assert "a:" in text and "bfloat16" in text and "c:" in text and "bytes 0:4 of x" in text
    with pytest.raises(Refusal, match=r"b \[0:4\] of generator 0 \(rank 1\): 0 of 4 elements"):
        plan_refit(World.of(1, 1), sources, {1: declare([("b", Region((0,), (4,)))], table)}, table)


def test_hole_in_a_misc_tensor_is_refused():
    table = make_table({"a": ((8,), torch.float32)})
    sources = {0: Layout.from_regions([("a", Region((0,), (5,)))], table)}
    with pytest.raises(Refusal, match="5 of 8 elements"):
        plan_refit(World.of(1, 1), sources, {1: declare([], table, misc={"a": "cast"})}, table)


@pytest.mark.parametrize("fault", ["drop", "double", "shift", "steal", "round", "bytes"])
def test_the_proof_catches_a_damaged_plan(fault):
    table = make_table({"a": ((8, 8), torch.float32), "b": ((6, 2), torch.float32)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    half = [[("a", Region((4 * r, 0), (4, 8))), ("b", Region((3 * r, 0), (3, 2)))] for r in range(2)]
    sources = {r: Layout.from_regions(half[r], table) for r in range(2)}
    declared = {2: declare(rows, table), 3: declare(rows, table)}
    plan = plan_refit(World.of(2, 2), sources, declared, table)
    prove(plan, sources, declared)
    bulk, messages = plan.bulk, plan.bulk.messages.copy()
    arrays = {k: v.copy() for k, v in bulk.arrays().items()}
    if fault == "drop":
        arrays = {k: v if k == "messages" else v[:-1] for k, v in arrays.items()}
    if fault == "double":
        arrays["offsets"][1] = arrays["offsets"][0]
        arrays["sizes"][1], arrays["tensor"][1] = arrays["sizes"][0], arrays["tensor"][0]
        arrays["dst_row"][1], arrays["src_row"][1] = arrays["dst_row"][0], arrays["src_row"][0]
    if fault == "shift":
        arrays["offsets"][0, 0] += 1
    if fault == "steal":
        arrays["dst_rank"][0] = 5 - arrays["dst_rank"][0]
    if fault == "round":
        messages[:, 0] = 0
        arrays["messages"] = messages
    if fault == "bytes":
        messages[0, 5] += 4
        arrays["messages"] = messages
    with pytest.raises(Refusal):
        prove(replace(plan, bulk=type(bulk)(**arrays)), sources, declared)


def test_misc_spreads_over_its_unit_and_reasons_travel():
    table = make_table({"a": ((4,), torch.float32), "b": ((4,), torch.float32), "c": ((4,), torch.float32)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    sources = {0: Layout.from_regions(rows, table)}
    plan = plan_refit(World.of(1, 1), sources, {1: declare(rows, table, [7, 7, -1], misc={"a": "cast"})}, table)
    assert plan.misc_fqns == ("a", "b") and plan.misc_reasons["a"] == "cast"
    assert {plan.names[t] for t in plan.bulk.tensor} == {"c"}
    assert plan.misc_bytes == 32 and plan.required_bytes == 16


def test_unused_tensors_are_listed():
    table = make_table({"a": ((4,), torch.float32), "b": ((4,), torch.float32)})
    sources = {0: Layout.from_regions([(f, WHOLE(m.shape)) for f, m in table.items()], table)}
    declared = {1: declare([("a", WHOLE((4,)))], table)}
    plan = plan_refit(World.of(1, 1), sources, declared, table, unused={"x": "tied"})
    assert plan.unused == {"x": "tied", "b": "no generator's loader reads it"}
    assert "unused: 1 (b): no" in plan.describe()


def test_large_pieces_are_cut_to_the_bucket():
    table = make_table({"a": ((3, 5000), torch.float32)})
    row = [("a", WHOLE((3, 5000)))]
    plan = plan_refit(
        World.of(1, 1), {0: Layout.from_regions(row, table)}, {1: declare(row, table)}, table, bucket_bytes=4096
    )
    assert plan.bulk.messages[:, 5].max() <= 4096 and plan.bulk_bytes == 60000


def test_damaged_bytes_are_refused():
    plan = random_case(3)[-1]
    data = plan.to_bytes()
    for bad in (data[:-1], data[: len(data) // 2], data + b"x", b"", b"12345678"):
        with pytest.raises(ValueError, match="refused"):
            RefitPlan.from_bytes(bad)
    table = make_table({"a": ((4,), torch.float32)})
    layout = Layout.from_regions([("a", WHOLE((4,)))], table)
    assert Layout.from_bytes(layout.to_bytes()).digest == layout.digest
    for bad in (layout.to_bytes()[:-3], replace(layout, sizes=layout.sizes + 1).to_bytes()):
        with pytest.raises(ValueError, match="layout refused"):
            Layout.from_bytes(bad)
