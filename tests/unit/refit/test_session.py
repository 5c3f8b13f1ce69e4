"""The whole service over simulated ranks: equality, bounds, and who is named when a rank is slow or silent."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit import agreed
from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import AgreementError, PlanError, PoisonedError, RefitError, TransferError, VerificationError
from nemo_rl.refit.layout import Holding
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports import registry
from nemo_rl.refit.transports.inproc import Hub, InprocChannel

from .layouts import random_table, shard_out
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes

WHOLE = Region.whole
TRANSPORTS = ("auto", "peer", "golden", "broadcast")


def full_model(table, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bytes(meta.shape, meta.dtype, generator) for name, meta in table.items()}


def check(landing, full, conventional):
    for (fqn, region), storage in zip(landing.rows, landing.storage, strict=True):
        want = full[fqn][region.slices_in(WHOLE(tuple(full[fqn].shape)))]
        got = landing.whole[fqn][region.slices_in(WHOLE(tuple(full[fqn].shape)))] if conventional else storage
        assert same_bytes(got, want), f"{fqn} {region}"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", range(6))
def test_first_second_and_back(seed, transport):
    rng = random.Random(seed)
    table = random_table(rng, 6)
    trainers, generators = rng.randint(1, 3), rng.randint(1, 3)
    src, dst = shard_out(rng, table, trainers), shard_out(rng, table, generators)
    a, b = full_model(table, seed), full_model(table, seed + 1)
    sources = [PlainSource.of(a, table, rows) for rows in src]
    landings = [
        PlainLanding(rows, [rng.choice((-1, i // 2)) for i in range(len(rows))], seed=i) for i, rows in enumerate(dst)
    ]
    sim = SimulatedWorld(sources, landings, RefitOptions(transport=transport, bucket_bytes=1024, deadline_s=20))
    raise_any(plans := sim.start())
    for version, full in enumerate((a, b, a)):
        for source in sources:
            source.load(full)
        for landing in landings:
            landing.scramble()
        raise_any(reports := sim.refit(version))
        for landing in landings:
            check(landing, full, transport == "broadcast")
            assert landing.version == version and landing.rejected == "" and landing.finished == version + 1
        assert all(r.verified and r.version == version for r in reports.values())
        if transport == "auto":
            plan = plans[0]
            assert sum(r.bulk_bytes for r in reports.values()) == 2 * plan.required_bytes
            assert all(r.staging_bytes <= 2 * 2 * 1024 for r in reports.values())


def two_by_two(options=None, wrap=lambda rank, t: t, units=None, landings=None):
    table = make_table(
        {
            "experts.0.w": ((8, 8), torch.float32),
            "experts.1.w": ((8, 8), torch.float32),
            "gate.w": ((8, 8), torch.bfloat16),
            "norm.w": ((8,), torch.float32),
        }
    )
    halves = [
        [(f, Region((4 * r, *[0] * (len(m.shape) - 1)), (4, *m.shape[1:]))) for f, m in table.items()] for r in range(2)
    ]
    wholes = [(f, WHOLE(m.shape)) for f, m in table.items()]
    full = full_model(table, 5)
    sources = [PlainSource.of(full, table, rows) for rows in halves]
    landings = landings or [PlainLanding(wholes, units), PlainLanding(wholes, units)]
    return SimulatedWorld(sources, landings, options, wrap), sources, landings, full


class Tampering(InprocChannel):
    """Changes what a chosen receiver gets."""

    def __init__(self, inner, change):
        super().__init__(inner._hub, inner._rank)
        self.change = change

    def recv(self, buffer, src, tag):
        pending, change = super().recv(buffer, src, tag), self.change

        class Tampered:
            def wait(self, deadline_s):
                pending.wait(deadline_s)
                change(buffer)

        return Tampered()


def flip(buffer):
    buffer[3] ^= 1


@pytest.mark.parametrize("units", [None, [0, 0, 1, -1]])
def test_one_flipped_bit_on_the_wire_is_not_committed(units):
    sim, _, landings, _ = two_by_two(wrap=lambda r, t: Tampering(t, flip) if r == 3 else t, units=units)
    raise_any(sim.start())
    results = sim.refit(1)
    assert isinstance(results[3], VerificationError) and "experts.0.w" in str(results[3])
    assert "trainer" in str(results[3]) and "generator 1 (rank 3)" in str(results[3])
    assert all(isinstance(r, RefitError) for r in results.values()), "nobody commits"
    assert all(landing.version == -1 and landing.rejected for landing in landings)
    assert all(isinstance(r, PoisonedError) for r in sim.refit(2).values())


def test_an_engine_that_cannot_be_told_to_refuse_holds_up_nobody(caplog):
    sim, _, landings, _ = two_by_two(wrap=lambda r, t: Tampering(t, flip) if r == 3 else t)
    raise_any(sim.start())
    boards = [s._link.control.board for s in sim.sessions]

    def broken(reason):
        raise RuntimeError("the engine's process is gone")

    landings[1].reject = broken
    results = sim.refit(1)
    assert isinstance(results[3], VerificationError) and all(isinstance(r, RefitError) for r in results.values())
    assert any("generator 1 (rank 3) failed in phase 'verify'" in str(results[r]) for r in range(3))
    assert all(board._map.closed for board in boards) and landings[1].version == -1
    assert "generator 1 (rank 3) could not be told to refuse" in caplog.text and "process is gone" in caplog.text


def test_a_mover_is_given_up_where_the_plan_gets_no_lane(monkeypatch):
    closed = []

    def no_lane(setting, *_):
        raise PlanError("no lane", rank=setting.rank, phase="agree", remedy="none")

    def mover(setting):
        one = registry.TRANSPORTS["gloo"].mover(setting)
        one.close = lambda: closed.append(setting.rank)
        return one

    monkeypatch.setattr(agreed, "open_lane", no_lane)
    monkeypatch.setitem(registry.TRANSPORTS, "peer", replace(registry.TRANSPORTS["peer"], mover=mover))
    sim, *_ = two_by_two(RefitOptions(transport="peer", deadline_s=5))
    assert all("no lane" in str(r) for r in sim.start().values()) and sorted(closed) == [0, 1, 2, 3]


def test_what_fails_behind_the_commit_takes_nothing_back(monkeypatch):
    """A device's error may show there; the next refit names it, on all ranks."""
    sim, sources, landings, full = two_by_two()
    raise_any(sim.start())

    def lost():
        raise RuntimeError("CUDA error: planted")

    monkeypatch.setattr(sim.sessions[2]._agreed.arrivals, "tidy", lost)
    raise_any(reports := sim.refit(1))
    assert all(report.version == 1 for report in reports.values())
    for landing in landings:
        assert landing.serve()
        check(landing, full, False)
    results = sim.refit(2)
    assert isinstance(results[2], PoisonedError) and "version 1 is committed and served; behind it" in str(results[2])
    assert all(isinstance(r, RefitError) and "CUDA error: planted" in str(r) for r in results.values())
    assert all(landing.version == 1 for landing in landings)


def test_what_fails_while_a_failed_session_ends_hides_nothing(caplog):
    """A device that is lost fails in all that is given up, too."""
    sim, _, landings, _ = two_by_two(wrap=lambda r, t: Tampering(t, flip) if r == 3 else t)
    raise_any(sim.start())
    session = sim.sessions[3]
    boards = [s._link.control.board for s in sim.sessions]

    def lost(*_):
        raise RuntimeError("CUDA error: planted")

    session._agreed.mover.close = session._agreed.lane.close = session._link.channel.close = lost
    results = sim.refit(1)
    assert isinstance(results[3], VerificationError) and landings[1].rejected
    assert all("generator 1 (rank 3) failed in phase 'verify'" in str(results[r]) for r in range(3))
    assert all(board._map.closed for board in boards)
    assert "did not give up its plan" in caplog.text and "did not give up its channel" in caplog.text


def test_a_plan_is_given_up_before_the_next_one_is_made(monkeypatch):
    """With it goes what was prepared for it; the channel stays."""
    opened, log = registry.TRANSPORTS["gloo"].mover, []

    def mover(setting):
        one = opened(setting)
        one.close = lambda: log.append((setting.rank, "closed"))
        log.append((setting.rank, "made"))
        return one

    monkeypatch.setitem(registry.TRANSPORTS, "gloo", replace(registry.TRANSPORTS["gloo"], mover=mover))
    sim, sources, landings, full = two_by_two()
    raise_any(sim.start())
    raise_any(sim.refit(1))
    raise_any(sim.all(lambda s: s.prepare(2)))
    raise_any(sim.all(lambda s: s.plan()))
    raise_any(sim.refit(3))
    for landing in landings:
        check(landing, full, False)
    raise_any(sim.all(lambda s: s.close()))
    for rank in range(4):
        assert [what for r, what in log if r == rank] == ["made", "closed"] * 2


def test_ranks_without_common_memory_meet_at_the_store(monkeypatch, caplog):
    """Also those of one host; only `peer` needs a board, and says why there is none."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    caplog.set_level("INFO")
    sim, _, landings, full = two_by_two()
    raise_any(sim.start())
    assert all(s._link.control.board is None for s in sim.sessions)
    assert "meet at the store, which takes longer: trainer 0 (rank 0): on aarch64" in caplog.text
    for version in (1, 2):
        raise_any(sim.refit(version))
    for landing in landings:
        check(landing, full, False)
    sim, *_ = two_by_two(options=RefitOptions(transport="peer", deadline_s=5))
    for result in sim.all(lambda s: s.connect()).values():
        assert isinstance(result, TransferError)
        assert "'peer' is not possible (trainer 0 (rank 0): no memory that all ranks share (trainer 0" in str(result)


def test_a_closed_session_gives_up_its_board():
    sim, *_ = two_by_two()
    raise_any(sim.start())
    boards = [s._link.control.board for s in sim.sessions]
    raise_any(sim.refit(1))
    for session in sim.sessions:
        session.close()
        session.close()
    assert all(board._map.closed and board._file.closed for board in boards)


def test_agree_refuses_a_rank_with_other_options():
    base = RefitOptions(deadline_s=10)
    other = RefitOptions(deadline_s=10, bucket_bytes=1024)
    table_options = {0: base, 1: base, 2: base, 3: other}
    sim, _, landings, _ = two_by_two(options=table_options)
    results = sim.start()
    assert all(isinstance(r, AgreementError) for r in results.values())
    assert "generator 1 (rank 3)" in str(results[0]) and "options" in str(results[0])


def test_a_missing_rank_is_named_within_the_deadline():
    sim, _, landings, _ = two_by_two(options=RefitOptions(deadline_s=2))
    raise_any(sim.start())
    results = sim.all(lambda s: s.refit(1), ranks=(0, 2, 3))
    assert any(isinstance(r, TransferError) and "trainer 1 (rank 1)" in str(r) for r in results.values())
    assert all(isinstance(r, RefitError) for r in results.values())
    assert all(landing.version == -1 and not landing.rejected for landing in landings), "nothing was touched"


def test_a_silent_sender_is_named_with_round_and_parameter():
    class Mute(InprocChannel):
        def send(self, buffer, dst, tag):
            return InprocChannel(type(self._hub)(), 0).send(buffer, dst, tag)

    sim, _, _, _ = two_by_two(options=RefitOptions(deadline_s=2), wrap=lambda r, t: Mute(t._hub, r) if r == 1 else t)
    raise_any(sim.start())
    failed = [r for r in sim.refit(1).values() if isinstance(r, TransferError)]
    assert failed and any("trainer 1 (rank 1)" in str(e) and "round" in str(e) and ".w" in str(e) for e in failed)


def test_a_silent_owner_of_the_reference_refit_is_named_with_the_parameter():
    class Mute(InprocChannel):
        def broadcast(self, buffer, root, ranks):
            return InprocChannel(type(self._hub)(), 0).broadcast(buffer, root, ranks)

    options = RefitOptions("golden", deadline_s=1)
    sim, _, _, _ = two_by_two(options=options, wrap=lambda r, t: Mute(t._hub, r) if r == 1 else t)
    raise_any(sim.start())
    failed = [str(r) for r in sim.refit(1).values() if isinstance(r, TransferError)]
    assert any("receiving" in text and ".w [" in text and "from trainer 1 (rank 1)" in text for text in failed), failed


def test_layout_problems_refuse_before_anything_moves():
    rows = [("experts.0.w", WHOLE((8, 8)))]
    sim, _, _, _ = two_by_two(
        landings=[PlainLanding(rows, problems=("w13: bytes 0:64 nobody writes",)), PlainLanding(rows)]
    )
    results = sim.start()
    assert all(isinstance(r, PlanError) and "bytes 0:64" in str(r) for r in results.values())


def test_misc_and_bulk_in_one_refit():
    table = make_table({"a": ((8, 8), torch.float32), "b": ((8,), torch.float32), "c": ((5,), torch.bfloat16)})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    full = full_model(table, 3)
    half = [
        [
            (f, Region((0,) * len(m.shape), (4, *m.shape[1:]))),
            (f, Region((4, *[0] * (len(m.shape) - 1)), (m.shape[0] - 4, *m.shape[1:]))),
        ]
        for f, m in table.items()
    ]
    sources = [PlainSource.of(full, table, [r[i] for r in half]) for i in range(2)]
    landings = [PlainLanding(rows, misc={"b": "computed by the loader"}), PlainLanding(rows)]
    sim = SimulatedWorld(sources, landings)
    raise_any(sim.start())
    raise_any(reports := sim.refit(1))
    for landing in landings:
        assert same_bytes(landing.whole["b"], full["b"]) and same_bytes(landing.storage[0], full["a"])
    assert reports[2].misc_bytes == 32 and reports[2].verified


def test_open_staging_is_a_few_units_however_deep_the_model():
    layers = 30
    table = make_table({f"layers.{i}.{n}.w": ((16, 16), torch.float32) for i in range(layers) for n in ("down", "up")})
    rows = [(f, WHOLE(m.shape)) for f, m in table.items()]
    halves = [[(f, Region((8 * r, 0), (8, 16))) for f in table] for r in range(2)]
    full = full_model(table, 3)
    landing = PlainLanding(rows, [i // 2 for i in range(len(rows))])
    options = RefitOptions(bucket_bytes=2048, deadline_s=20)
    sim = SimulatedWorld([PlainSource.of(full, table, h) for h in halves], [landing], options)
    raise_any(sim.start())
    raise_any(reports := sim.refit(1))
    check(landing, full, False)
    assert landing.most_open <= 3
    assert all(r.staging_bytes <= 2 * 2048 for r in reports.values())


def test_tensors_on_other_devices_are_refused_by_name():
    table = make_table({"a": ((4,), torch.float32)})
    source = PlainSource(table, [Holding("a", WHOLE((4,)), torch.empty(4, device="meta"))])
    sim = SimulatedWorld([source], [PlainLanding([("a", WHOLE((4,)))])], RefitOptions(deadline_s=5))
    results = sim.start()
    assert isinstance(results[0], PlanError) and "a is on meta" in str(results[0])


SHARED = World((0, 1), (1, 2))


class Colocated(SimulatedWorld):
    """Unless told otherwise, rank 0 trains, rank 1 trains and generates, rank 2 generates."""

    def __init__(self, sources, landings, options=None, world=SHARED):
        store, hub = dist.HashStore(), Hub()
        held, taken = (
            dict(zip(ranks, ends, strict=True))
            for ranks, ends in ((world.trainers, sources), (world.generators, landings))
        )
        options = options or RefitOptions(deadline_s=5, bucket_bytes=1024)
        self.world, self.store = world, store
        self.sessions = [
            RefitSession(r, world, store, options, held.get(r), taken.get(r), channel=InprocChannel(hub, r))
            for r in range(world.size)
        ]


def colocated(misc=(), options=None, world=SHARED):
    _, sources, landings, full = two_by_two()
    for landing in landings:
        landing.misc = dict.fromkeys(misc, "computed by the loader")
    return Colocated(sources, landings, options, world), sources, landings, full


def test_a_rank_on_both_sides_is_served_from_its_own_storage():
    sim, _, landings, full = colocated()
    raise_any(plans := sim.start())
    raise_any(reports := sim.refit(1))
    for landing in landings:
        check(landing, full, False)
        assert landing.version == 1
    received = sum(t.nbytes for t in full.values())
    assert plans[0].required_bytes == 2 * received
    assert reports[1].bulk_bytes == received // 2 + received // 2, "half comes from rank 0, half goes to rank 2"


def test_a_rank_on_both_sides_verifies_what_it_gives_itself():
    sim, _, landings, _ = colocated()
    raise_any(sim.start())
    pipeline = sim.sessions[1]._agreed.pipeline
    inner = pipeline._copy_locally

    def damaged(copies, message, src_view, tracker):
        inner(copies, message, src_view, tracker)
        tracker.view(message.lo).view(torch.uint8)[0, 0] ^= 1

    pipeline._copy_locally = damaged
    results = sim.refit(1)
    assert isinstance(results[1], VerificationError)
    both = "trainer 1 and generator 0 (rank 1)"
    assert f"{both} holds digest" in str(results[1]) and f"{both} has" in str(results[1])


@pytest.mark.parametrize("transport", ["auto", "broadcast"])
@pytest.mark.parametrize("world", [SHARED, World((0, 1), (0, 1)), World((1, 0), (0, 1))])
def test_a_rank_on_both_sides_takes_whole_tensors_too(transport, world):
    """The first trainer of a world gathers and broadcasts them, and may generate itself."""
    options = RefitOptions(transport=transport, deadline_s=10, bucket_bytes=1024)
    sim, sources, landings, full = colocated(("gate.w", "norm.w"), options, world)
    raise_any(plans := sim.start())
    whole = plans[0].misc_fqns
    assert set(whole) == ({"gate.w", "norm.w"} if transport == "auto" else set(full))
    for version in (1, 2):
        full = full_model(plans[0].table, version)
        for source in sources:
            source.load(full)
        raise_any(sim.refit(version))
        for landing in landings:
            assert list(landing.whole) == list(whole)
            held = {f: t for (f, _), t in zip(landing.rows, landing.storage, strict=True)} | landing.whole
            assert all(same_bytes(held[f], t) for f, t in full.items())


def test_whole_tensors_without_bytes_reach_a_root_that_generates():
    table = make_table({"a": ((0, 4), torch.float32), "b": ((4,), torch.float32), "c": ((0,), torch.float32)})
    full, rows = full_model(table, 5), [(f, WHOLE(m.shape)) for f, m in table.items()]
    landing = PlainLanding(rows, misc=dict.fromkeys(table, "cast"))
    sim = Colocated([PlainSource.of(full, table, rows)], [landing], None, World((0,), (0,)))
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert list(landing.whole) == ["a", "b", "c"] and same_bytes(landing.whole["b"], full["b"])


def test_a_rank_on_both_sides_verifies_whole_tensors():
    class Flips(InprocChannel):
        def broadcast(self, buffer, root, ranks):
            pending = super().broadcast(buffer, root, ranks)
            if self._rank == root:
                buffer[0] ^= 1  # after it left: only the root's own engine gets it
            return pending

    sim, _, landings, _ = colocated(("norm.w",), None, World((0, 1), (0, 1)))
    for session in sim.sessions:
        session._given_channel = Flips(session._given_channel._hub, session.rank)
    raise_any(sim.start())
    results = sim.refit(1)
    assert isinstance(results[0], VerificationError) and "norm.w" in str(results[0])
    assert all(isinstance(r, RefitError) for r in results.values())
    assert all(landing.version == -1 and landing.rejected for landing in landings)


def test_a_part_of_the_model_is_a_refit_of_its_own():
    """Adapters on a frozen base: the table has only them, and what generators keep is told with the rule."""

    class Frozen(PlainLanding):
        def declare(self, table):
            return replace(super().declare(table), kept=dict.fromkeys(("base.b", "base.w"), "frozen under adapters"))

    table = make_table({"lora.a": ((4, 8), torch.float32), "lora.b": ((8, 4), torch.float32)})
    full, rows = full_model(table, 3), [(f, WHOLE(m.shape)) for f, m in table.items()]
    landing = Frozen(rows[:1])
    sim = SimulatedWorld([PlainSource.of(full, table, rows)], [landing])
    raise_any(plans := sim.start())
    raise_any(reports := sim.refit(1))
    check(landing, full, False)
    assert plans[0].kept.keys() == {"base.w", "base.b"} and "lora.b" in plans[0].unused
    assert RefitPlan.from_bytes(plans[0].to_bytes()).kept == plans[0].kept
    text = plans[1].describe()
    assert "kept by generators: 2 (base.b, ...): frozen under adapters" in text
    assert "unused: 1 (lora.b): no generator's loader reads it" in text
    assert reports[1].bulk_bytes == table["lora.a"].num_bytes


@pytest.mark.parametrize("steps", [4, None])
def test_a_trainer_that_trains_between_preparing_and_refitting_is_named(steps):
    """Without digests, too: nothing else would show that one half of the model is a step older."""
    table = make_table({"a": ((4, 3), torch.float32), "b": ((4, 3), torch.float32)})
    full, rows = full_model(table, 1), [(f, WHOLE(m.shape)) for f, m in table.items()]
    sources, landing = [PlainSource.of(full, table, [row]) for row in rows], PlainLanding(rows)
    sim = SimulatedWorld(sources, [landing], RefitOptions(deadline_s=5, verify=False))
    raise_any(sim.start())
    raise_any(sim.all(lambda s: s.prepare(0, 3 if s.rank < 2 else None)))
    results = sim.all(lambda s: s.refit(0, {0: 3, 1: steps}.get(s.rank)))
    if steps is None:  # says nothing of steps
        raise_any(results)
    else:
        assert isinstance(results[1], AgreementError) and "took 4 optimizer steps, and 3 when" in str(results[1])
        assert all(isinstance(r, RefitError) for r in results.values()) and landing.version == -1
