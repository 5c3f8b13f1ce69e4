"""The cost model: predictions against links under a simulated clock, the choice in made-up worlds, and the cache."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.control import Control
from nemo_rl.refit.cost import Demand, Links, Load, Rates
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.relay import relay_of
from nemo_rl.refit.transports import registry
from nemo_rl.refit.transports.links import Cache
from nemo_rl.refit.transports.mover import Fact
from nemo_rl.refit.transports.probes import Case, Probe, fit, measure, probes_of
from nemo_rl.refit.transports.registry import TRANSPORTS, choose

from .layouts import shard_out
from .link_clock import run_clock
from .simulated import make_table

RATES = Rates(0.0, 20e-6, 2e-6, 0.0, 1e9, 0.5e9, one_sided=False, overlaps=False)
TOLERANCE = {False: 0.01, True: 0.2}  # of predictions, where ends work one message after the other, and beside the wire


def demand_of(world, table, sources, landings, bucket_bytes=1 << 16):
    layouts = {
        r: Layout.from_regions(rows, table)
        for ranks, ends in ((world.trainers, sources), (world.generators, landings))
        for r, rows in zip(ranks, ends, strict=True)
    }
    sources = {r: layouts[r] for r in world.trainers}
    landings = {r: layouts[r] for r in world.generators}
    declared = {r: Declaration(layout) for r, layout in landings.items()}
    return Demand(plan_refit(world, sources, declared, table, bucket_bytes=bucket_bytes), sources, landings)


def halves(table, axis, count):
    """Rows of `count` ranks that cut every tensor along `axis`."""

    def cut(shape, rank):
        size = shape[axis] // count
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = rank * size, size
        return Region(tuple(offsets), tuple(sizes))

    return [[(f, cut(m.shape, rank)) for f, m in table.items()] for rank in range(count)]


def by_clock(load, rates, num_streams):
    """Seconds under the simulated clock of what `rates` say of links.

    Strided bytes take longer, and so do bytes that are packed with others where the ends do not pack beside the wire.
    """
    packed = load.strided_bytes if rates.overlaps else np.where(load.num_copies > 1, load.num_bytes, load.strided_bytes)
    fixed = rates.message_s + load.num_copies * rates.copy_s
    slower = packed * (rates.run_bytes_per_s / rates.short_bytes_per_s - 1)
    ends = zip(load.src.tolist(), load.dst.tolist(), fixed.tolist(), (load.num_bytes + slower).tolist(), strict=True)
    return run_clock(list(ends), rates.run_bytes_per_s, num_streams)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_prediction_is_what_links_take_under_a_simulated_clock(seed, overlaps):
    rng = random.Random(seed)
    world = World.of(rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 4)))
    table = make_table(
        {
            f"w{i}": ((64 * rng.choice((1, 2, 8)), 64 * rng.choice((1, 4, 16))), torch.bfloat16)
            for i in range(rng.randint(3, 20))
        }
    )
    sources, landings = (halves(table, rng.choice((0, 1)), n) for n in (len(world.trainers), len(world.generators)))
    if len(world.trainers) == 3:
        sources = shard_out(rng, table, 3)
    load = Load.of(demand_of(world, table, sources, landings))
    rates = replace(RATES, overlaps=overlaps)
    assert load.transfer_s(rates) == pytest.approx(by_clock(load, rates, 3 if overlaps else 1), rel=TOLERANCE[overlaps])


def test_runs_are_what_both_ends_hold_in_one_piece():
    table = make_table({"w": ((8, 6, 4), torch.float32)})
    world = World.of(1, 2)
    whole = [("w", Region.whole((8, 6, 4)))]
    for axis, strided in ((0, 0), (1, 2 * 8 * 3 * 4 * 4), (2, 2 * 8 * 6 * 2 * 4)):
        load = Load.of(demand_of(world, table, [whole], halves(table, axis, 2)))
        assert load.num_bytes.sum() == 8 * 6 * 4 * 4 and load.strided_bytes.sum() == load.short_bytes.sum() == strided


def probed(kind, bucket_bytes, rates, num_streams):
    """Loads of the probes of `kind` and seconds that a clock says of them."""
    found = {}
    for name, probe in probes_of(kind, bucket_bytes).items():
        case = Case.of(World.of(2, 2), probe)
        load = Load.of(Demand(case.plan, case.sources, case.landings))
        found[name] = load, rates.start_s + by_clock(load, rates, num_streams)
    return found


def test_what_was_measured_is_what_is_predicted_of_it():
    """Rates are recovered from probes that a clock has run, and say of other plans what the clock says."""
    rates = fit(probed("cpu", 1 << 20, replace(RATES, start_s=0.001), 1), one_sided=False, overlaps=False)
    assert rates.run_bytes_per_s == pytest.approx(RATES.run_bytes_per_s, rel=0.05)
    assert rates.short_bytes_per_s == pytest.approx(RATES.short_bytes_per_s, rel=0.05)
    assert rates.copy_s == pytest.approx(RATES.copy_s, rel=0.2)
    assert rates.message_s == pytest.approx(RATES.message_s, rel=0.2)
    assert rates.start_s == pytest.approx(0.001, rel=0.05)


def test_what_fills_the_wire_is_counted_once_and_only_where_something_is_packed():
    """What the first message is packed for shows in probes of both sizes, and in no plan that packs nothing."""
    known = replace(WIRE, fill_s=3e-4, copy_s=0.0, message_s=0.0)
    found = probed("cuda", 64 << 20, known, 3)
    for name in ("short", "third of short"):
        found[name] = found[name][0], found[name][1] + known.fill_s
    rates = fit(found, one_sided=False, overlaps=True)
    assert rates.fill_s == pytest.approx(known.fill_s, rel=0.05)
    assert rates.run_bytes_per_s == pytest.approx(known.run_bytes_per_s, rel=0.01)
    assert rates.short_bytes_per_s == pytest.approx(known.short_bytes_per_s, rel=0.01)
    assert fit(found, one_sided=True, overlaps=True).fill_s == 0.0
    table = make_table({f"w{i}": ((1 << 10, 1 << 10), torch.bfloat16) for i in range(64)})
    rows = [[(f, Region.whole(m.shape)) for f, m in table.items()]]
    alone, together = (Load.of(demand_of(World.of(1, 1), table, rows, rows, size)) for size in (1 << 20, 64 << 20))
    assert together.transfer_s(rates) == pytest.approx(alone.transfer_s(rates) + rates.fill_s)


NEAR = Rates(1e-3, 0.0, 3.5e-6, 0.0, 390e9, 370e9, one_sided=True, overlaps=True)
WIRE = Rates(2e-4, 40e-6, 4e-6, 1e-4, 350e9, 320e9, one_sided=False, overlaps=True)
PCIE = replace(NEAR, run_bytes_per_s=50e9, short_bytes_per_s=40e9)


def fastest(rates, table, world, bucket_bytes=16 << 20):
    demand = demand_of(
        world, table, halves(table, 0, len(world.trainers)), halves(table, 1, len(world.generators)), bucket_bytes
    )
    links = Links(rates, 1e12, 1e-6, 1e-4)
    givers = dict.fromkeys(rates)
    said = demand.predictions(links, givers, "cuda", verify=False)
    assert said == demand.predictions(Links.from_json(links.to_json()), givers, "cuda", verify=False)
    return min(said, key=lambda name: said[name])


def test_the_faster_transport_depends_on_the_plan():
    world = World.of(2, 2)
    large = make_table({f"w{i}": ((1 << 14, 1 << 14), torch.bfloat16) for i in range(8)})
    many = make_table({f"w{i}": ((64, 64), torch.bfloat16) for i in range(2000)})
    few = make_table({"w": ((64, 64), torch.bfloat16)})
    assert fastest({"peer": NEAR, "nccl": WIRE}, large, world) == "peer"
    assert fastest({"peer": NEAR, "nccl": replace(WIRE, copy_s=20e-6)}, many, world) == "peer", "packing costs more"
    assert fastest({"peer": replace(NEAR, copy_s=50e-6), "nccl": WIRE}, many, world) == "nccl", "copies cost more"
    assert fastest({"peer": PCIE, "nccl": WIRE}, large, world) == "nccl"
    assert fastest({"peer": NEAR, "nccl": WIRE}, few, world) == "nccl", "it starts sooner"
    assert fastest({"peer": NEAR, "nccl": NEAR}, large, world) == "peer", "the first of equals"


def test_replicas_that_forward_are_predicted_to_be_fed_in_the_time_of_one():
    world, table = World.of(1, 3), make_table({f"w{i}": ((1 << 10, 1 << 10), torch.bfloat16) for i in range(32)})
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    layout = Layout.from_regions(rows, table)
    landings = dict.fromkeys(world.generators, layout)
    plan = plan_refit(world, {0: layout}, {r: Declaration(layout) for r in landings}, table, bucket_bytes=1 << 20)
    demand = Demand(plan, {0: layout}, landings)
    givers = {"peer": relay_of(plan, landings, 1 << 20).giver, "plain": None}
    rates = dict.fromkeys(givers, replace(NEAR, copy_s=0.0))
    said = demand.predictions(Links(rates, 1e12, 0.0, 0.0), givers, "cuda", verify=False)
    moving = {name: seconds - NEAR.start_s for name, seconds in said.items()}
    assert moving["peer"] == pytest.approx(moving["plain"] / 3, rel=0.1)


def test_misc_and_digests_are_part_of_a_prediction():
    world, table = World.of(1, 2), make_table({f"w{i}": ((64, 64), torch.float32) for i in range(8)})
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    layout = Layout.from_regions(rows, table)
    links = Links({"gloo": RATES}, 1e9, 0.0, 0.0)

    def said(misc, verify):
        declared = {r: Declaration(layout, dict.fromkeys(misc, "cast")) for r in world.generators}
        plan = plan_refit(world, {0: layout}, declared, table)
        return Demand(plan, {0: layout}, dict.fromkeys(world.generators, layout)).predictions(
            links, {"gloo": None}, "cpu", verify
        )["gloo"]

    size = 8 * 64 * 64 * 4
    assert said((), True) - said((), False) == pytest.approx(2 * size / 1e9), "two looks at what goes out twice"
    hidden = Links({"peer": NEAR, "nccl": WIRE}, 1e12, 0.0, 0.0)
    demand, givers = demand_of(World.of(1, 1), table, [rows], [rows]), {"peer": None, "nccl": None}
    bare, verified = (demand.predictions(hidden, givers, "cuda", verify) for verify in (False, True))
    assert bare == verified, "digests are taken beside copies and beside messages"
    slow = replace(hidden, digest_bytes_per_s=1e6)
    assert demand.predictions(slow, {"peer": None}, "cuda", True)["peer"] == pytest.approx(2 * size / 1e6)
    assert said((), False) < said(("w0",), False) < said(("w0", "w1"), False)


@pytest.mark.parametrize("shared", [False, True])
def test_probes_move_by_every_rank_of_a_small_world(shared):
    world = World((0, 1, 2), (0, 1, 2)) if shared else World.of(3, 2)
    case = Case.of(world, Probe(4, 3, 64, 2, 1 << 20))
    m = case.plan.bulk.messages
    assert set(m[:, 1].tolist()) == set(world.trainers) and set(m[:, 2].tolist()) == set(world.generators)
    assert (m[:, 1] != m[:, 2]).all()


def facts(hardware="one GPU", ranks=2):
    return {r: Fact("boot", "cpu", False, "", "host", hardware) for r in range(ranks)}


def test_nccl_is_no_choice_where_ranks_share_a_gpu_or_its_library_is_not_there(monkeypatch):
    monkeypatch.setattr(registry.nccl_calls, "missing", lambda: None)
    world = World.of(1, 2)
    apart = {r: Fact("boot", "cuda", False, gpu=f"GPU-{r}") for r in range(3)}
    shared = {**apart, 2: replace(apart[2], gpu="GPU-0")}
    for name in ("nccl", "golden", "broadcast"):
        assert TRANSPORTS[name].unsupported(1, world, apart) is None
        assert "ranks 0 and 2 are on one GPU (GPU-0)" in TRANSPORTS[name].unsupported(1, world, shared)
    assert TRANSPORTS["gloo"].unsupported(0, world, facts(ranks=3)) is None, "a CPU may be shared"
    monkeypatch.setattr(registry.nccl_calls, "missing", lambda: "libnccl.so.2 is not loaded")
    assert "libnccl" in TRANSPORTS["nccl"].unsupported(1, world, apart)
    assert "libnccl" in TRANSPORTS["m2n"].unsupported(1, world, apart)


@pytest.mark.parametrize(("peer", "taken"), [(1.04, "peer"), (1.06, "gloo"), (0.5, "peer")])
def test_of_transports_that_are_predicted_alike_the_first_is_taken(peer, taken, monkeypatch):
    demand = SimpleNamespace(predictions=lambda *_: {"gloo": 1.0, "peer": peer})
    monkeypatch.setattr(registry, "_givers", lambda *_: None)
    control = Control(0, World((0,), (0,)), dist.HashStore(), 5.0)
    found = [TRANSPORTS["peer"], TRANSPORTS["gloo"]]
    links = Links({}, 1e9, 0.0, 0.0)
    assert choose(control, found, links, facts(), RefitOptions(), demand).transport.name == taken


@pytest.mark.parametrize("free", [500 << 20, None])
def test_a_transport_whose_buffers_do_not_fit_is_not_taken(free, monkeypatch):
    """`nccl` would be faster, but its message buffers may need 512 MiB."""
    table = make_table({"w": ((64, 64), torch.bfloat16)})
    rows = [[("w", Region.whole((64, 64)))]]
    demand = demand_of(World.of(1, 1), table, rows, rows)
    known = {r: Fact("boot", "cuda", False, gpu=f"GPU-{r}", free_bytes=free) for r in range(2)}
    links = Links({"peer": PCIE, "nccl": WIRE}, 1e9, 0.0, 0.0)
    found = [TRANSPORTS["peer"], TRANSPORTS["nccl"]]
    monkeypatch.setattr(registry, "_givers", lambda *_: None)
    control = Control(0, World((0,), (0,)), dist.HashStore(), 5.0)
    choice = choose(control, found, links, known, RefitOptions(), demand)
    assert choice.transport.name == ("peer" if free else "nccl")
    assert choice.predictions["nccl"] < choice.predictions["peer"]
    assert choose(control, found, None, known, RefitOptions(), demand).transport.name == "peer", "nothing was measured"


def test_a_cached_measurement_counts_for_the_world_that_it_was_made_in(tmp_path):
    options = RefitOptions(cache_dir=str(tmp_path / "links"))
    links = Links({"peer": NEAR, "nccl": WIRE}, 1e9, 1e-6, 1e-4)
    cache = Cache(options.cache_dir, facts(), options)
    assert cache.decide(["peer", "nccl"], "auto") == b"measure" and cache.decide(["peer"], "auto") == b""
    assert cache.decide(["peer", "nccl"], "never") == b""
    cache.keep(links)
    again = Cache(options.cache_dir, facts(), options)
    assert Links.from_json(again.decide(["peer", "nccl"], "auto").decode()) == links
    assert Links.from_json(again.decide(["peer"], "never").decode()) == links
    assert again.decide(["peer"], "always") == b"measure"
    assert again.decide(["peer", "gloo"], "auto") == b"measure", "gloo was not measured"
    for other in (facts("another GPU"), facts(ranks=3)):
        assert Cache(options.cache_dir, other, options).read() is None
    assert Cache(options.cache_dir, facts(), replace(options, bucket_bytes=4096)).read() is None
    (path,) = (tmp_path / "links").iterdir()
    for damaged in ("{", "[]", json.dumps({"key": again._key, "links": "{}"})):
        path.write_text(damaged)
        assert again.read() is None
    assert Cache("", facts(), options).decide(["peer", "nccl"], "auto") == b"measure"


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    options = RefitOptions(cache_dir=str(tmp_path / "file" / "links"))
    Cache(options.cache_dir, facts(), options).keep(Links({}, 1.0, 0.0, 0.0))
    assert "policy.refit.cache_dir" in caplog.text


def test_a_transport_that_fails_while_it_is_measured_is_named():
    def broken(setting):
        raise OSError("no such device")

    control = Control(0, World((0,), (0,)), dist.HashStore(), 5.0)
    with pytest.raises(TransferError, match="'gloo' failed while links were measured: no such device.*measure_links"):
        measure(control, [replace(TRANSPORTS["gloo"], mover=broken)], RefitOptions(), torch.device("cpu"))


def test_one_rank_alone_measures_itself():
    control = Control(0, World((0,), (0,)), dist.HashStore(), 5.0)
    links = measure(control, [TRANSPORTS["gloo"]], RefitOptions(), torch.device("cpu"))
    rates = links.rates["gloo"]
    assert 1e6 < rates.short_bytes_per_s <= rates.run_bytes_per_s and links.digest_bytes_per_s > 1e6
    assert not rates.one_sided and rates.start_s > 0 and links.meet_s > 0
