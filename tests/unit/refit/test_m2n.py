"""Which tensors m2n takes, in which calls, and why not the others; the same mover with a stand-in for the library."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import math
import random
import sys
import threading
import types

import numpy as np
import pytest
import torch

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import TransferError
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports import m2n, registry, resharding
from nemo_rl.refit.transports.lanes import HostLanes
from nemo_rl.refit.transports.mover import Transport
from nemo_rl.refit.transports.resharding import Said, Side, reshards, side_of

from .layouts import random_table, shard_out
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any
from .test_parcels import check, full_model

WHOLE = Region.whole


@pytest.mark.parametrize(
    ("boxes", "shape", "want"),
    [
        ({0: ((0, 0), (8, 4))}, (8, 4), Side(0, (1,), (None,), (8, 4))),
        ({0: ((0, 0), (8, 4)), 1: ((0, 0), (8, 4))}, (8, 4), Side(0, (2,), (None,), (8, 4))),
        ({2: ((0, 0), (8, 2)), 3: ((0, 2), (8, 2))}, (8, 4), Side(2, (2,), (1,), (8, 2))),
        ({r: ((r // 2 * 4, 0), (4, 4)) for r in range(4)}, (8, 4), Side(0, (2, 2), (0, None), (4, 4))),
        ({r: ((r % 2 * 4, 0), (4, 4)) for r in range(4)}, (8, 4), Side(0, (2, 2), (None, 0), (4, 4))),
        ({0: ((4, 0), (4, 4)), 1: ((0, 0), (4, 4))}, (8, 4), "shards [1, 0] of 2"),
        ({0: ((0, 0), (4, 4)), 2: ((4, 0), (4, 4))}, (8, 4), "not consecutive"),
        ({0: ((0, 0), (5, 4)), 1: ((5, 0), (3, 4))}, (8, 4), "uneven"),
        ({0: ((0, 0), (3, 4)), 1: ((3, 0), (3, 4))}, (8, 4), "uneven"),
        ({r: ((r // 2 * 4, r % 2 * 2), (4, 2)) for r in range(4)}, (8, 4), "dims [0, 1]"),
        ({0: ((0, 0), (4, 4))}, (8, 4), "shards [0] of 2"),
    ],
)
def test_meshes_and_placements(boxes, shape, want):
    found = side_of(boxes, shape)
    assert found == want if isinstance(want, Side) else isinstance(found, str) and want in found


def said(*rows):
    """Rows are (tensor, offsets, sizes, address, room, dense)."""
    columns = list(zip(*rows, strict=True)) if rows else [[]] * 6
    kinds = (np.int64, np.int64, np.int64, np.int64, np.int64, bool)
    return Said(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


WORLD = World.of(2, 2)
BOTH = frozenset({2, 3})


def experts(order=(0, 1, 2, 3), gap=0, in_place=(True, True)):
    """Four experts of (4, 6) float32, two whole on each trainer, rows halved by the generators."""
    size, half = 96, 48
    out = {}
    for rank in range(2):
        out[rank] = said(
            *((e, (0, 0), (4, 6), 1000 + (e % 2) * (size + gap), 1, True) for e in (2 * rank, 2 * rank + 1))
        )
    for rank in range(2):
        rows = ((e, (2 * rank, 0), (2, 6), 5000 + order.index(e) * half, 9, True) for e in range(4))
        out[2 + rank] = said(*(rows if in_place[rank] else ()))
    return make_table({f"e.{e}": ((4, 6), torch.float32) for e in range(4)}), out


def calls_of(table, rows, world=WORLD, takers=BOTH):
    return reshards(list(table.values()), world, rows, {i: takers for i in range(len(table))})


def test_experts_of_one_buffer_are_one_call(monkeypatch):
    monkeypatch.setattr(resharding, "LEAST_BYTES", 1)
    calls, reasons = calls_of(*experts())
    assert not reasons and len(calls) == 1
    assert calls[0].tensors == (0, 1, 2, 3)
    assert calls[0].src == Side(0, (2,), (0,), (2, 4, 6)) and calls[0].dst == Side(2, (2,), (1,), (4, 2, 6))
    assert calls[0].address == {0: 1000, 1: 1000, 2: 5000, 3: 5000}


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"gap": 16}, 3),  # apart at the trainers; the second of one and the first of the next are neighbours
        ({"order": (1, 0, 2, 3)}, 3),  # in another order
        ({"order": (2, 3, 0, 1)}, 2),  # of the second trainer first
    ],
)
def test_experts_that_do_not_follow_each_other_are_several_calls(given, count, monkeypatch):
    monkeypatch.setattr(resharding, "LEAST_BYTES", 1)
    calls, reasons = calls_of(*experts(**given))
    assert not reasons and len(calls) == count
    assert sorted(t for call in calls for t in call.tensors) == [0, 1, 2, 3]


def test_a_call_fits_the_slot(monkeypatch):
    monkeypatch.setattr(resharding, "LEAST_BYTES", 1)
    monkeypatch.setattr(resharding, "SLOT_BYTES", 100)
    calls, _ = calls_of(*experts())
    assert all(math.prod(side.local) * 4 <= 100 for call in calls for side in (call.src, call.dst)) and len(calls) > 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, s: (t, s, World((0, 1, 2), (2, 3))), "on both sides"),
        (lambda t, s: (t, s, World((2, 3), (0, 1))), "do not come before"),
        (lambda t, s: (t, s, World.of(2, 63)), "65 ranks, 64 are possible"),
        (lambda t, s: ({n: m.__class__(m.shape, torch.bool) for n, m in t.items()}, s, WORLD), "dtype torch.bool"),
        (lambda t, s: ({n: m.__class__((2, 1, 2, 6), m.dtype) for n, m in t.items()}, s, WORLD), "4 dims"),
        (lambda t, s: (t, experts(in_place=(True, False))[1], WORLD), "not in final storage on ranks [3]"),
        (lambda t, s: (t, s | {2: doubled(s[2])}, WORLD), "in several pieces on rank 2"),
        (lambda t, s: (t, s | {1: strided(s[1])}, WORLD), "not contiguous on rank 1"),
        (lambda t, s: (t, s, WORLD), "less than"),
    ],
)
def test_every_limit_has_its_reason(change, reason):
    table, rows = experts()
    table, rows, world = change(table, rows)
    calls, reasons = calls_of(table, rows, world)
    assert any(reason in text for text in reasons.values()), reasons
    assert not {t for call in calls for t in call.tensors} & set(reasons)


def test_a_shard_beyond_the_slot_is_refused(monkeypatch):
    monkeypatch.setattr(resharding, "SLOT_BYTES", 50)
    assert "a shard of more than 50 bytes" in calls_of(*experts())[1][0]


def test_more_shards_than_m2n_has_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(resharding, "LEAST_BYTES", 1)
    monkeypatch.setattr(resharding, "MAX_SOURCES", 1)
    calls, reasons = calls_of(*experts())
    assert not reasons and len(calls) == 2, "one source in each call"
    table = make_table({"w": ((8, 6), torch.float32)})
    rows = {r: said((0, (4 * (r % 2), 0), (4, 6), 1000, r, True)) for r in range(4)}
    assert calls_of(table, rows)[1] == {0: "source: 2 shards, 1 are possible"}


def doubled(one):
    return Said(*(np.concatenate([getattr(one, n), getattr(one, n)]) for n in Said.__dataclass_fields__))


def strided(one):
    return Said(*(getattr(one, n) for n in ("tensor", "offsets", "sizes", "address", "room")), ~one.dense)


class StandIn:
    """What a reshard means, within one process: each destination reads its shard where the sources hold it."""

    def __init__(self, world):
        self.barrier, self.calls = threading.Barrier(world.size, timeout=20), []

    def reshard(self, call, rank):
        self.calls.append((rank, call.tensors))
        self.barrier.wait()
        if rank in call.dst.ranks:
            whole = np.concatenate([part(call, call.src, r)[None] for r in call.src.ranks])
            shape = shape_of(call.src)
            full = torch.zeros(*shape, call.dtype.itemsize, dtype=torch.uint8).numpy()
            for i, r in enumerate(call.src.ranks):
                full[box(call.src, r)] = whole[i]
            part(call, call.dst, rank)[...] = full[box(call.dst, rank)]
        self.barrier.wait()

    def close(self):
        self.barrier.abort()


def shape_of(side):
    shape = list(side.local)
    for size, dim in zip(side.mesh, side.dims, strict=True):
        if dim is not None:
            shape[dim] *= size
    return shape


def box(side, rank):
    where = np.unravel_index(rank - side.start, side.mesh)
    at = [slice(None)] * len(side.local)
    for index, dim in zip(where, side.dims, strict=True):
        if dim is not None:
            at[dim] = slice(int(index) * side.local[dim], (int(index) + 1) * side.local[dim])
    return tuple(at)


def part(call, side, rank):
    raw = (ctypes.c_uint8 * (math.prod(side.local) * call.dtype.itemsize)).from_address(call.address[rank])
    return np.ctypeslib.as_array(raw).reshape(*side.local, call.dtype.itemsize)


@pytest.fixture
def stand_in(monkeypatch):
    """m2n over in-process mail, with a stand-in shared by all ranks."""
    shared = {}

    def mover(setting):
        library = shared.setdefault(setting.plan.world, StandIn(setting.plan.world))
        return m2n.M2n(setting, HostLanes(setting.messages.channel), library)

    monkeypatch.setitem(registry.TRANSPORTS, "m2n", Transport("m2n", lambda *_: None, mover))
    monkeypatch.setattr(resharding, "LEAST_BYTES", 16)
    return shared


@pytest.mark.parametrize("seed", range(8))
def test_what_m2n_takes_and_what_it_leaves_are_all_there(seed, stand_in):
    rng = random.Random(seed)
    even = make_table({f"even.{i}.w": ((8, 4), torch.bfloat16) for i in range(4)})
    odd = random_table(rng, 4)
    table = make_table({n: (m.shape, m.dtype) for n, m in {**even, **odd}.items()})
    trainers, generators = rng.choice((1, 2)), rng.choice((1, 2, 4))
    src, dst = shard_out(rng, odd, trainers), shard_out(rng, odd, generators)
    for side, count in ((src, trainers), (dst, generators)):
        for rank in range(count):
            rows = 8 // count
            side[rank] += [(name, Region((rank * rows, 0), (rows, 4))) for name in even]
    a = full_model(table, seed)
    sources = [PlainSource.of(a, table, rows) for rows in src]
    landings = [PlainLanding(rows, seed=i) for i, rows in enumerate(dst)]
    sim = SimulatedWorld(sources, landings, RefitOptions("m2n", 1024, deadline_s=20))
    raise_any(sim.start())
    for version in range(3):
        full = full_model(table, seed + version)
        for source in sources:
            source.load(full)
        for landing in landings:
            landing.scramble()
            if version == 2:
                landing.storage = [t.clone() for t in landing.storage]
        raise_any(sim.refit(version))
        for landing in landings:
            check(landing, full)
    library = next(iter(stand_in.values()))
    by_rank = {r: [tensors for rank, tensors in library.calls if rank == r] for r in range(sim.world.size)}
    assert len(library.calls) >= 4 * sim.world.size and all(calls == by_rank[0] for calls in by_rank.values())


def test_a_call_that_is_refused_names_the_tensor(stand_in):
    table = make_table({f"even.{i}.w": ((8, 4), torch.bfloat16) for i in range(4)})
    full = full_model(table, 0)
    rows = [(name, WHOLE((8, 4))) for name in table]
    landing = PlainLanding(rows)
    sim = SimulatedWorld([PlainSource.of(full, table, rows)], [landing], RefitOptions("m2n", 1024, deadline_s=2))
    raise_any(sim.start())

    def refuse(call, rank):
        raise RuntimeError("GIN is not available")

    for session in sim.sessions:
        session._agreed.mover._library.reshard = refuse
    results = sim.refit(1)
    assert all(isinstance(r, TransferError) for r in results.values())
    assert "m2n failed with even." in str(results[1]) and "GIN is not available" in str(results[1])
    assert landing.version == -1


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(m2n, "_found", lambda name: name != "nccl.m2n")
    assert "nccl.m2n cannot be imported: install" in m2n.missing()
    monkeypatch.setattr(m2n, "_found", lambda name: True)
    monkeypatch.setattr(m2n, "_nccl_version", lambda: 22809)
    assert "NCCL is 22809, m2n needs 23007" in m2n.missing() and "LD_PRELOAD" in m2n.missing()
    monkeypatch.setattr(m2n, "_nccl_version", lambda: 23007)
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    assert "NCCL_NVLS_ENABLE is None, m2n's windows would use NVLink multicast" in m2n.missing()
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert m2n.missing() is None


class Called(list):
    """A stand-in for NCCL's packages: what was called, in order; what is named in `fails` raises."""

    fails: frozenset[str] = frozenset()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.append((name, args, kwargs))
            if name in self.fails:
                raise OSError(f"{name} failed")
            return self

        return call


@pytest.fixture
def nccl_m2n(monkeypatch):
    """`NcclM2n` of rank 2 of 4, over stand-ins for NCCL's packages and CUDA, with what it calls."""
    called = Called()
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    done = types.SimpleNamespace(query=lambda: called.append(("query", (), {})) or "query" not in called.fails)
    stream = types.SimpleNamespace(record_event=lambda: done)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(m2n.NcclM2n, "lost", "")
    library = object.__new__(m2n.NcclM2n)
    library._m2n, library._comm, library._handle, library._device = called, called, called, torch.device("cpu")
    library._deadline_s, library._made, library._running = 5, {}, collections.deque()
    return library, called


def test_a_rank_gives_what_it_has_and_the_layout_of_both_sides(nccl_m2n):
    """An address on the side that a rank is on; shapes and dtypes of both sides on every rank."""
    library, called = nccl_m2n
    src, dst = Side(0, (2,), (0,), (2, 4, 6)), Side(2, (2,), (None,), (4, 4, 6))
    library.reshard(resharding.Reshard((0,), torch.bfloat16, src, dst, {0: 1, 1: 2, 2: 30, 3: 40}), 2)
    assert [(name, args) for name, args, _ in called[:-1]] == [
        *(("Mesh", ((2,), 0)), ("Shard", (0,)), ("Mesh", ((2,), 2)), ("Replicate", ())),
    ]
    given = called[-1][2]
    assert (given["src"], given["dst"]) == (None, 30)
    assert (given["src_local_shape"], given["dst_local_shape"]) == ((2, 4, 6), (4, 4, 6))
    assert given["src_dtype"] is given["dst_dtype"] is torch.bfloat16


def test_a_first_call_that_waits_for_a_dead_rank_ends(nccl_m2n, monkeypatch):
    """Later ones are started by the caller's own thread, all on the caller's stream."""
    library, called = nccl_m2n
    side, came, threads = Side(0, (2,), (0,), (2, 4)), threading.Event(), []
    call = resharding.Reshard((0,), torch.bfloat16, side, side, {0: 1, 1: 2})

    def start(**given):
        came.wait(20)
        threads.append((threading.current_thread(), given["stream"] is torch.cuda.current_stream()))

    monkeypatch.setattr(library, "_m2n", types.SimpleNamespace(Mesh=called.Mesh, Shard=called.Shard, reshard=start))
    library._deadline_s = 0.05
    with pytest.raises(TimeoutError, match="m2n's first call took longer than 0.05 s"):
        library.reshard(call, 0)
    came.set()
    library._deadline_s = 5
    library.reshard(call, 0)
    library.reshard(call, 0)
    assert threads[-1] == (threading.current_thread(), True) != threads[-2] and threads[-2][1]


def test_few_calls_are_under_way_at_a_time(nccl_m2n, monkeypatch):
    """A rank that died in the middle of them is no reason to wait for the driver without a limit."""
    library, called = nccl_m2n
    side = Side(0, (2,), (0,), (2, 4))
    call = resharding.Reshard((0,), torch.bfloat16, side, side, {0: 1, 1: 2})
    for _ in range(2 * m2n._MOST_RUNNING):
        library.reshard(call, 0)
    started = [name for name, *_ in called if name in ("reshard", "query")]
    assert started == ["reshard"] * m2n._MOST_RUNNING + ["query", "reshard"] * m2n._MOST_RUNNING
    called.fails, library._deadline_s = frozenset({"query"}), 0.05
    with pytest.raises(TimeoutError, match="an earlier call was not done within the deadline"):
        library.reshard(call, 0)


def test_windows_are_given_back_before_the_communicator_they_are_kept_by(nccl_m2n):
    library, called = nccl_m2n
    library.close()
    library.close()
    assert [name for name, *_ in called] == ["query", "destroy", "abort"] and not m2n.NcclM2n.lost


def test_m2n_that_could_not_be_given_back_is_not_used_again(nccl_m2n, monkeypatch):
    library, called = nccl_m2n
    called.fails = frozenset({"destroy"})
    library.close()
    assert [name for name, *_ in called] == ["query", "destroy"], "windows may still be read"
    monkeypatch.setattr(m2n, "_found", lambda name: True)
    monkeypatch.setattr(m2n, "_nccl_version", lambda: 23007)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    assert "destroy failed" in m2n.missing() and "start this process again" in m2n.missing()


def test_work_that_does_not_end_is_not_waited_for_without_a_limit(nccl_m2n, monkeypatch):
    library, called = nccl_m2n
    called.fails = frozenset({"query"})
    monkeypatch.setattr(m2n, "_CLOSE_S", 0.05)
    library.close()
    assert {name for name, *_ in called} == {"query"} and "was not done within the deadline" in m2n.NcclM2n.lost


@pytest.fixture
def connecting(nccl_m2n, monkeypatch):
    """How `NcclM2n` is made, over stand-ins; `connecting.init` is what makes its communicator."""
    _, called = nccl_m2n
    namespace = types.SimpleNamespace
    made = namespace(init=lambda *_: called)
    core = namespace(
        get_unique_id=lambda: b"",
        UniqueId=namespace(from_bytes=bytes),
        Communicator=namespace(init=lambda *given: made.init(*given)),
    )
    library = namespace(core=core, m2n=namespace(Handle=namespace(create=lambda: called)))
    for name, module in (("nccl", library), ("nccl.core", library.core), ("nccl.m2n", library.m2n)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(m2n, "keep_variable", lambda *_: None)
    control = namespace(gather=lambda *_: {0: b""}, deadline_s=0.05)
    setting = namespace(rank=0, device=torch.device("cpu"), control=control, plan=namespace(world=WORLD))
    made.connect = lambda: m2n.NcclM2n(setting)
    return made, called


def test_a_handle_without_a_communicator_is_given_back(connecting):
    def refuse(*_):
        raise OSError("planted in init")

    made, called = connecting
    made.connect()
    assert not called
    made.init = refuse
    with pytest.raises(OSError, match="planted in init"):
        made.connect()
    assert [name for name, *_ in called] == ["destroy"] and not m2n.NcclM2n.lost


def test_a_communicator_that_is_not_made_in_time_is_not_asked_for_again(connecting):
    made, called = connecting
    came = threading.Event()
    made.init = lambda *_: came.wait(20)
    with pytest.raises(TimeoutError, match="making m2n's communicator took longer than 0.05 s"):
        made.connect()
    came.set()
    assert not called and "making m2n's communicator" in m2n.NcclM2n.lost and "start this process" in m2n.NcclM2n.lost


def test_lanes_are_closed_where_m2n_is_refused(monkeypatch):
    called = Called()

    def refuse(setting):
        raise OSError("refused")

    monkeypatch.setattr(registry, "_lanes", lambda setting: called)
    monkeypatch.setattr(m2n, "NcclM2n", refuse)
    with pytest.raises(OSError, match="refused"):
        registry.TRANSPORTS["m2n"].mover(None)
    assert [name for name, *_ in called] == ["close"]
