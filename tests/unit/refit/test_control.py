"""Small facts between ranks: who gets what, who is named, and that nothing is left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.control import Control
from nemo_rl.refit.errors import RefitError, TransferError
from nemo_rl.refit.session import RefitSession

from .planted import model, rows_of, two_by_two
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any


def controls(count=3, deadline_s=5.0):
    store, world = dist.HashStore(), World.of(1, count - 1)
    return [Control(rank, world, store, deadline_s) for rank in range(count)], store


def together(members, call):
    with ThreadPoolExecutor(len(members)) as pool:
        return [f.result() for f in [pool.submit(call, c) for c in members]]


def test_an_exchange_gives_each_rank_its_own_payload():
    members, _ = controls()
    talk = {0: {1: b"0>1", 2: b"0>2"}, 1: {2: b"1>2"}, 2: {}}
    asked = {0: (), 1: (0,), 2: (0, 1)}
    got = together(members, lambda c: c.exchange("x", talk[c.rank], asked[c.rank]))
    assert got == [{}, {0: b"0>1"}, {0: b"0>2", 1: b"1>2"}]


def test_an_exchange_names_who_is_missing():
    members, _ = controls(deadline_s=0.2)
    with pytest.raises(TransferError, match=r"waited 0.2 s for generator 1 \(rank 2\)"):
        members[1].exchange("x", {}, (2,))


def test_what_everyone_has_read_is_deleted():
    """Also where some ranks read only from some, and decisions are made in between."""
    members, store = controls()

    def step(c):
        c.exchange("x", {2: b"a", 1: b"b"} if c.rank == 0 else {}, () if c.rank == 0 else (0,))
        c.gather("y", b"c", ranks=(0,))
        c.settle("z", str(next(numbers[c.rank])))
        c.gather("end", b"")

    numbers = [iter(range(10)) for _ in members]
    together(members, step)
    first = store.num_keys()
    for _ in range(5):
        together(members, step)
    assert store.num_keys() == first == len(members), "one key a rank: that of the last gather"


def test_refits_leave_nothing_in_the_store():
    sim, _, _, _ = two_by_two(misc=("w0",))
    raise_any(sim.start())
    raise_any(sim.refit(1))
    before = sim.store.num_keys()
    for version in (2, 3, 4):
        raise_any(sim.refit(version))
    assert sim.store.num_keys() == before


def test_the_first_answer_binds_all():
    members, _ = controls()
    members[2].gather = lambda *_: (_ for _ in ()).throw(  # this rank gave up a moment before the others came
        TransferError("too late", rank=2, phase="commit", remedy="none")
    )
    with pytest.raises(TransferError, match="too late"):
        members[2].settle("commit", "1")
    for member in members[:2]:
        member.gather = lambda *_: {}
        with pytest.raises(TransferError, match=r"another rank decided against it \(no: too late\)"):
            member.settle("commit", "1")
        member.settle("commit", "2")


def test_an_abort_ends_waits_at_once_and_the_first_report_stays():
    members, _ = controls(deadline_s=20)
    for text in ("first", "second"):
        members[2].abort(RefitError(text, rank=2, phase="transfer", remedy="none"))
    with pytest.raises(RefitError, match=r"generator 1 \(rank 2\) failed in phase 'transfer': first"):
        members[0].gather("x", b"")


def test_a_session_takes_what_its_rank_is():
    table = make_table({"a": ((4,), torch.float32)})
    source, landing = PlainSource.of(model(table), table, rows_of(table)), PlainLanding(rows_of(table))
    world, store = World.of(1, 1), dist.HashStore()
    for rank, given in ((0, (None, None)), (0, (source, landing)), (1, (None, None)), (1, (source, landing))):
        with pytest.raises(ValueError, match=r"\(rank \d\): a trainer takes a source"):
            RefitSession(rank, world, store, RefitOptions(), *given)
    with pytest.raises(ValueError, match="transport 'pigeon' is not one of auto, gloo"):
        RefitSession(0, world, store, RefitOptions(transport="pigeon"), source)


def test_verbs_come_in_order():
    table = make_table({"a": ((4,), torch.float32)})
    source = PlainSource.of(model(table), table, rows_of(table))
    sim = SimulatedWorld([source], [PlainLanding(rows_of(table))])
    assert "connect() comes first" in str(sim.all(lambda s: s.plan(), ranks=(0,))[0])
    sim = SimulatedWorld([source], [PlainLanding(rows_of(table))])
    raise_any(sim.all(lambda s: s.connect()))
    assert "plan() comes before refit()" in str(sim.all(lambda s: s.refit(1), ranks=(0,))[0])
