"""Bytes that arrive late, twice, elsewhere or changed, as shards and as whole tensors."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import TransferError, VerificationError
from nemo_rl.refit.plan import CopyTable
from nemo_rl.refit.transports.inproc import InprocChannel

from .layouts import random_table, shard_out
from .planted import FAST, Sends, caught, halves_of, model, reload, rows_of, two_by_two
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, same_bytes


@pytest.mark.parametrize("bit", [0, 7])
def test_one_bit_flipped(bit):
    def flip(buffer, dst, tag):
        buffer[-1] ^= 1 << bit
        return buffer

    sim, _, landings, _ = two_by_two(lambda rank, t: Sends(t, flip) if rank == 1 else t)
    raise_any(sim.start())
    caught(sim.refit(1), landings, VerificationError, "w3 [4:8, 0:8]", "trainer 1 (rank 1)", "generator 0 (rank 2)")


def test_a_stale_shard_of_the_version_before():
    kept = {}
    stale = lambda buffer, dst, tag: kept.setdefault((dst, tag), buffer)  # noqa: E731
    sim, sources, landings, full = two_by_two(lambda rank, t: Sends(t, stale) if rank == 1 else t)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert same_bytes(landings[0].serve()[0], full["w0"])
    reload(sources, 6)
    caught(sim.refit(2), landings, VerificationError, "w0 [4:8, 0:8]", "trainer 1 (rank 1)", before=1)


def test_a_bucket_delivered_twice():
    """The second delivery stands where the next version's bucket is due."""

    class Twice(InprocChannel):
        def send(self, buffer, dst, tag):
            super().send(buffer, dst, tag)
            return super().send(buffer, dst, tag)

    sim, sources, landings, full = two_by_two(lambda rank, t: Twice(t._hub, rank) if rank == 0 else t)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert same_bytes(landings[0].serve()[0], full["w0"])
    reload(sources, 6)
    caught(sim.refit(2), landings, VerificationError, "w0 [0:4, 0:8]", "trainer 0 (rank 0)", before=1)


def test_a_bucket_delivered_in_place_of_the_next():
    first = {}
    repeat = lambda buffer, dst, tag: first.setdefault(dst, buffer)  # noqa: E731
    options = RefitOptions(deadline_s=20, bucket_bytes=1024)
    table = make_table({f"w{i}": ((16, 32), torch.float32) for i in range(2)})
    sim, _, landings, _ = two_by_two(lambda rank, t: Sends(t, repeat) if rank == 0 else t, options, table=table)
    raise_any(sim.start())
    caught(sim.refit(1), landings, VerificationError, "w1 [0:8, 0:32]", "trainer 0 (rank 0)")


def test_a_bucket_delivered_to_the_wrong_peer():
    """Two generators that take different halves get each other's bucket, of the right size."""

    class Crossed(InprocChannel):
        def send(self, buffer, dst, tag):
            hub = self._hub
            other = next(i for i in range(2) if plan.bulk.messages[i, 2] != dst)
            return InprocChannel(hub, self._rank).send(buffer, int(plan.bulk.messages[other, 2]), other)

    table = make_table({"a": ((8, 4), torch.float32)})
    landings = [PlainLanding(rows) for rows in halves_of(table)]
    sources = [PlainSource.of(model(table), table, rows_of(table))]
    sim = SimulatedWorld(sources, landings, FAST, lambda rank, t: Crossed(t._hub, rank) if rank == 0 else t)
    raise_any(plans := sim.start())
    plan = plans[0]
    assert len(plan.bulk.messages) == 2
    caught(sim.refit(1), landings, VerificationError, "a [", "trainer 0 (rank 0) holds digest", "generator")


def test_a_message_that_nobody_waits_for(monkeypatch):
    """A pipeline that stops one message early, without digests to notice."""
    whole = CopyTable.messages_of
    monkeypatch.setattr(CopyTable, "messages_of", lambda copies, rank: whole(copies, rank)[: -1 if rank == 2 else None])
    sim, _, landings, _ = two_by_two(options=RefitOptions(deadline_s=20, verify=False))
    raise_any(sim.start())
    caught(sim.refit(1), landings, TransferError, "landing units {-1: 4} (unit: copies) are incomplete")


def test_a_bucket_of_another_size():
    sim, _, landings, _ = two_by_two(lambda rank, t: Sends(t, lambda b, dst, tag: b[:-8]) if rank == 0 else t)
    raise_any(sim.start())
    caught(sim.refit(1), landings, TransferError, "round", "trainer 0 (rank 0)", "w0")


# ---- whole tensors


class Casts(InprocChannel):
    """A broadcast in which the root's `n`-th buffer is what `choose` makes of all so far."""

    def __init__(self, inner, choose):
        super().__init__(inner._hub, inner._rank)
        self.choose, self.seen = choose, []

    def broadcast(self, buffer, root, ranks):
        self.seen.append(buffer.clone())
        for sent in self.choose(self.seen):
            super().broadcast(sent, root, ranks)
        return self.send(buffer[:0], self._rank, 99)


def whole_tensors(choose, landing=PlainLanding, deadline_s=20):
    """All tensors travel whole, one a buffer."""
    table = make_table({f"w{i}": ((16, 32), torch.float32) for i in range(3)})
    options = RefitOptions(transport="broadcast", deadline_s=deadline_s, bucket_bytes=1024)
    wrap = lambda rank, t: Casts(t, choose) if rank == 0 else t  # noqa: E731
    sim, _, landings, full = two_by_two(wrap, options, landing, table)
    raise_any(plans := sim.start())
    assert len(plans[0].misc_buffers) == 3
    return sim, landings, full


def test_whole_tensors_without_a_fault():
    sim, landings, full = whole_tensors(lambda seen: seen[-1:])
    raise_any(sim.refit(1))
    assert all(same_bytes(landings[0].whole[name], full[name]) for name in full)


def test_a_whole_tensor_that_is_missing():
    """The one after it stands in its place, and nothing in the place of the last."""
    sim, landings, _ = whole_tensors(lambda seen: [] if len(seen) == 2 else seen[-1:], deadline_s=2)
    caught(sim.refit(1), landings, TransferError, "whole tensors w2", "from trainer 0 (rank 0)")


def test_a_whole_tensor_too_many():
    """A buffer comes again; all later ones are one late."""
    sim, landings, _ = whole_tensors(lambda seen: seen[-1:] * (2 if len(seen) == 1 else 1))
    caught(sim.refit(1), landings, VerificationError, "w1 [", "w2 [")


def test_whole_tensors_in_another_order():
    order = {1: [], 2: [1, 0], 3: [2]}
    sim, landings, _ = whole_tensors(lambda seen: [seen[i] for i in order[len(seen)]])
    caught(sim.refit(1), landings, VerificationError, "w0 [", "w1 [")


def test_a_loader_that_skips_a_whole_tensor():
    class Skips(PlainLanding):
        def load_misc(self, tensors):
            for name, _ in tensors:
                if name == "w1":
                    return

    sim, landings, _ = whole_tensors(lambda seen: seen[-1:], Skips)
    caught(sim.refit(1), landings, TransferError, "stopped before the last whole tensor")


@pytest.mark.parametrize("transport", ["auto", "broadcast"])
@pytest.mark.parametrize("seed", range(8))
def test_any_bit_of_any_message(seed, transport):
    """Whatever the layouts: one bit of one message that one rank gets, anywhere, is one refused version."""
    rng = random.Random(seed)
    table = random_table(rng, 5)
    full = model(table, seed)
    counts = rng.randint(1, 3), rng.randint(1, 3)
    src, dst = (shard_out(rng, table, count) for count in counts)
    landings = [PlainLanding(rows, [rng.choice((-1, i // 2)) for i in range(len(rows))]) for rows in dst]
    options = RefitOptions(transport=transport, bucket_bytes=1024, deadline_s=20)
    numbers, flips = itertools.count(), []

    class Flipping(InprocChannel):
        casts = 0

        def recv(self, buffer, src, tag):
            pending, number, places = super().recv(buffer, src, tag), next(numbers), range(buffer.numel())
            if tag == -1:  # whole tensors; between them lies what aligns them and nobody reads
                whole = [b for b in plans[0].misc_buffers if b.num_bytes][self.casts % self.count]
                starts = zip(whole.fqns, whole.offsets, strict=True)
                places = [at for f, start in starts for at in range(start, start + table[f].num_bytes)]
                self.casts += 1

            class Flipped:
                def wait(self, deadline_s):
                    pending.wait(deadline_s)
                    if number == target:
                        flips.append(rng.choice(places))
                        buffer[flips[0]] ^= 1 << rng.randrange(8)

            return Flipped()

    sources = [PlainSource.of(full, table, rows) for rows in src]
    sim = SimulatedWorld(sources, landings, options, lambda rank, t: Flipping(t._hub, rank))
    raise_any(plans := sim.start())
    Flipping.count, target = sum(b.num_bytes > 0 for b in plans[0].misc_buffers), None
    raise_any(sim.refit(1))
    count = next(numbers)
    target = count + 1 + rng.randrange(count)
    results = sim.refit(2)
    assert len(flips) == 1 and len(plans[0].table) == 5
    caught(results, landings, VerificationError, "holds digest", before=1)
