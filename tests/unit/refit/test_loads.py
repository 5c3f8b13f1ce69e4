"""Transfers of parcels: which go from where they lie, what slots hold, and how ranges share parcels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports import grouped, parcels, registry
from nemo_rl.refit.transports.grouped import Grouped
from nemo_rl.refit.transports.lanes import HostLanes, Post
from nemo_rl.refit.transports.parcels import Ends, Limits, Order, wire_order

from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes

COUNT, SHAPE = 6, (16, 16)  # of 1024 bytes each
Place = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(registry.TRANSPORTS, "nccl", replace(registry.TRANSPORTS["nccl"], unsupported=lambda *_: None))
    for module, name, value in (
        *((parcels, "PARCEL_BYTES", 2048), (parcels, "PACKED_BYTES", 2048), (parcels, "LEAST_BYTES", 2048)),
        (parcels, "LEAST_IN_PLACE", 512),
        (grouped, "STAGING_BYTES", 8192),
    ):
        monkeypatch.setattr(module, name, value)
    return monkeypatch


def columns(**given: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(value, bool if name == "dense" else np.int64) for name, value in given.items()}


def ordered(here: Ends, there: Ends, size: list[int], parcel: int, packed: int, lanes: int = 1) -> Order:
    return wire_order(here, there, np.array(size), np.full(len(size), 2), Limits(parcel, packed, lanes))


def rooms(count: int) -> Ends:
    """As many ranges, each in a storage of its own."""
    return Ends(np.arange(count) * 10_000, np.arange(count), np.ones(count, bool))


def lengths(order: Order) -> list[int]:
    """Transfers of each parcel."""
    starts = np.searchsorted(order.cuts, [0, *order.ends.tolist()], "right")
    return np.diff(starts).tolist()


def test_ranges_share_parcels_behind_the_longest_that_nobody_packs(small: pytest.MonkeyPatch) -> None:
    size = [512] * 10
    order = ordered(rooms(10), rooms(10), size, 2048, 2048)
    assert order.cuts.tolist() == [*range(1, 11)] and order.ends.tolist() == [1, 5, 9, 10]
    assert order.copies.tolist() == [*range(10)]
    size[3], size[7] = 1024, 1536
    there = rooms(10)
    there.dense[7] = False
    assert ordered(rooms(10), there, size, 2048, 2048).copies.tolist() == [3, 0, 1, 2, *range(4, 10)]


def test_the_last_parcels_are_no_longer_than_half_of_what_is_left_of_a_lane(small: pytest.MonkeyPatch) -> None:
    small.setattr(parcels, "LEAST_BYTES", 512)
    order = ordered(rooms(40), rooms(40), [512] * 40, 4096, 2048, 2)
    assert lengths(order) == [1, 8, 7, 6, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]


def test_the_first_parcels_that_are_packed_are_no_longer_than_half_of_what_moves(small: pytest.MonkeyPatch) -> None:
    small.setattr(parcels, "LEAST_BYTES", 512)
    there = Ends(np.arange(40) * 10_000, np.arange(40), np.zeros(40, bool))
    assert lengths(ordered(rooms(40), there, [512] * 40, 4096, 2048))[:8] == [1, 1, 1, 1, 2, 3, 4, 4]


def test_what_is_packed_at_the_sender_has_a_limit_of_its_own(small: pytest.MonkeyPatch) -> None:
    there = Ends(np.arange(12) * 10_000, np.arange(12), np.arange(12) < 8)
    order = ordered(rooms(12), there, [512] * 12, 2048, 1024)
    assert order.ends.tolist() == [1, 5, 9, 11, 12], "four of which one is packed, then two that are"
    small.setattr(parcels, "ALIGNMENT", 600)
    order = ordered(rooms(12), there, [512] * 12, 2048, 1024)
    assert order.ends.tolist() == [1, 5, 9, 10, 11, 12], "in a slot they are aligned"


def test_a_long_range_is_several_transfers(small: pytest.MonkeyPatch) -> None:
    one = Ends(np.arange(16) * 512, np.zeros(16, np.int64), np.ones(16, bool))
    order = ordered(one, one, [512] * 16, 4096, 2048)
    assert order.copies.tolist() == [*range(16)]
    assert order.cuts.tolist() == [8, 12, 16], "as parcels are long there"
    assert ordered(one, rooms(16), [512] * 16, 4096, 1024).cuts.tolist() == [*range(2, 17, 2)], "as slots are"


def test_the_wire_order_is_the_receivers_memory(small: pytest.MonkeyPatch) -> None:
    small.setattr(parcels, "LEAST_IN_PLACE", 64)
    given = columns(address=[64, 0, 900, 32, 500, 700], room=[1, 1, 2, 1, 1, 2], dense=[1, 1, 1, 1, 0, 1])
    here, size, item = Ends(**given), np.array([32, 32, 8, 32, 100, 16]), np.array([2, 2, 1, 2, 2, 4])
    order = wire_order(here, rooms(6), size, item, Limits(96, 96, 1))
    assert order.copies.tolist() == [1, 3, 0, 5, 4, 2], "the range of 96 bytes, then what is strewn, large items first"
    assert order.cuts.tolist() == [3, 4, 5, 6] and order.ends.tolist() == [3, 4, 5, 6], "what is longer goes alone"
    order = wire_order(here, rooms(6), size, item, Limits(64, 64, 1))
    assert order.copies.tolist() == [1, 5, 4, 2, 3, 0], "a part of the range, what is strewn, the other part"
    apart = Ends(**(given | columns(room=[1, 3, 2, 1, 1, 2])))
    order = wire_order(apart, rooms(6), size, item, Limits(96, 96, 1))
    assert order.copies.tolist().index(1) > 1, "a range lies in one storage"


def mixed(
    place: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[SimulatedWorld, PlainLanding, dict[str, torch.Tensor]]:
    """One trainer whose odd tensors lie where `place` puts them, and one generator."""
    table = make_table({f"layers.{i}": (SHAPE, torch.float32) for i in range(COUNT)})
    generator = torch.Generator().manual_seed(3)
    full = {f: random_bytes(m.shape, m.dtype, generator) for f, m in table.items()}
    rows = [(f, Region.whole(m.shape)) for f, m in table.items()]
    source, landing = PlainSource.of(full, table, rows), PlainLanding(rows)
    source.held = [
        type(h)(h.fqn, h.region, place(h.view) if i % 2 else h.view.clone()) for i, h in enumerate(source.held)
    ]
    sim = SimulatedWorld([source], [landing], RefitOptions("nccl", 1024, deadline_s=20))
    raise_any(sim.start())
    landing.storage = [pair[0] for pair in torch.zeros(COUNT, 2, *SHAPE)]  # in order, apart from each other
    return sim, landing, full


def strided(view: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(SHAPE[0], 2 * SHAPE[1], dtype=view.dtype)
    wide[:, : SHAPE[1]] = view
    return wide[:, : SHAPE[1]]


@pytest.mark.parametrize(("place", "slots"), [(torch.clone, [0, 0, 0, 0]), (strided, [0, 1024, 1024, 1024])])
def test_a_slot_holds_what_is_strewn_of_a_parcel(small: pytest.MonkeyPatch, place: Place, slots: list[int]) -> None:
    """Two tensors a parcel at most, of which one lies strewn at the trainer: the other is sent from where it lies."""
    sent: list[list[Post]] = []
    inner = HostLanes.exchange

    def exchange(self: HostLanes, lane: int, sends: Any, recvs: Any, *look: Any) -> Any:
        sent.extend([list(sends)] if sends else [])
        return inner(self, lane, sends, recvs, *look)

    small.setattr(HostLanes, "exchange", exchange)
    sim, landing, full = mixed(place)
    for version in range(2):
        landing.scramble()
        sent.clear()
        reports = sim.refit(version)
        raise_any(reports)
        for (fqn, _), storage in zip(landing.rows, landing.storage, strict=True):
            assert same_bytes(storage, full[fqn]), fqn
    assert [len(posts) for posts in sent] == [1, 2, 2, 1] and [p.tag for posts in sent for p in posts] == [*range(6)]
    held = {h.view.untyped_storage().data_ptr() for h in sim.sessions[0]._source.held}  # type: ignore[union-attr]
    at_rest = [sum(p.buffer.untyped_storage().data_ptr() in held for p in posts) for posts in sent]
    strewn = [int(size > 0) for size in slots]
    assert at_rest == [len(posts) - n for posts, n in zip(sent, strewn, strict=True)], "others are sent as they lie"
    assert (reports[0].staging_bytes, reports[1].staging_bytes) == (sum(slots), 0)


def test_a_group_waits_for_the_one_that_had_its_slot(small: pytest.MonkeyPatch) -> None:
    """Groups without a slot take no turn."""
    small.setattr(grouped, "STAGING_BYTES", 2048)
    sim, _, _ = mixed(strided)
    raise_any(sim.refit(0))
    mover = sim.sessions[0]._agreed.mover
    assert isinstance(mover, Grouped)
    out, landing = mover._out, sim.sessions[1]._agreed.mover._in  # type: ignore[attr-defined]
    assert [out.before(number) for number in range(4)] == [None, None, None, 1]
    assert [landing.before(number) for number in range(4)] == [None] * 4


def test_parcels_are_agreed_on_again_where_rows_of_one_rank_moved(small: pytest.MonkeyPatch) -> None:
    """What was sent from where it lay is packed; no slot takes more than it may, however parcels were before."""
    small.setattr(parcels, "PACKED_BYTES", 1024)
    sim, landing, full = mixed(torch.clone)
    raise_any(reports := sim.refit(0))
    groups = [len(sim.sessions[0]._agreed.mover._groups)]  # type: ignore[attr-defined]
    assert reports[0].staging_bytes == 0
    source = sim.sessions[0]._source
    assert isinstance(source, PlainSource)
    source.held = [type(h)(h.fqn, h.region, strided(h.view)) for h in source.held]
    for version in (1, 2):
        landing.scramble()
        raise_any(reports := sim.refit(version))
        for (fqn, _), storage in zip(landing.rows, landing.storage, strict=True):
            assert same_bytes(storage, full[fqn]), fqn
        groups.append(len(sim.sessions[1]._agreed.mover._groups))  # type: ignore[attr-defined]
        assert reports[0].staging_bytes == COUNT * 1024
    assert groups == [4, 6, 6], "of two tensors, then of one"
