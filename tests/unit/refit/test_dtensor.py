"""DTensor to DTensor over disjoint and overlapping meshes, against torch's own shards and collectives."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.dtensor import layout_of, layout_on_mesh, shard_regions, xferdtensor
from nemo_rl.refit.errors import PlanError
from nemo_rl.refit.layout import TensorMeta
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession

from . import dtensor_ranks
from .forked import Forked
from .grid import DTYPES, LAYOUTS, REAL_GRID, Case, Side, random_case, random_full, random_side, same_bits
from .simulated import PlainLanding, PlainSource, SimulatedWorld, raise_any

PLANTED = "planted: source shards exchanged"


def assembled(full: torch.Tensor, side: Side, rank: int) -> torch.Tensor:
    """The local shard that `shard_regions` describes, cut out of `full`."""
    pairs = shard_regions(tuple(full.shape), side.mesh, side.coordinate(rank), side.placements)
    ends = [at.ends for _, at in pairs]
    local = torch.zeros(tuple(map(max, *ends)) if len(ends) > 1 else ends[0], dtype=full.dtype)
    for region, at in pairs:
        local[at.slices_in(Region.whole(tuple(local.shape)))] = full[region.slices_in(Region.whole(tuple(full.shape)))]
    return local


@pytest.mark.parametrize("seed", range(10))
def test_regions_are_those_of_torch(seed):
    rng = random.Random(seed)
    for _ in range(60):
        ndim = rng.randint(0, 4)
        full = torch.arange(1, 1 + torch.Size(s := [rng.choice((1, 2, 3, 5, 8, 13)) for _ in range(ndim)]).numel())
        side = random_side(rng, ndim, range(24), rng.randint(1, 4))
        for rank in side.ranks:
            want = side.local(full.view(s), rank)
            assert torch.equal(assembled(full.view(s), side, rank).view(want.shape), want), (s, side, rank)


@pytest.mark.parametrize(
    ("placements", "text"),
    [
        ((Partial(),), r"placement P\(sum\) is neither Shard nor Replicate"),
        ((Shard(1),), "names a dim that shape"),
        ((_StridedShard(-2, split_factor=2),), "names a dim that shape"),
        ((Shard(0), Shard(0)), "differ in length"),
    ],
)
def test_other_placements_are_refused(placements, text):
    with pytest.raises(ValueError, match=text):
        shard_regions((4,), (2,), (0,), placements)


# ---- simulated ranks: random meshes of up to 4 axes


def rows_of(case: Case, side: Side) -> list[list[tuple[str, Region]]]:
    """The rows of every rank of `side`, in the order of its ranks."""
    return [
        [("w", region) for region, _ in shard_regions(case.shape, side.mesh, side.coordinate(r), side.placements)]
        for r in sorted(side.ranks)
    ]


def copied(case: Case, full: torch.Tensor) -> dict[int, torch.Tensor]:
    """Run the plan of a case copy by copy on plain tensors; destination rank -> its shard."""
    table = {"w": TensorMeta(case.shape, case.dtype)}
    sides = [
        {r: layout_on_mesh(table, {"w": side.placements}, side.mesh, side.coordinate(r)) for r in side.ranks}
        for side in (case.src, case.dst)
    ]
    world = World(case.src.ranks, case.dst.ranks)
    plan = plan_refit(world, sides[0], {r: Declaration(lay) for r, lay in sides[1].items()}, table, bucket_bytes=1024)
    parts = {r: case.src.local(full, r) for r in case.src.ranks}
    out = {r: case.dst.local(random_full(case.shape, case.dtype, seed=5), r) for r in case.dst.ranks}
    for i in range(len(plan.bulk)):
        copy = plan.copy(plan.bulk, i)
        views = []
        for side, shards, rank, row in (
            (case.src, parts, copy.src_rank, copy.src_row),
            (case.dst, out, copy.dst_rank, copy.dst_row),
        ):
            region, at = shard_regions(case.shape, side.mesh, side.coordinate(rank), side.placements)[row]
            inside = copy.region.moved(tuple(b - a for a, b in zip(region.offsets, at.offsets, strict=True)))
            views.append(shards[rank][inside.slices_in(Region.whole(tuple(shards[rank].shape)))])
        views[1].copy_(views[0])
    return out


@pytest.mark.parametrize("seed", range(8))
def test_plans_over_random_meshes_give_torchs_shards(seed):
    rng = random.Random(100 + seed)
    for _ in range(40):
        case = random_case(rng, num_ranks=16)
        full = random_full(case.shape, case.dtype, seed)
        for rank, shard in copied(case, full).items():
            want = case.dst.local(full, rank)
            assert same_bits(shard.view(want.shape), want), (case, rank)


def test_simulated_ranks_run_random_meshes():
    """The session itself over the in-process transport, the two sides apart."""
    rng = random.Random(7)
    for number in range(25):
        ndim = rng.randint(0, 4)
        shape = tuple(rng.choice((1, 2, 3, 5, 8)) for _ in range(ndim))
        src, dst = (random_side(rng, ndim, range(4), rng.randint(1, 4)) for _ in range(2))
        case = Case(shape, torch.complex128 if number % 2 else torch.float8_e4m3fn, src, dst)
        full, table = random_full(shape, case.dtype, number), {"w": TensorMeta(shape, case.dtype)}
        sources = [PlainSource.of({"w": full}, table, rows) for rows in rows_of(case, src)]
        landings = [PlainLanding(rows, seed=number) for rows in rows_of(case, dst)]
        world = SimulatedWorld(sources, landings)
        raise_any(world.start())
        raise_any(world.refit(0))
        for landing in landings:
            for (_, region), stored in zip(landing.rows, landing.storage, strict=True):
                assert same_bits(stored, full[region.slices_in(Region.whole(shape))]), (case, region)


# ---- real processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Rank -> check -> what is wrong, from four processes that run the whole grid."""
    folder = tmp_path_factory.mktemp("outcomes")
    assert not dist.is_initialized(), "ranks are forked before this process joins a group of its own"

    def work(rank: int, port: int) -> None:
        (folder / str(rank)).write_text(json.dumps(dtensor_ranks.rank_main(rank, port)))

    codes = Forked(range(dtensor_ranks.NUM_RANKS), work).codes(200)
    assert set(codes.values()) == {0}, codes
    return {rank: json.loads((folder / str(rank)).read_text()) for rank in codes}


def test_dtensors_move_between_real_processes(outcomes):
    wrong = {(r, name): text for r, said in outcomes.items() for name, text in said.items() if text and name != PLANTED}
    assert not wrong
    assert all(len(said) == len(REAL_GRID) + 3 for said in outcomes.values())


def test_the_grid_sees_a_planted_wrong_placement(outcomes):
    """Shards under each other's names pass every check of the service; the comparison with torch must fail."""
    said = [outcomes[rank][PLANTED] for rank in sorted(outcomes)]
    assert said == ["", "", *["other bits than torch's own shard"] * 2]


def test_the_grid_is_broad():
    assert len(REAL_GRID) >= 60
    for transport in ("gloo", "peer", "golden", "broadcast"):
        assert len({name.rsplit(", ", 2)[0] for name, _, t in REAL_GRID if t == transport}) >= 8
    for transport in ("gloo", "peer"):
        assert {c.dtype for _, c, t in REAL_GRID if t == transport} == set(DTYPES)
    assert {len(shape) for shape, _, _ in LAYOUTS.values()} == {0, 1, 2, 3, 4}


# ---- one rank on both sides


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def alone(src, dst, **changes):
    given = {"rank": 0, "world": World((0,), (0,)), "store": dist.HashStore(), "options": RefitOptions(deadline_s=10)}
    return xferdtensor(src, dst, **{**given, **changes})


def on(mesh: DeviceMesh, full: torch.Tensor, *placements) -> DTensor:
    return DTensor.from_local(full, mesh, placements or (Replicate(),), run_check=False)


def test_strides_of_local_shards_are_free(mesh):
    full = torch.arange(24.0).view(4, 6)
    src, dst = on(mesh, full.t().contiguous().t(), Shard(1)), on(mesh, torch.full((6, 4), -1.0).t(), Shard(0))
    assert alone(src, dst).bulk_bytes == 0  # nothing goes over a wire
    assert torch.equal(dst.to_local(), full)


@pytest.mark.parametrize(
    ("dst", "text"),
    [
        (torch.zeros(4, 3), "tensor: trainer 0 and generator 0"),
        (torch.zeros(4, 2, dtype=torch.int32), "tensor: trainer 0 and generator 0"),
    ],
)
def test_sides_that_do_not_meet_are_refused(mesh, dst, text):
    with pytest.raises(PlanError, match=text):
        alone(on(mesh, torch.zeros(4, 2)), on(mesh, dst))


def test_a_transfer_is_on_the_device_of_the_shards(mesh, monkeypatch):
    """`meta` stands for a GPU; nothing moves here."""
    seen, inner = [], RefitSession.__init__

    def noted(self, *args):
        inner(self, *args)
        seen.append(self._device.type)

    monkeypatch.setattr(RefitSession, "__init__", noted)
    monkeypatch.setattr(RefitSession, "connect", lambda self: None)
    monkeypatch.setattr(RefitSession, "plan", lambda self: None)
    monkeypatch.setattr(RefitSession, "refit", lambda self, version: None)
    here, away = torch.zeros(4), torch.zeros(4, device="meta")
    alone(on(mesh, here), on(mesh, here.clone()))
    alone({"w": on(mesh, away)}, {})
    alone({}, {"w": on(mesh, away)})
    assert seen == ["cpu", "meta", "meta"]
    with pytest.raises(ValueError, match="local shards lie on cpu and meta"):
        alone(on(mesh, here), on(mesh, away))


def test_one_storage_for_both_sides_is_refused(mesh):
    memory = torch.zeros(8)
    with pytest.raises(ValueError, match="dst tensor lies in the storage of src tensor"):
        alone(on(mesh, memory[:4]), on(mesh, memory[4:]))


def test_a_partial_tensor_is_refused_by_name(mesh):
    with pytest.raises(ValueError, match=r"w: mesh \(1,\), coordinate \(0,\): placement P\(sum\)"):
        layout_of({"w": on(mesh, torch.zeros(4), Partial())})


def test_a_shard_of_another_size_than_torch_cuts_is_refused(mesh):
    lying = DTensor.from_local(torch.zeros(3), mesh, (Shard(0),), run_check=False, shape=torch.Size((4,)), stride=(1,))
    with pytest.raises(ValueError, match=r"the local shard has shape \(3,\), .* give \(4,\)"):
        layout_of({"w": lying})


def test_a_side_that_is_missing_is_refused(mesh):
    with pytest.raises(ValueError, match="a trainer takes a source"):
        alone(None, on(mesh, torch.zeros(4)))
