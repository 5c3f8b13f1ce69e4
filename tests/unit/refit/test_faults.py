"""Planted faults of order, time and storage: each must end as a named error on all ranks, with no version committed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.errors import AgreementError, PoisonedError, RefitError, TransferError, VerificationError
from nemo_rl.refit.layout import Holding, Layout
from nemo_rl.refit.misc import RootSink
from nemo_rl.refit.plan import MiscBuffer
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.proof import Refusal, prove
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.board import Board
from nemo_rl.refit.transports.inproc import Hub, InprocChannel

from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes

WHOLE = Region.whole
FAST = RefitOptions(deadline_s=2)


def model(table, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bytes(meta.shape, meta.dtype, generator) for name, meta in table.items()}


def experts(count=6):
    return make_table({f"experts.{e}.w": ((8, 32), torch.float32) for e in range(count)})


def rows_of(table, names=None):
    return [(f, WHOLE(m.shape)) for f, m in table.items() if names is None or f in names]


def pair(landing, other=None, options=FAST, table=None):
    """Two trainers that split the tensors, two generators that take all."""
    table = table or experts()
    full, names = model(table), list(table)
    half = len(names) // 2
    sources = [PlainSource.of(full, table, rows_of(table, part)) for part in (names[:half], names[half:])]
    landings = [landing(rows_of(table)), (other or PlainLanding)(rows_of(table))]
    sim = SimulatedWorld(sources, landings, options)
    raise_any(sim.start())
    return sim, sources, landings, full


def nobody_committed(results, landings):
    assert all(isinstance(r, RefitError) for r in results.values()), results
    assert all(landing.rejected for landing in landings)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("bucket", [1024, 1500, 4096])
def test_whole_tensors_arrive_under_their_own_names_whoever_holds_them(bucket, verify):
    options = RefitOptions(transport="broadcast", bucket_bytes=bucket, deadline_s=20, verify=verify)
    table = make_table({f"experts.{e}.w": ((8, 32 + 4 * (e % 3)), torch.float32) for e in range(9)})
    sim, _, landings, full = pair(PlainLanding, options=options, table=table)
    raise_any(reports := sim.refit(1))
    for landing in landings:
        assert all(same_bytes(landing.whole[f], full[f]) for f in table)
    assert all(r.verified is verify for r in reports.values())


def test_whole_tensors_leave_in_order_when_the_roots_own_come_last():
    table = experts(6)
    full, names = model(table), list(table)
    sources = [PlainSource.of(full, table, rows_of(table, part)) for part in (names[3:], names[:3])]
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld(sources, [landing], RefitOptions(transport="broadcast", bucket_bytes=1024, deadline_s=5))
    raise_any(plans := sim.start())
    assert len(plans[0].misc_buffers) == 6
    raise_any(sim.refit(1))
    assert list(landing.whole) == names and all(same_bytes(landing.whole[f], full[f]) for f in table)


def test_a_buffer_that_would_leave_out_of_order_is_a_bug():
    table = experts(3)
    layouts = {0: Layout.from_regions(rows_of(table), table)}
    declared = {1: Declaration(layouts[0], dict.fromkeys(table, "cast"))}
    plan = plan_refit(World.of(1, 1), layouts, declared, table, bucket_bytes=1024)
    sink = RootSink(plan, InprocChannel(Hub(), 0), torch.device("cpu"), time.monotonic() + 2.0)
    for unit in (1, 0):
        sink.open(unit)
    with pytest.raises(AssertionError, match="buffer 1 is whole before buffer 0"):
        sink.close(1)


def test_a_root_whose_generators_do_not_listen_gives_up_by_name():
    class Deaf(InprocChannel):
        def broadcast(self, buffer, root, ranks):
            return self.recv(buffer, 1, 5)  # waits for what never comes, as a socket whose other end is gone

    table = experts(2)
    options = RefitOptions(transport="broadcast", deadline_s=1)
    source, landing = PlainSource.of(model(table), table, rows_of(table)), PlainLanding(rows_of(table))
    sim = SimulatedWorld([source], [landing], options, lambda rank, t: Deaf(t._hub, rank) if rank == 0 else t)
    raise_any(sim.start())
    results = sim.refit(1)
    assert all(isinstance(r, RefitError) for r in results.values()) and landing.version == -1
    assert "sending whole tensors experts.0.w, experts.1.w (2048 bytes) to the generators" in str(results[0])


def test_whole_tensors_without_bytes_do_not_travel():
    table = make_table({"a": ((4,), torch.float32), "b": ((0, 4), torch.float32)})
    full = model(table)
    landing = PlainLanding(rows_of(table), misc={"b": "cast"})
    sim = SimulatedWorld([PlainSource.of(full, table, rows_of(table))], [landing], FAST)
    raise_any(plans := sim.start())
    assert [buffer.num_bytes for buffer in plans[0].misc_buffers] == [0]
    raise_any(sim.refit(1))
    assert landing.whole["b"].shape == (0, 4)


def test_a_slow_rank_cannot_commit_alone():
    class Slow(PlainLanding):
        def finish(self):
            time.sleep(4)

    sim, _, landings, _ = pair(PlainLanding, Slow)
    nobody_committed(sim.refit(1), landings)
    assert all(landing.version == -1 for landing in landings)


def test_a_commit_that_fails_on_one_rank_fails_on_all():
    class Broken(PlainLanding):
        def commit(self, version):
            raise RuntimeError("the prefix cache does not reset")

    sim, _, landings, _ = pair(PlainLanding, Broken)
    results = sim.refit(1)
    nobody_committed(results, landings)
    assert any("prefix cache" in str(r) for r in results.values())


@pytest.mark.parametrize("meets", ["board", "store"])
def test_a_slow_commit_is_no_success_of_the_slow_rank(meets, monkeypatch):
    """Others gave up on it and refuse; all that it finds at the last meeting is what they said before."""

    class Slow(PlainLanding):
        def commit(self, version):
            time.sleep(1)
            super().commit(version)

    if meets == "store":
        monkeypatch.setattr(Board, "open", lambda *_, **__: None)
    sim, _, landings, _ = pair(PlainLanding, Slow, RefitOptions(deadline_s=0.5))
    nobody_committed(sim.refit(1), landings)


@pytest.mark.parametrize("meets", ["board", "store"])
def test_a_rank_that_stood_still_while_all_came_moves_nothing(meets, monkeypatch):
    """Others gave up on it, and their engines may have been given to another session."""
    if meets == "store":
        monkeypatch.setattr(Board, "open", lambda *_, **__: None)
    sim, _, landings, _ = pair(PlainLanding, options=RefitOptions(deadline_s=1))
    before = [[t.clone() for t in landing.storage] for landing in landings]
    for session in sim.sessions[:2]:
        control = session._link.control
        where, name = (control, "gather") if control.board is None else (control.board, "meet")

        inner = getattr(where, name)

        def stopped(phase, *args, inner=inner):
            told = inner(phase, *args)
            time.sleep(1.5 if phase == "begin" else 0)
            return told

        setattr(where, name, stopped)
    results = sim.refit(1)
    nobody_committed(results, landings)
    assert all("all ranks came, but a meeting took 1.5 s" in str(results[rank]) for rank in range(2))
    for landing, held in zip(landings, before, strict=True):
        assert all(same_bytes(a, b) for a, b in zip(landing.storage, held, strict=True))


@pytest.mark.parametrize("hook", ["begin", "open", "close", "finish"])
def test_a_hook_that_fails_rejects_everywhere_and_soon(hook):
    def fail(self, *args):
        raise RuntimeError(f"planted in {hook}")

    sim, _, landings, _ = pair(PlainLanding, type("Broken", (PlainLanding,), {hook: fail}), RefitOptions(deadline_s=20))
    started = time.monotonic()
    results = sim.refit(1)
    assert all(isinstance(r, RefitError) for r in results.values())
    assert any(f"planted in {hook}" in str(r) for r in results.values())
    assert all(landing.version == -1 for landing in landings) and time.monotonic() - started < 15


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_an_interrupted_refit_is_over_for_all(interruption):
    """Nothing may go on where it stopped, whatever stopped it."""

    def stop(self, version):
        raise interruption

    sim, _, landings, _ = pair(
        PlainLanding, type("Stopped", (PlainLanding,), {"begin": stop}), RefitOptions(deadline_s=9)
    )

    def refit(session):
        try:
            return session.refit(1)
        except interruption as error:
            return error

    results = sim.all(refit)
    text = f"generator 1 (rank 3) failed in phase 'begin': interrupted by {interruption.__name__}"
    assert isinstance(results.pop(3), interruption)
    assert all(isinstance(r, RefitError) and text in str(r) for r in results.values()), results
    assert isinstance(sim.all(lambda s: s.refit(2), (3,))[3], PoisonedError) and landings[1].rejected


def test_storage_that_moved_is_read_where_it_is():
    sim, sources, landings, _ = pair(PlainLanding)
    raise_any(sim.refit(1))
    newer = model(sources[0].whole, 9)
    for source in sources:
        source.held = [Holding(h.fqn, h.region, newer[h.fqn].clone()) for h in source.held]
    raise_any(sim.refit(2))
    assert all(same_bytes(t, newer[f]) for f, t in zip(newer, landings[0].storage, strict=True))
    sources[0].held = sources[0].held[:-1]
    assert any(isinstance(r, AgreementError) and "other regions or dtypes" in str(r) for r in sim.refit(3).values())


@pytest.mark.parametrize(
    "change, text",
    [
        (torch.Tensor.double, "dtypes than it declared: experts.0.w [0:8, 0:32] torch.float64 instead of experts.0.w"),
        (partial(torch.Tensor.to, dtype=torch.int32), "other regions or dtypes"),
        (partial(torch.Tensor.to, device="meta"), "is on meta"),
    ],
)
def test_a_source_that_became_another_one_is_refused(change, text):
    sim, sources, landings, _ = pair(PlainLanding)
    raise_any(sim.refit(1))
    first = sources[0].held[0]
    sources[0].held = [Holding(first.fqn, first.region, change(first.view)), *sources[0].held[1:]]
    results = sim.refit(2)
    assert any(isinstance(r, AgreementError) and r.phase == "digest" and text in str(r) for r in results.values())
    assert all(landing.version == 1 for landing in landings)


@pytest.mark.parametrize("transport", ["peer", "gloo", "golden"])
@pytest.mark.parametrize(
    "opened",
    [torch.zeros(2, 32), torch.zeros(9, 32), torch.zeros(8, 32, dtype=torch.int32), torch.zeros(8, 32, device="meta")],
    ids=["short", "long", "other type", "other device"],
)
@pytest.mark.parametrize("unit", [-1, 0])
def test_a_parameter_that_the_engine_replaced_by_another_is_not_written_to(unit, opened, transport):
    sim, _, landings, _ = pair(
        lambda rows: PlainLanding(rows, [unit] * len(rows)), options=replace(FAST, transport=transport)
    )
    raise_any(sim.refit(1))
    inner = landings[0].open
    landings[0].open = lambda which: {**inner(which), 0: opened}
    results = sim.refit(2)
    words = "for torch.float32 (8, 32) cpu, as which experts.0.w [0:8, 0:32] was declared"
    assert isinstance(results[2], TransferError) and words in str(results[2])
    assert all(isinstance(r, RefitError) for r in results.values()) and landings[0].rejected


def test_a_row_that_the_engine_does_not_open_is_named():
    sim, _, landings, _ = pair(PlainLanding)
    inner = landings[0].open
    landings[0].open = lambda unit: {row: view for row, view in inner(unit).items() if row != 3}
    assert "opened nothing for torch.float32 (8, 32) cpu, as which experts.3.w " in str(sim.refit(1)[2])


def test_a_loader_that_writes_over_what_landed_is_caught():
    class Careless(PlainLanding):
        def load_misc(self, tensors):
            super().load_misc(tensors)
            self.storage[1].zero_()

    table = experts(4)
    full = model(table)
    landing = Careless(rows_of(table), misc={"experts.0.w": "computed"})
    sim = SimulatedWorld([PlainSource.of(full, table, rows_of(table))], [landing], FAST)
    raise_any(sim.start())
    results = sim.refit(1)
    assert isinstance(results[1], VerificationError) and "experts.1.w" in str(results[1])


def test_whole_tensors_damaged_on_the_way_are_caught():
    class Bent(PlainLanding):
        def load_misc(self, tensors):
            super().load_misc(tensors)

    table = experts(2)
    full = model(table)
    landing = Bent(rows_of(table), misc=dict.fromkeys(table, "computed"))
    sim = SimulatedWorld([PlainSource.of(full, table, rows_of(table))], [landing], FAST)
    raise_any(sim.start())
    inner = sim.sessions[1]._link.channel
    whole = inner.broadcast

    def broadcast(buffer, root, ranks):
        pending = whole(buffer, root, ranks)

        class Flipped:
            def wait(self, deadline_s):
                pending.wait(deadline_s)
                buffer[5] ^= 4

        return Flipped()

    inner.broadcast = broadcast
    results = sim.refit(1)
    assert isinstance(results[1], VerificationError) and "experts.0.w" in str(results[1])


def test_a_loader_that_stops_early_is_caught_even_without_digests():
    class Lazy(PlainLanding):
        def load_misc(self, tensors):
            next(iter(tensors))

    table = experts(4)
    options = RefitOptions(transport="broadcast", deadline_s=2, verify=False, bucket_bytes=1024)
    landing = Lazy(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], options)
    raise_any(sim.start())
    results = sim.refit(1)
    assert isinstance(results[1], TransferError) and landing.version == -1


def test_a_new_session_does_not_go_back_in_versions():
    sim, sources, landings, _ = pair(PlainLanding)
    raise_any(sim.refit(7))
    again = SimulatedWorld(sources, landings, FAST)
    keep = [(landing.version, landing.storage) for landing in landings]
    raise_any(again.all(lambda s: s.connect()))
    for landing, (version, storage) in zip(landings, keep, strict=True):
        landing.declare = lambda table, lan=landing: Declaration(Layout.from_regions(lan.rows, table, lan.unit))
        landing.version, landing.storage = version, storage
    raise_any(again.all(lambda s: s.plan()))
    results = again.refit(3)
    assert all(isinstance(r, RefitError) for r in results.values())
    assert any("version 3 was asked for after version 7" in str(r) for r in results.values())
    assert all(landing.version == 7 and not landing.rejected for landing in landings), "they serve on"


def test_empty_tensors_scalars_and_strided_single_elements():
    table = make_table(
        {
            "a.empty": ((0, 4), torch.float32),
            "b.one": ((1,), torch.float32),
            "c": ((), torch.float64),
            "d": ((3,), torch.uint8),
        }
    )
    full = model(table)
    source = PlainSource.of(full, table, rows_of(table))
    source.held = [
        replace(h, view=torch.randn(2)[::2].copy_(full["b.one"])) if h.fqn == "b.one" else h for h in source.held
    ]
    for transport in ("auto", "broadcast", "golden"):
        landing = PlainLanding(rows_of(table), [4, -1, -1, 2])
        options = RefitOptions(transport=transport, deadline_s=5, bucket_bytes=1024)
        sim = SimulatedWorld([source], [landing], options)
        raise_any(sim.start())
        raise_any(sim.refit(1))
        got = landing.whole if transport == "broadcast" else dict(zip(table, landing.storage, strict=True))
        assert all(same_bytes(got[f], full[f]) for f in table), transport


def test_a_unit_without_bytes_on_a_rank_is_still_processed():
    class Counting(PlainLanding):
        closed: list = []

        def close(self, unit):
            self.closed.append(unit)
            super().close(unit)

    table = make_table({"a": ((4,), torch.float32), "b": ((4,), torch.float32)})
    landing = Counting([("a", WHOLE((4,))), ("b", Region((4,), (0,)))], [0, 1])
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert sorted(landing.closed) == [0, 1]


@pytest.mark.parametrize(
    "fault", ["overlap", "short", "lost", "unasked", "half unit", "reason only", "row", "dtype", "bucket"]
)
def test_the_proof_catches_damage_around_whole_tensors(fault):
    table = make_table({f"t{i}": ((8,), torch.float32) for i in range(4)})
    layout = Layout.from_regions(rows_of(table), table, [5, 5, -1, -1])
    declared = {1: Declaration(layout, {"t0": "cast", "t1": "cast"})}
    sources = {0: Layout.from_regions(rows_of(table), table)}
    plan = plan_refit(World.of(1, 1), sources, declared, table)
    buffer = plan.misc_buffers[0]
    damaged = {
        "overlap": lambda: replace(plan, misc_buffers=(MiscBuffer(buffer.fqns, (0, 16), 48),)),
        "short": lambda: replace(plan, misc_buffers=(replace(buffer, num_bytes=40),)),
        "lost": lambda: replace(plan, misc_buffers=(MiscBuffer(("t0",), (0,), 32),)),
        "bucket": lambda: replace(plan, bucket_bytes=24),
        "reason only": lambda: replace(plan, misc_reasons={**plan.misc_reasons, "t2": "none"}),
        "row": lambda: replace(plan, bulk=replace(plan.bulk, src_row=plan.bulk.src_row * 0 - 1)),
    }
    if fault in damaged:
        plan = damaged[fault]()
    if fault == "unasked":
        declared = {1: Declaration(layout, {**declared[1].misc, "t2": "cast"})}
    if fault == "half unit":
        declared = {1: Declaration(Layout.from_regions(rows_of(table), table, [5, 5, 5, -1]), declared[1].misc)}
    if fault == "dtype":
        other = make_table({f"t{i}": ((8,), torch.int32) for i in range(4)})
        sources = {0: Layout.from_regions(rows_of(other), other)}
    with pytest.raises(Refusal):
        prove(plan, sources, declared)
