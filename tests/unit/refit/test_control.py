"""Small facts between ranks: who gets what, who is named, and that nothing is left in the store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.control import Control
from nemo_rl.refit.declare import agree
from nemo_rl.refit.errors import AgreementError, PoisonedError, RefitError, StoreLost, TransferError
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports.board import Board

from .planted import model, rows_of, two_by_two
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any


def controls(count=3, deadline_s=5.0):
    store, world = dist.HashStore(), World.of(1, count - 1)
    return [Control(rank, world, store, deadline_s) for rank in range(count)], store


def boarded():
    """Controls that meet on a board."""
    members, store = controls()
    for member, board in zip(members, together(members, Board.open), strict=True):
        member.board = board
    return members, store


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


def test_what_everyone_has_read_is_deleted_behind_a_meeting_on_a_board():
    members, store = boarded()

    def step(c):
        c.exchange("x", {2: b"a", 1: b"b"} if c.rank == 0 else {}, () if c.rank == 0 else (0,))
        c.meet("y")

    for _ in range(3):
        together(members, step)
        assert store.num_keys() > 0
        together(members, lambda c: c.tidy())
        assert store.num_keys() == 0


def test_a_store_that_ends_behind_the_commit_takes_nothing_back(monkeypatch, caplog):
    (control, *_), _ = boarded()
    control._written.append("1/0/")

    def gone(_):
        raise RuntimeError("connection reset")

    monkeypatch.setattr(control, "asked", SimpleNamespace(delete_key=gone))
    control.tidy()
    assert "the store keeps what rank 0 wrote: connection reset" in caplog.text


@pytest.mark.parametrize("where", ["store", "board"])
def test_ranks_agree_or_say_who_differs_in_what(where):
    """What a rank says nothing of is no difference; what the first trainer says nothing of and others do is one."""
    members, _ = boarded() if where == "board" else controls()
    same = {"plan digest": "ab", "version": 7, "optimizer steps": None}
    together(members, lambda c: agree(c, same))
    together(members, lambda c: agree(c, {**same, "optimizer steps": None if c.rank else 3}))
    for items, text in (
        ({"version": 8}, "generator 1 (rank 2) has version 8, trainer 0 (rank 0) has 7"),
        ({"optimizer steps": 4}, "generator 1 (rank 2) has optimizer steps 4, trainer 0 (rank 0) has None"),
        (
            {"plan digest": "cd", "version": 8},
            "generator 1 (rank 2) has plan digest cd, trainer 0 (rank 0) has ab; "
            "generator 1 (rank 2) has version 8, trainer 0 (rank 0) has 7",
        ),
    ):

        def differs(c, items=items):
            with pytest.raises(AgreementError) as caught:
                agree(c, {**same, **items} if c.rank == 2 else same)
            return caught.value.detail

        assert together(members, differs) == [text] * 3


@pytest.mark.parametrize("where", ["store", "board"])
def test_ranks_bring_words_to_a_meeting(where):
    members, _ = boarded() if where == "board" else controls()

    def bring(c):
        for turn in range(50):
            said = c.meet("x", (turn, -(2**63) + c.rank, 2**63 - 1 - turn))
            assert said == [(turn, -(2**63) + rank, 2**63 - 1 - turn) for rank in range(3)]
            assert c.meet("x") == [()] * 3

    together(members, bring)


@pytest.mark.parametrize("where", ["store", "board"])
def test_a_rank_that_decided_early_or_late_gets_the_first_answer(where):
    """Rank 2 gives up on the others, which come a moment later, or they have decided when it gives up."""
    for first, want in ((2, "no: too late"), (0, "yes")):
        members, _ = boarded() if where == "board" else controls()
        late = TransferError("too late", rank=2, phase="commit", remedy="none")
        members[2].meet = lambda *_, late=late: (_ for _ in ()).throw(late)
        for member in members[:2]:
            member.meet = lambda *_: []
        if want == "yes" and where == "board":  # all came
            together(members, lambda c: c.board.meet("commit"))
            for member in members:
                member.board.meetings = 0
        for member in [members[first], *(m for m in members if m.rank != first)]:
            if want == "yes":
                member.settle("commit", "1")
            else:
                with pytest.raises(TransferError, match="too late" if member.rank == 2 else r"\(no: too late\)"):
                    member.settle("commit", "1")
        for member in members[:2]:
            member.settle("commit", "2")  # another question


def test_who_is_late_in_one_question_finds_what_the_others_decided_of_the_next():
    """All came to the first meeting, rank 2 gives up on it late; rank 0 has given up on it in the second by then."""
    first, late, second = 1, 2, 2
    members, _ = boarded()
    boards = [member.board for member in members]
    together(members, lambda c: c.board.meet("commit"))
    assert boards[0].undisputed(first) and not boards[0].dispute(second, boards[0].meetings + 1)
    assert boards[0].decide(second, "no: late", "committed") == "no: late"
    assert boards[late].dispute(first, boards[late].meetings), "all came"
    assert boards[late].decide(first, "yes", "commit") == "yes"
    assert not boards[late].undisputed(second)
    assert boards[late].decide(second, "yes", "committed") == "no: late"


def test_who_comes_at_the_deadline_itself_came():
    """Between the look that finds them missing and the one that names them; a rank's own work is named as such."""
    members, _ = boarded()
    board, late = members[0].board, iter([False, True])
    board.until(lambda: next(late), {0: {1: 0}}, "begin", time.monotonic() - 1)
    with pytest.raises(TransferError, match="waited until the deadline for what this rank does itself"):
        board.until(lambda: False, {0: {1: 0}}, "transfer", time.monotonic() - 1)


def test_a_rank_that_loses_the_store_before_a_decision_decides_against_it():
    """Where ranks have a board, which says so to those that still meet."""
    members, _ = boarded()

    def lost(*_):
        raise StoreLost("the store did not answer")

    members[2].meet = lost
    with pytest.raises(TransferError, match="the store did not answer"):
        members[2].settle("commit", "1")
    members[0].meet = lambda *_: []
    with pytest.raises(TransferError, match=r"another rank decided against it \(no: StoreLost: the store did not"):
        members[0].settle("commit", "1")


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


def test_a_store_serves_one_session():
    """What the first left there, such as its failure, is not the second one's."""
    table = make_table({"a": ((4,), torch.float32)})
    source = PlainSource.of(model(table), table, rows_of(table))
    first, second = (SimulatedWorld([source], [PlainLanding(rows_of(table))]) for _ in range(2))
    raise_any(first.start())
    first.all(lambda s: s.close())
    for session in second.sessions:
        session._address = first.store
    for rank, error in second.start().items():
        assert isinstance(error, TransferError) and f"(rank {rank}) entered this store before" in str(error)
    for session in second.sessions:
        session._address = dist.PrefixStore("again", first.store)
    assert all(isinstance(error, PoisonedError) for error in second.start().values())
    third = SimulatedWorld([source], [PlainLanding(rows_of(table))])
    for session in third.sessions:
        session._address = dist.PrefixStore("again", first.store)
    raise_any(third.start())
    raise_any(third.refit(1))


def test_two_processes_that_take_one_rank_are_told_at_once():
    table = make_table({"a": ((4,), torch.float32)})
    world, store = World.of(2, 1), dist.HashStore()
    source = PlainSource.of(model(table), table, rows_of(table))
    twins = [RefitSession(0, world, store, RefitOptions(deadline_s=20), source) for _ in range(2)]
    found, started = [], time.monotonic()

    def connect(session):
        with pytest.raises(RefitError) as caught:
            session.connect()
        found.append(str(caught.value))

    threads = [threading.Thread(target=connect, args=(twin,)) for twin in twins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 2 and all("trainer 0 (rank 0) entered this store before" in text for text in found)
    assert time.monotonic() - started < 5


def test_verbs_come_in_order():
    table = make_table({"a": ((4,), torch.float32)})
    source = PlainSource.of(model(table), table, rows_of(table))
    sim = SimulatedWorld([source], [PlainLanding(rows_of(table))])
    assert "connect() comes first" in str(sim.all(lambda s: s.plan(), ranks=(0,))[0])
    sim = SimulatedWorld([source], [PlainLanding(rows_of(table))])
    raise_any(sim.all(lambda s: s.connect()))
    assert "plan() comes before refit()" in str(sim.all(lambda s: s.refit(1), ranks=(0,))[0])
