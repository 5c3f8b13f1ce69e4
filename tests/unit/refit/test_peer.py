"""The `peer` transport without GPUs: forms of strided boxes, memory of other processes, and who may use it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from nemo_rl.refit import strided
from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import RefitError, TransferError, VerificationError
from nemo_rl.refit.layout import Holding
from nemo_rl.refit.pipeline import Tracker
from nemo_rl.refit.region import Region
from nemo_rl.refit.strided import Axis, Form, Jobs, Rows, form_of, merged
from nemo_rl.refit.transports import carry, copy_engine, grouped, host_memory, parcels, peer, registry
from nemo_rl.refit.transports.host_memory import HostMemory
from nemo_rl.refit.transports.mover import Fact
from nemo_rl.refit.verify import Verifier
from nemo_rl.refit.watch import Watch

from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes


def random_view(rng, shape, dtype, generator):
    """A view of `shape` with permuted axes and gaps, and the storage it lies in."""
    order = rng.sample(range(len(shape)), len(shape))
    padded = [shape[a] + rng.choice((0, 0, 3)) for a in order]
    whole = random_bytes(tuple(padded), dtype, generator)
    cut = whole[tuple(slice(0, shape[a]) for a in order)]
    return cut.permute([order.index(a) for a in range(len(shape))]), whole


def form_between(src, dst):
    item = src.element_size()
    return form_of(tuple(src.shape), *(tuple(s * item for s in t.stride()) for t in (src, dst)), item)


def test_forms_merge_what_is_contiguous():
    a, b = torch.empty(6, 4, 8), torch.empty(6, 4, 8)
    assert form_between(a, b) == Form((), 6 * 4 * 8 * 4, 4)
    assert form_between(a[:, 1:3], b[:, 2:]) == Form((Axis(6, 128, 128),), 64, 4)
    assert form_between(a[:, :, :4], b[:, :, :4]) == Form((Axis(24, 32, 32),), 16, 4)
    assert form_between(a.transpose(0, 1), b.transpose(0, 1)) == Form((), 6 * 4 * 8 * 4, 4), "order is memory's"
    assert form_between(a[0, 0, :1], b[0, 0, :1]) == Form((), 4, 4)


@pytest.mark.parametrize("seed", range(40))
def test_any_box_is_read_into_any_other(seed, monkeypatch):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(host_memory, "_SCRATCH", 64)
    monkeypatch.setattr(host_memory, "_MAX_PIECES", rng.choice((3, 1024)))
    monkeypatch.setattr(host_memory, "_LONG", rng.choice((1, 16, 4096)))
    dtype = rng.choice((torch.uint8, torch.bfloat16, torch.float32, torch.int64))
    shape = [rng.choice((1, 2, 5, 7)) for _ in range(rng.randint(0, 4))]
    (src, _), (dst, whole) = (random_view(rng, shape, dtype, generator) for _ in range(2))
    expected = whole.clone()
    expected.as_strided(dst.shape, dst.stride()).copy_(src)
    jobs = Jobs(np.array([src.data_ptr()]), np.array([dst.data_ptr()]), (form_between(src, dst),))
    HostMemory().prepare(os.getpid(), jobs, put=False, ordered=True)()
    assert same_bytes(whole, expected), "every byte of the box and none beside it"


def carry_out(block):
    """A copy that the copy engine is told, on the CPU; every byte moves once."""
    assert block.height == 1 or block.width <= min(block.src_pitch, block.dst_pitch), "CUDA refuses such pitches"
    assert block.depth == 1 or block.height <= min(block.src_height, block.dst_height), "CUDA refuses such heights"
    for z in range(block.depth):
        for y in range(block.height):
            there = block.src + (z * block.src_height + y) * block.src_pitch
            ctypes.memmove(block.dst + (z * block.dst_height + y) * block.dst_pitch, there, block.width)


@pytest.mark.parametrize("seed", range(40))
def test_copies_of_the_engine_make_up_a_box(seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [rng.choice((1, 2, 5, 7)) for _ in range(rng.randint(0, 5))]
    (src, _), (dst, whole) = (random_view(rng, shape, torch.int16, generator) for _ in range(2))
    expected = whole.clone()
    expected.as_strided(dst.shape, dst.stride()).copy_(src)
    for block in copy_engine._blocks(src.data_ptr(), dst.data_ptr(), form_between(src, dst)):
        carry_out(block)
    assert same_bytes(whole, expected)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_up_a_box(seed):
    rng = random.Random(100 + seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [rng.choice((1, 2, 5, 7)) for _ in range(rng.randint(0, 5))]
    (src, _), (dst, whole) = (random_view(rng, shape, torch.int16, generator) for _ in range(2))
    expected = whole.clone()
    expected.as_strided(dst.shape, dst.stride()).copy_(src)
    for there, here, size in copy_engine._pieces(src.data_ptr(), dst.data_ptr(), form_between(src, dst)).tolist():
        ctypes.memmove(there, here, size)
    assert same_bytes(whole, expected)


@pytest.mark.parametrize(
    ("sizes", "run", "batched", "way"),
    [
        ((), 1 << 30, True, "pieces"),
        ((), 3 << 19, True, "pieces"),
        ((), 3 << 19, False, "kernel"),  # in calls of their own, short copies cost as much as their bytes
        ((), 1 << 12, True, "kernel"),
        ((2,), 3 << 19, True, "pieces"),
        ((2048,), 768, True, "kernel"),
        ((64 * 2048,), 768, True, "calls"),
        ((1 << 20,), 64, True, "kernel"),
    ],
)
def test_the_fastest_way_of_a_form(sizes, run, batched, way):
    axes = tuple(Axis(size, 2 * run, run) for size in sizes)
    assert copy_engine._fastest(Form(axes, run, 2), 1, batched) == way


@pytest.mark.parametrize(("gap", "blocks"), [(0, 1), (40, 1), (None, 12)])
def test_experts_at_constant_steps_are_one_copy(gap, blocks):
    """Halves of gate and up of 12 experts: in one trainer buffer, with `gap` between experts, or anywhere (None)."""
    rng, (rows, cols) = random.Random(3), (4, 10)
    step = 2 * rows * cols + (gap or 0)
    places = [e * step for e in range(12)]
    if gap is None:
        places = [place + rng.randrange(30) for place in (p * 2 for p in places)]
    source = torch.randint(0, 256, (places[-1] + step + 64,), dtype=torch.uint8)
    experts = [source[p : p + 2 * rows * cols].view(2, rows, cols) for p in places]
    landed, expected = (torch.randint(0, 256, (12, 2, rows // 2, cols), dtype=torch.uint8) for _ in range(2))
    views = [(experts[e][j, : rows // 2], landed[e, j]) for e in range(12) for j in range(2)]
    for e in range(12):
        expected[e] = experts[e][:, : rows // 2]
    addresses = np.array([[src.data_ptr(), dst.data_ptr()] for src, dst in views], np.int64)
    apart = Jobs(addresses[:, 0], addresses[:, 1], tuple(form_between(*pair) for pair in views))
    jobs = merged(apart, np.zeros(len(apart), np.int64))
    made = [b for i, f in enumerate(jobs.forms) for b in copy_engine._blocks(int(jobs.src[i]), int(jobs.dst[i]), f)]
    assert len(made) <= blocks
    for block in made:
        carry_out(block)
    assert torch.equal(landed, expected)


def test_copies_of_different_allocations_stay_apart():
    """Addresses may grow by constant steps across allocations; an engine copies within one only."""
    at = np.arange(6, dtype=np.int64) * 4096
    apart = Jobs(at, at + (1 << 30), (form_of((64,), (1,), (1,), 1),) * 6)
    assert len(merged(apart, np.zeros(6, np.int64))) == 1
    halves = merged(apart, np.array([0, 0, 0, 1, 1, 1]))
    assert sorted(halves.src.tolist()) == [0, 3 * 4096] and [f.num_bytes for f in halves.forms] == [192, 192]
    assert len(merged(apart, np.arange(6))) == 6


def test_a_read_that_the_kernel_cuts_short_goes_on(monkeypatch):
    inner = host_memory._readv

    def short(pid, here, count, there, many, flags):
        first = np.ctypeslib.as_array((ctypes.c_int64 * 2).from_address(there)).copy()
        return inner(pid, here, count, np.array([[first[0], min(first[1], 5)]]).ctypes.data, 1, flags)

    monkeypatch.setattr(host_memory, "_readv", short)
    src, dst = torch.arange(40, dtype=torch.uint8).view(4, 10), torch.zeros(4, 10, dtype=torch.uint8)
    host_memory._read(
        os.getpid(),
        np.array([[src.data_ptr(), 13], [src.data_ptr() + 20, 20]]),
        np.array([[dst.data_ptr(), 20], [dst.data_ptr() + 20, 13]]),
    )
    assert dst.view(-1)[:33].tolist() == [*range(13), *range(20, 40)]


def test_reads_that_fail_later_name_who_is_read():
    sim, *_ = small_world()
    raise_any(sim.start())

    def failed(end):
        raise OSError(5, "the device is lost")

    sim.sessions[1]._agreed.mover._memory.wait = failed
    error = sim.refit(0)[1]
    assert isinstance(error, TransferError) and "reading from trainer 0 (rank 0): " in str(error)


def test_a_process_that_ended_or_hides_its_memory():
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    memory, gone = HostMemory(), int(child.stdout)
    pid, address, secret = json.loads(memory.beacon())
    assert memory.probe(memory.beacon()) is None
    assert "cannot be read: No such process" in memory.probe(json.dumps([gone, address, secret]))
    assert "is another one" in memory.probe(json.dumps([pid, address, "00" * 16]))
    assert "cannot be read: Bad address" in memory.probe(json.dumps([pid, 8, secret]))


def test_who_may_use_it():
    world = World.of(1, 1)
    here = Fact("a", "cpu", False, HostMemory().beacon())
    assert peer.unsupported(1, world, {0: here, 1: here}) is None
    for other, text in (
        (Fact("b", "cpu", False, ""), "another host"),
        (Fact("a", "cuda", False, ""), "on cuda, this rank on cpu"),
        (Fact("a", "cpu", False, json.dumps([os.getpid(), 8, "00"])), "cannot be read"),
    ):
        assert text in peer.unsupported(1, world, {0: other, 1: here})


def small_world(**options):
    table = make_table({"a": ((8, 6), torch.float32), "b": ((5,), torch.bfloat16), "c": ((4, 4, 3), torch.uint8)})
    generator = torch.Generator().manual_seed(3)
    full = {f: random_bytes(m.shape, m.dtype, generator) for f, m in table.items()}
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    source, landing = PlainSource.of(full, table, rows), PlainLanding(rows, [-1, 0, 1])
    given = RefitOptions(transport="peer", deadline_s=5, **options)
    return SimulatedWorld([source], [landing], given), source, landing, full


def test_storage_that_moved_is_shown_again():
    sim, source, landing, full = small_world()
    raise_any(sim.start())
    raise_any(sim.refit(0))
    shown = sim.sessions[1]._agreed.mover._windows.ends[0, "source"]
    raise_any(sim.refit(1))
    assert sim.sessions[1]._agreed.mover._windows.ends[0, "source"] is shown, "told once while storage stays"
    other = PlainSource.of({f: t.flip(0) for f, t in full.items()}, source.whole, landing.rows)
    old, source.held = source.held, other.held
    raise_any(sim.refit(2))
    assert all(same_bytes(t, full[f].flip(0)) for (f, _), t in zip(landing.rows, landing.storage, strict=True)), old


@pytest.mark.parametrize("puts", [False, True])
def test_rows_without_elements_lie_nowhere(puts, monkeypatch, caplog):
    """Their address is 0, of which a GPU has no allocation to show."""
    table = make_table({"a": ((8, 6), torch.float32), "b": ((0, 4), torch.float32), "c": ((5,), torch.bfloat16)})
    generator = torch.Generator().manual_seed(3)
    full = {f: random_bytes(m.shape, m.dtype, generator) for f, m in table.items()}
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    show, shown = HostMemory.show, []

    def strict(self, views):
        if any(view.data_ptr() == 0 for view in views):
            raise OSError("finding an allocation: invalid argument")
        shown.append(len(views))
        return show(self, views)

    monkeypatch.setattr(HostMemory, "puts", puts)
    monkeypatch.setattr(HostMemory, "show", strict)
    source, landing = PlainSource.of(full, table, rows), PlainLanding(rows)
    sim = SimulatedWorld([source], [landing], RefitOptions(transport="peer", deadline_s=5))
    raise_any(sim.start())
    raise_any(sim.refit(0))
    assert all(same_bytes(t, full[f]) for (f, _), t in zip(rows, landing.storage, strict=True))
    assert set(shown) == {2} and "neither forwards nor is written to" not in caplog.text


def test_memory_that_rows_left_is_not_kept_mapped(monkeypatch):
    """It would not be free at its owner, and stand for what the owner has at the same place later."""
    numbers, kept = iter(range(99)), []
    show = HostMemory.show

    def named(self, views):
        windows, where = show(self, views)
        return [*windows, f"allocation {next(numbers)}"], where

    monkeypatch.setattr(HostMemory, "show", named)
    monkeypatch.setattr(HostMemory, "keep", lambda _, windows: kept.append(sorted(windows)))
    sim, source, _, _ = small_world()
    raise_any(sim.start())
    raise_any(sim.refit(0))
    first = kept[-1]
    raise_any(sim.refit(1))
    assert len(kept) == 1 and first[1].startswith("allocation"), "mapped once while storage stays"
    source.held = [Holding(h.fqn, h.region, h.view.clone()) for h in source.held]
    raise_any(sim.refit(2))
    assert len(kept) == 2 and len(kept[1]) == 2 and kept[1][1] > first[1], "what it has, and nothing else"


def test_bytes_that_change_on_the_way_are_caught():
    sim, _, landing, _ = small_world()
    raise_any(sim.start())
    memory = sim.sessions[1]._agreed.mover._memory
    inner = memory._read_all

    def damaged(pid, jobs):
        inner(pid, jobs)
        if 0 in landing.staged:
            landing.staged[0][1].view(torch.uint8)[3] ^= 1

    memory._read_all = damaged
    results = sim.refit(0)
    assert isinstance(results[1], VerificationError) and "b [0:5]" in str(results[1])
    assert landing.version == -1 and landing.rejected


def two_trainers():
    """Each has half of the rows; all of them land in place at one generator, a batch from each trainer."""
    table = make_table({f"layers.{i}": ((6, 4), torch.float32) for i in range(4)})
    generator = torch.Generator().manual_seed(5)
    full = {f: random_bytes(m.shape, m.dtype, generator) for f, m in table.items()}
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    sources = [PlainSource.of(full, table, half) for half in (rows[:2], rows[2:])]
    landing = PlainLanding(rows)
    sim = SimulatedWorld(sources, [landing], RefitOptions(transport="peer", deadline_s=5))
    raise_any(sim.start())
    return sim, landing


def test_a_batch_that_writes_where_an_earlier_one_landed_is_caught():
    """Also where each batch could be looked at as soon as it landed: copies that never ran are looked at in the end."""
    sim, landing = two_trainers()
    memory, number = sim.sessions[2]._agreed.mover._memory, iter(range(99))
    inner = memory.prepare

    def astray(*args, **how):
        start, late = inner(*args, **how), next(number) == 1

        def begin():
            start()
            if late:
                for tensor in landing.storage:
                    tensor.view(-1).view(torch.uint8)[7] ^= 1

        return begin

    memory.prepare = astray
    results = sim.refit(0)
    assert next(number) == 2, "two batches"
    assert isinstance(results[2], VerificationError) and "4 pieces differ" in str(results[2])
    assert landing.version == -1 and landing.rejected


def test_rows_that_interleave_are_apart(monkeypatch):
    """Halves of stacked matrices, columns, scalars; a byte that two rows share, an expanded row, and too many runs."""
    base = torch.zeros(3, 4, 5, dtype=torch.int16)

    def apart(*views):
        address, strides = [v.data_ptr() for v in views], [[2 * s for s in v.stride()] for v in views]
        rows = Rows(np.array(address, np.int64), np.array(strides, np.int64))
        return rows.apart(np.array([v.shape for v in views], np.int64), np.full(len(views), 2, np.int64))

    assert apart(base[:, :2], base[:, 2:]) and apart(base[..., :3], base[..., 3:]) and apart(base.mT)
    assert apart(base[:0], base) and not apart(base, base[2:, 3:, 4:])
    assert not apart(base[:, :3], base[:, 2:]) and not apart(base[:1].expand(3, 4, 5))
    monkeypatch.setattr(strided, "MOST_RUNS", 5)
    assert not apart(base[:, :2], base[:, 2:]) and apart(base)


@pytest.mark.parametrize("transport", ["peer", "nccl"])
def test_rows_that_share_memory_are_looked_at_in_the_end(transport, monkeypatch):
    """Also where both had the same bytes in all refits before: each is right as soon as it landed."""
    monkeypatch.setattr(carry, "_MOST_RUNNING", 1)
    monkeypatch.setattr(HostMemory, "step_bytes", 1536)
    monkeypatch.setattr(HostMemory, "mark", lambda self: partial(next, iter([False]), True))  # as if it took time
    monkeypatch.setattr(grouped, "DIGEST_BYTES", 1)
    monkeypatch.setattr(grouped, "AHEAD", -2)
    monkeypatch.setattr(parcels, "PACKED_BYTES", 1536)
    monkeypatch.setitem(registry.TRANSPORTS, "nccl", replace(registry.TRANSPORTS["nccl"], unsupported=lambda *_: None))
    table = make_table({f"layers.{i}": ((6, 64), torch.float32) for i in range(4)})
    generator = torch.Generator().manual_seed(5)
    full = {f: random_bytes(m.shape, m.dtype, generator) for f, m in table.items()}
    full["layers.0"] = full["layers.2"].clone()
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    source, landing = PlainSource.of(full, table, rows), PlainLanding(rows)
    sim = SimulatedWorld([source], [landing], RefitOptions(transport=transport, deadline_s=5, bucket_bytes=1536))
    raise_any(sim.start())
    landing.storage[2] = landing.storage[0]
    for version in range(2):
        landing.scramble()
        raise_any(sim.refit(version))
    full["layers.0"] = random_bytes((6, 64), torch.float32, generator)
    source.load(full)
    error = sim.refit(2)[1]
    assert isinstance(error, VerificationError) and "layers.0 [0:6, 0:64]" in str(error)
    assert landing.version == 1 and landing.rejected


@pytest.mark.parametrize("puts", [False, True])
def test_batches_that_ran_before_are_looked_at_as_soon_as_they_landed(puts, monkeypatch):
    monkeypatch.setattr(HostMemory, "puts", puts)
    sim, landing = two_trainers()
    inner, seen = Tracker.digest_in_place, []

    def looked(self):
        seen.append(bool(self.ledger.taken.all()))
        inner(self)

    monkeypatch.setattr(Tracker, "digest_in_place", looked)
    for version in range(3):
        landing.scramble()
        raise_any(sim.refit(version))
    landing.storage = [t.clone() for t in landing.storage]  # other copies are prepared
    for version in (3, 4):
        raise_any(sim.refit(version))
    source = sim.sessions[1]._source  # also here, by who moves the bytes
    source.held = [Holding(h.fqn, h.region, h.view.clone()) for h in source.held]
    for version in (5, 6):
        raise_any(sim.refit(version))
    assert seen == [False, True, True, False, True, False, True]


def race(sim, puts, when, monkeypatch):
    """Trainer 0's weights change once: before, between or after steps of what moves them, and nobody looks a second
    time before that. Returns what is no longer empty when they did."""
    memory, changed = sim.sessions[0 if puts else 2]._agreed.mover._memory, []
    name = "_write_all" if puts else "_read_all"
    inner, count, watch = getattr(memory, name), iter(range(99)), Watch.step
    due = 0 if puts or when == "before" else 1

    def racing(pid, jobs):
        step = next(count) == due
        if step and when != "after":
            change()
        inner(pid, jobs)
        if step and when == "after":
            change()

    def change():
        for holding in sim.sessions[0]._source.held:
            holding.view.view(torch.int32).add_(1)
        changed.append(when)

    monkeypatch.setattr(Watch, "step", lambda self: watch(self) if changed else None)
    setattr(memory, name, racing)
    return changed


@pytest.mark.parametrize("puts", [False, True])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_source_that_changes_during_the_transfer(when, puts, monkeypatch):
    """An optimizer step that races the refit; whatever lands is of one version, or the version is refused."""
    monkeypatch.setattr(HostMemory, "puts", puts)
    sim, landing = two_trainers()
    raise_any(sim.refit(0))
    changed = race(sim, puts, when, monkeypatch)  # in which the looks are far apart
    raise_any(sim.all(lambda s: s.prepare(1)))  # looks for the first time
    results = sim.refit(1)
    assert len(changed) == 1
    text = "trainer 0 (rank 0) held digest"
    assert isinstance(results[0], VerificationError) and "layers.0 " in str(results[0]) and text in str(results[0])
    assert all(isinstance(r, RefitError) for r in results.values()) and landing.version == 0 and landing.rejected


@pytest.mark.parametrize(
    ("when", "puts"), [("before", False), ("between", False), ("after", False), ("before", True), ("after", True)]
)
def test_a_source_that_changes_before_its_first_look(when, puts, monkeypatch):
    """Where nobody prepared, copies go first: what landed is what trainers hold, or the version is refused."""
    monkeypatch.setattr(HostMemory, "puts", puts)
    sim, landing = two_trainers()
    raise_any(sim.refit(0))
    changed = race(sim, puts, when, monkeypatch)
    results = sim.refit(1)
    assert len(changed) == 1
    if when == "before":
        raise_any(results)
        held = {h.fqn: h.view for session in sim.sessions[:2] for h in session._source.held}
        for (fqn, _), got in zip(landing.rows, landing.storage, strict=True):
            assert same_bytes(got, held[fqn]), fqn
    else:
        assert isinstance(results[2], VerificationError) and "trainer 0 (rank 0) holds digest" in str(results[2])
        assert all(isinstance(r, RefitError) for r in results.values()) and landing.version == 0 and landing.rejected


def test_a_source_that_changes_between_its_looks_and_back_is_caught_by_what_landed(monkeypatch):
    """Both looks see the same; only what landed differs from it."""
    sim, landing = two_trainers()
    memory = sim.sessions[2]._agreed.mover._memory
    inner, held = memory._read_all, sim.sessions[0]._source.held[0].view.view(torch.int32)

    def flickering(pid, jobs):
        held.add_(1)
        inner(pid, jobs)
        held.sub_(1)

    monkeypatch.setattr(Watch, "step", lambda self: None)
    memory._read_all = flickering
    results = sim.refit(0)
    assert isinstance(results[2], VerificationError) and "layers.0 [0:6, 0:4]: trainer 0 (rank 0) holds" in str(
        results[2]
    )
    assert landing.version == -1 and landing.rejected


def test_no_trainer_looks_again_before_all_have_looked(monkeypatch):
    """Else each trainer could be consistent with itself at another moment, and generators get two versions."""
    sim, _ = two_trainers()
    events, look, say, late = [], Verifier.look, Watch._say, time.monotonic() + 0.2

    def slow(watch, first):
        rank = watch._verifier._rank
        if rank == 1 and time.monotonic() < late:
            time.sleep(0.2)
        events.append(f"said {rank}")
        return say(watch, first)

    monkeypatch.setattr(Watch, "_say", slow)
    monkeypatch.setattr(Verifier, "look", lambda v, h: events.append(f"looks {v._rank}") or look(v, h))
    raise_any(sim.refit(0))
    first = [events.index(f"said {rank}") for rank in (0, 1)]
    again = [len(events) - 1 - events[::-1].index(f"looks {rank}") for rank in (0, 1)]
    assert max(first) < min(again) and sum(e.startswith("looks") for e in events) == 4


def test_a_trainer_that_cannot_be_read_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(HostMemory, "probe", lambda self, beacon: "no permission")
    sim, *_ = small_world()
    for result in sim.all(lambda s: s.connect()).values():
        assert isinstance(result, TransferError)
        assert "transport 'peer' is not possible (generator 0 (rank 1): trainer 0 (rank 0): no permission)" in str(
            result
        )
