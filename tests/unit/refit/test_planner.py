"""Plans of random layouts against brute force over element sets; refusals name everything that is wrong."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_rl.refit import boxes
from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.packed import pack
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.planner import plan_part, plan_refit
from nemo_rl.refit.proof import Refusal, prove, prove_part
from nemo_rl.refit.region import Region

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


def random_world(rng):
    """Trainers and generators apart, or on ranks in common."""
    if rng.random() < 0.7:
        return World.of(rng.randint(1, 5), rng.randint(1, 5))
    size = rng.randint(1, 5)
    return World(tuple(range(size)), tuple(sorted(rng.sample(range(size), rng.randint(1, size)))))


@pytest.mark.parametrize("seed", range(80))
def test_a_rank_plans_exactly_its_part_of_the_whole(seed):
    rng = random.Random(1000 + seed)
    table, world = random_table(rng, rng.randint(1, 10)), random_world(rng)
    src, dst = shard_out(rng, table, len(world.trainers)), shard_out(rng, table, len(world.generators))
    if rng.random() < 0.3:  # trainers hold everything twice, cut in two ways
        src = [a + b for a, b in zip(src, shard_out(rng, table, len(world.trainers)), strict=True)]
    with_units = rng.random() < 0.6
    units = [[rng.choice((-1, rng.randint(0, 2))) if with_units else -1 for _ in rows] for rows in dst]
    misc = {} if world.shared else {f: "cast" for f in table if rng.random() < 0.2}
    sources = {r: Layout.from_regions(s, table) for r, s in zip(world.trainers, src, strict=True)}
    ranks = zip(world.generators, dst, units, strict=True)
    declared = {r: declare(d, table, u, misc=misc) for r, d, u in ranks}
    if rng.random() < 0.5:  # generator replicas
        first = declared[world.generators[0]]
        declared = {r: first if rng.random() < 0.5 else d for r, d in declared.items()}
    bucket = rng.choice((1 << 10, 1 << 11, 1 << 20))
    inputs = (world, sources, declared, table)
    plan = plan_refit(*inputs, bucket_bytes=bucket)
    for rank in range(world.size):
        part, mine = plan_part(rank, *inputs, bucket_bytes=bucket), plan.part(rank)
        assert part.to_bytes() == mine.to_bytes()
        touched = (plan.bulk.src_rank == rank) | (plan.bulk.dst_rank == rank)
        assert len(mine.bulk) == touched.sum()
        assert [m[:3] + m[5:] for m in mine.bulk.messages.tolist()] == [
            m[:3] + m[5:] for m in plan.bulk.messages.tolist() if rank in m[1:3]
        ]
    order = plan.bulk.messages[:, 0]
    assert (order[1:] >= order[:-1]).all()


def test_a_part_is_proven_like_the_whole():
    table = make_table({"a": ((8, 8), torch.float32), "b": ((6, 2), torch.float32)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    sources = {r: Layout.from_regions([rows[r]], table) for r in range(2)}
    declared = {2: declare(rows, table), 3: declare(rows, table)}
    plan = plan_refit(World.of(2, 2), sources, declared, table)
    for rank in range(4):
        prove_part(plan.part(rank), rank, sources, declared)
    with pytest.raises(Refusal, match="2 copies do not concern trainer 0"):
        prove_part(plan, 0, sources, declared)
    with pytest.raises(Refusal, match=r"b \[0:6, 0:2\] of generator 1 \(rank 3\): 0 of 12 elements"):
        short = CopyTable.stack([plan.bulk.of_rank(0).of_rank(3)], 2)
        prove_part(replace(plan, bulk=short), 3, sources, declared)


def test_a_generator_finds_the_hole_in_its_own_part():
    table = make_table({"a": ((8,), torch.float32)})
    sources = {0: Layout.from_regions([("a", Region((0,), (5,)))], table)}
    declared = {1: declare([("a", WHOLE((8,)))], table)}
    with pytest.raises(Refusal, match=r"a \[0:8\] of generator 0 \(rank 1\): 5 of 8 elements"):
        plan_part(1, World.of(1, 1), sources, declared, table)


def test_a_rank_that_holds_a_piece_itself_sends_it_to_itself():
    table = make_table({f"w{i}": ((4, 4), torch.float32) for i in range(6)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    layout, world = Layout.from_regions(rows, table), World((0, 1, 2), (0, 1, 2, 3))
    plan = plan_refit(world, dict.fromkeys(world.trainers, layout), {r: declare(rows, table) for r in range(4)}, table)
    own = plan.bulk.dst_rank < 3
    assert (plan.bulk.src_rank[own] == plan.bulk.dst_rank[own]).all()
    assert np.bincount(plan.bulk.src_rank[~own]).tolist() == [2, 2, 2], "the fourth rank's bytes are shared evenly"


def test_a_trainer_that_holds_a_box_twice_sends_no_more_than_its_replica():
    table = make_table({f"w{i}": ((4, 4), torch.float32) for i in range(4)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    sources = {0: Layout.from_regions(rows * 2, table), 1: Layout.from_regions(rows, table)}
    plan = plan_refit(World.of(2, 1), sources, {2: declare(rows, table)}, table)
    assert np.bincount(plan.bulk.src_rank).tolist() == [2, 2]


def test_generator_replicas_spread_over_trainer_replicas():
    table = make_table({f"layers.{i}.w": ((8, 4), torch.float32) for i in range(4)})
    layout = Layout.from_regions([(f, WHOLE(m.shape)) for f, m in table.items()], table)
    half = [[(f, Region((4 * i, 0), (4, 4))) for f in table] for i in range(2)]
    world = World.of(4, 8)
    declared = {r: declare(half[r % 2], table) for r in world.generators}
    plan = plan_refit(world, dict.fromkeys(world.trainers, layout), declared, table)
    for kind in range(2):
        servers = [set(plan.bulk.src_rank[plan.bulk.dst_rank == r].tolist()) for r in range(4 + kind, 12, 2)]
        assert [len(s) for s in servers] == [1] * 4 and len(set.union(*servers)) == 4


def test_owners_are_right_where_some_sources_cross_and_some_do_not():
    """The source rows of all copies by brute force: `a` is cut in unlike ways, `b` and `c` are plain."""
    table = make_table({"a": ((10, 4), torch.float32), "b": ((6, 4), torch.float32), "c": ((5,), torch.float32)})
    parts = [Region((0, 0), (6, 4)), Region((4, 0), (6, 4)), Region((0, 0), (10, 2))]
    sources = {
        r: Layout.from_regions(
            [("c", WHOLE((5,))), ("b", Region((2 * r, 0), (2, 4))), ("a", parts[r]), ("b", Region((2 * r, 0), (1, 4)))],
            table,
        )
        for r in range(3)
    }
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    plan = plan_refit(World.of(3, 2), sources, {r: declare(rows, table) for r in (3, 4)}, table)
    written = {r: {f: Counter() for f in table} for r in (3, 4)}
    for i in range(len(plan.bulk)):
        copy = plan.copy(plan.bulk, i)
        assert sources[copy.src_rank].fqn(copy.src_row) == copy.fqn
        inside = elements(copy.region, table[copy.fqn].shape)
        assert inside <= elements(sources[copy.src_rank].region(copy.src_row), table[copy.fqn].shape)
        written[copy.dst_rank][copy.fqn].update(inside)
    assert all(written[r][f] == Counter(range(m.num_bytes // 4)) for r in (3, 4) for f, m in table.items())


def faulty(fault):
    """A plan of two tensors, halves over two trainers that hold all of both, with `fault`; and what it was made of."""
    table = make_table({"a": ((8, 8), torch.float32), "b": ((8, 8), torch.float32)})
    halves = [(f, Region((4 * i, 0), (4, 8))) for f in table for i in range(2)]
    sources = {r: Layout.from_regions([halves[r], halves[2 + r]], table) for r in range(2)}
    declared = {2: declare(halves, table)}
    plan = plan_refit(World.of(2, 1), sources, declared, table, bucket_bytes=1 << 20)
    arrays = {k: v.copy() for k, v in plan.bulk.arrays().items()}
    m = arrays["messages"]
    if fault == "other source":  # everything is covered, but not by ranks that hold it
        arrays["src_rank"] = 1 - arrays["src_rank"]
        m[:, 1] = 1 - m[:, 1]
    if fault == "source row":
        arrays["src_row"] += 2
    if fault == "negative row":
        arrays["src_row"] -= 2
    if fault == "tensor":
        arrays["tensor"] = 1 - arrays["tensor"]
    if fault == "other half":
        arrays["dst_row"] = arrays["dst_row"] ^ 1
    if fault == "nothing":  # a copy without elements rides along
        arrays = {k: v if k == "messages" else np.concatenate([v, v[-1:]]) for k, v in arrays.items()}
        arrays["sizes"][-1, 0] = 0
        m[m[:, 4].argmax(), 4] += 1
    if fault == "order":
        arrays["messages"] = m[::-1].copy()
    if fault == "foreign rank":
        arrays["src_rank"] += 7
    bucket = 64 if fault == "bucket" else plan.bucket_bytes
    required = plan.required_bytes + 4 * (fault == "required")
    return replace(plan, bulk=CopyTable(**arrays), bucket_bytes=bucket, required_bytes=required), sources, declared


@pytest.mark.parametrize(
    "fault, said",
    [
        ("other source", r"not inside src row 0 of trainer"),
        ("source row", r"^4 violation.*not inside src row 2 of trainer"),
        ("negative row", r"^4 violation.*not inside src row -1 of trainer"),
        ("tensor", r"not inside src row 0 of trainer.*not inside dst row 0 of generator"),
        ("other half", r"^4 violation.*not inside dst row 0 of generator"),
        ("nothing", r"^2 violation.*not inside src row.*not inside dst row"),
        ("bucket", r"a message of 256 bytes exceeds the bucket of 64"),
        ("order", r"not in the order of their rounds"),
        ("foreign rank", r"the world has 3"),
        ("required", r"512 bulk bytes planned .* 516 said, all destinations have 512"),
    ],
)
def test_the_proof_looks_at_everything(fault, said):
    with pytest.raises(Refusal, match=said):
        prove(*faulty(fault))
    prove(*faulty("none"))


def test_bytes_that_are_written_twice_are_found_where_the_count_is_right():
    table = make_table({"a": ((8, 8), torch.float32)})
    row = [("a", WHOLE((8, 8)))]
    sources, declared = {0: Layout.from_regions(row, table)}, {1: declare(row, table)}
    plan = plan_refit(World.of(1, 1), sources, declared, table, bucket_bytes=128)
    offsets = plan.bulk.offsets.copy()
    offsets[1] = offsets[0]
    with pytest.raises(Refusal, match=r"^1 violation.*a \[0:8, 0:8\] of generator 0 \(rank 1\): written twice"):
        prove(replace(plan, bulk=replace(plan.bulk, offsets=offsets)), sources, declared)


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_are_all_pairs_that_meet(seed, monkeypatch):
    monkeypatch.setattr(boxes, "_CHUNK", 7)
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(0, 4))
    a, b = (random_boxes(rng, int(rng.integers(0, 30)), ndim) for _ in range(2))
    found_a, found_b, offsets, sizes = boxes.overlaps(a, b)
    pairs = []
    for j in range(len(b)):
        for i in range(len(a)):
            low = np.maximum(a.offsets[i], b.offsets[j])
            high = np.minimum(a.offsets[i] + a.sizes[i], b.offsets[j] + b.sizes[j])
            if a.tensor[i] == b.tensor[j] and (low < high).all():
                pairs.append((i, j, low.tolist(), (high - low).tolist()))
    columns = (found_a.tolist(), found_b.tolist(), offsets.tolist(), sizes.tolist())
    assert list(zip(*columns, strict=True)) == pairs
    own = {int(b.tensor[i]) for i, j, *_ in zip(*(c.tolist() for c in boxes.overlaps(b, b)), strict=True) if i != j}
    assert boxes.colliding(b).tolist() == sorted(own)


def random_boxes(rng, count, ndim):
    tensor = rng.integers(0, 4, count)
    offsets, sizes = rng.integers(0, 6, (count, ndim)), rng.integers(1, 5, (count, ndim))
    return boxes.Boxes(tensor, offsets, sizes, tensor, tensor, tensor)


def test_a_layout_with_a_name_twice_is_refused():
    table = make_table({"a": ((4,), torch.float32), "b": ((4,), torch.float32)})
    layout = Layout.from_regions([(f, WHOLE((4,))) for f in table], table)
    columns = {name: getattr(layout, name) for name in ("tensor", "offsets", "sizes", "unit")}
    with pytest.raises(ValueError, match="2 names, 1 of them different"):
        Layout.from_bytes(pack([["a", [4], "float32"]] * 2, columns))
