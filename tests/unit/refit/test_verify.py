"""What a rank does of its comparison while bytes move, and what is left of it in the end."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.refit.digest import Ledger, digest_view
from nemo_rl.refit.region import Region
from nemo_rl.refit.verify import Verifier
from nemo_rl.refit.watch import Watch

from .planted import two_by_two
from .simulated import raise_any


class Store:
    """A control whose trainers have posted once `ready`. Who waits makes them, and goes on with the watch meanwhile."""

    board = None

    def __init__(self):
        self.deadline_s = 5
        self.ready, self.posts, self.heard, self.waits, self.watch = False, [], 0, 0, None

    def ticket(self):
        return 1

    def posted(self, ticket, ranks):
        return self.ready

    def post(self, ticket, outgoing):
        self.posts.append(dict(outgoing))

    def await_posts(self, ticket, phase, ranks):
        self.waits, self.ready, self.watch._next_s = self.waits + 1, True, 0.0
        self.watch.step()

    def collect(self, ticket, phase, ranks):
        assert self.ready, "nobody hears before all trainers said what they saw"
        self.heard += 1
        return {rank: b"" for rank in ranks}

    def end(self, ticket):
        return None


class Looks:
    """A verifier that counts its looks."""

    trainers, peers = (0, 1), (1,)

    def __init__(self):
        self.count = self.followed = 0

    def follow(self):
        assert not self.count, "before the first look of a refit that nobody prepared"
        self.followed += 1

    def look(self, holdings):
        self.count += 1
        ledger = Ledger(1)
        ledger.room(torch.device("cpu"))[0] = self.count
        ledger.fetch()
        return ledger

    def expected(self, said, held):
        return None

    def statements(self, held):
        return {2: held.tobytes()}


@pytest.fixture(params=["trainer", "generator"])
def watched(request):
    store, looks = Store(), Looks()
    store.watch = Watch(looks, store, () if request.param == "trainer" else None)
    return store, looks, store.watch, request.param == "trainer"


def test_a_rank_goes_on_while_bytes_move(watched):
    """Then nothing is left to ask for in the end."""
    store, looks, watch, trains = watched
    watch.step()
    assert store.heard == 0 and looks.count == trains and len(store.posts) == trains
    store.ready, watch._next_s = True, 0.0
    for _ in range(3):
        watch.step()
    assert store.heard == 1 and looks.count == 2 * trains
    seen, said = watch.finish()
    assert said == {1: b""} and store.heard == 1 and store.waits == 0 and len(store.posts) == trains
    assert (seen is None) != trains and (seen is None or [x.tolist() for x in seen] == [[1], [2]])


def test_nothing_is_done_twice_where_a_wait_goes_on_by_itself(watched):
    store, looks, watch, trains = watched
    seen, _ = watch.finish()
    assert store.waits == store.heard == 1 and looks.count == 2 * trains and len(store.posts) == trains
    assert looks.followed == trains
    assert (seen is None) != trains and (seen is None or [x.tolist() for x in seen] == [[1], [2]])


def test_a_rank_seldom_asks_whether_trainers_have_looked(watched):
    store, _, watch, _ = watched
    asked = []
    store.posted = lambda ticket, ranks: bool(asked.append(ranks))
    watch._next_s = 0.0
    watch.step()
    watch._started_s -= 1000.0  # so long a transfer may wait as long for the next question
    watch._next_s = 0.0
    for _ in range(5):
        watch.step()
    assert asked == [(0, 1)] * 2


def test_a_cleared_ledger_knows_nothing_of_before():
    views = [torch.arange(6.0).view(2, 3), torch.ones(4)]
    regions = [Region.whole(tuple(view.shape)) for view in views]
    ledger = Ledger(2)
    for number in (0, 1):
        ledger.take(number, views[number], regions[number])
    before = ledger.read()
    ledger.clear()
    assert not ledger.taken.any() and not ledger.read().any()
    ledger.take(1, views[1] + 1, regions[1])
    assert ledger.taken.tolist() == [False, True]
    assert ledger.read().tolist() == [0, digest_view(views[1] + 1, regions[1])]
    assert before.tolist() == [digest_view(*each) for each in zip(views, regions, strict=True)], "what was read stays"


@pytest.mark.parametrize(("misc", "ranks"), [((), set()), (("w0",), {2, 3})])
def test_only_who_may_differ_compares_piece_by_piece(misc, ranks, monkeypatch):
    """Bulk that is all as expected is compared at once; whole tensors are on generators."""
    sim, *_ = two_by_two(misc=misc)
    raise_any(sim.start())
    called, plain = set(), Verifier.differences
    monkeypatch.setattr(Verifier, "differences", lambda v, *args: called.add(v._rank) or plain(v, *args))
    raise_any(sim.refit(1))
    assert called == ranks


def test_looks_find_their_room_empty_when_a_refit_begins():
    """What the next refit needs is made ready behind the commit of this one."""
    sim, *_ = two_by_two()
    raise_any(sim.start())
    for version in (1, 2, 3):
        raise_any(sim.refit(version))
        ledgers = [ledger for s in sim.sessions for ledger in s._agreed.verifier._ledgers]
        ledgers += [s._agreed.arrivals._ledger for s in sim.sessions if s._agreed.arrivals is not None]
        assert len(ledgers) == 2 * 2 + 2 and not any(ledger.taken.any() or ledger.read().any() for ledger in ledgers)
