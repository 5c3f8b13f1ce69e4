"""Every known way to be wrong, planted where it would really happen: the named error appears and nothing is served.

Swapped content is planted in transit (digests know), and in the trainer's rule: then both ends of the refit agree on
the wrong place, and only a statement that does not come from the rule knows: the checkpoint on disk. A rule that is
wrong in both directions, reading and giving, is the business of `tests/e2e/test_trainer_numerics.py`; a loader that is
traced wrongly is that of `tests/golden`, where the engine's own loader is the oracle.
"""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemo_rl import checkpoint
from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.errors import AgreementError, PlanError, RefitError, TransferError, VerificationError
from nemo_rl.refit.layout import Holding, TensorMeta
from nemo_rl.refit.packed import pack
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.start import UnchangedByStart
from nemo_rl.refit.trace import trace_loader
from nemo_rl.refit.transports.inproc import InprocChannel
from nemo_rl.refit.verify import Verifier

from .layouts import random_table, shard_out
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, random_bytes, same_bytes

WHOLE = Region.whole
FAST = RefitOptions(deadline_s=20)


def model(table, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bytes(meta.shape, meta.dtype, generator) for name, meta in table.items()}


def rows_of(table):
    return [(f, WHOLE(m.shape)) for f, m in table.items()]


def halves_of(table):
    """Rows of two trainers that cut every tensor along its first axis."""

    def half(shape, rank):
        cut = shape[0] // 2
        return Region((cut * rank, *[0] * (len(shape) - 1)), (shape[0] - cut if rank else cut, *shape[1:]))

    return [[(f, half(m.shape, rank)) for f, m in table.items()] for rank in range(2)]


def caught(results, landings, error, *texts, before=-1):
    """The named error appears, every rank ends with an error, no generator commits or serves."""
    named = [r for r in results.values() if isinstance(r, error) and all(text in str(r) for text in texts)]
    assert named, results
    assert all(isinstance(r, RefitError) for r in results.values()), results
    for landing in landings:
        assert landing.version == before
        with pytest.raises(RuntimeError, match="refuses"):
            landing.serve()


def block():
    """Two gated experts and attention with two query groups, as Hugging Face names them."""
    experts = {f"experts.{e}.{part}": ((4, 6), torch.float32) for e in range(2) for part in ("gate", "up")}
    attention = {"q": ((8, 6), torch.float32), "k": ((4, 6), torch.float32), "v": ((4, 6), torch.float32)}
    return make_table({**experts, **attention})


class Fused:
    """A trainer with memory fused as Megatron fuses it, filled by code of its own; its rule says what lies where."""

    def __init__(self, full):
        self.memory = {f"fc1.{e}": torch.cat([full[f"experts.{e}.gate"], full[f"experts.{e}.up"]]) for e in range(2)}
        groups = [(full["q"][4 * g :][:4], full["k"][2 * g :][:2], full["v"][2 * g :][:2]) for g in range(2)]
        self.memory["qkv"] = torch.cat([part for group in groups for part in group])
        self.held = self.rule()

    def rule(self):
        held = []
        for e in range(2):
            gate, up = self.memory[f"fc1.{e}"].chunk(2)
            held += [Holding(f"experts.{e}.gate", WHOLE((4, 6)), gate), Holding(f"experts.{e}.up", WHOLE((4, 6)), up)]
        for g, rows in enumerate(self.memory["qkv"].chunk(2)):
            for name, size, view in zip("qkv", (4, 2, 2), rows.split((4, 2, 2)), strict=True):
                held.append(Holding(name, Region((size * g, 0), (size, 6)), view))
        return held

    def table(self):
        return block()

    def holdings(self):
        return self.held

    def unused(self):
        return {}

    def swap(self, pairs):
        """The fault: a rule that takes one box for the other."""
        views = {(h.fqn, h.region): h.view for h in self.held}
        other = {**dict(pairs), **{b: a for a, b in pairs}}
        self.held = [replace(h, view=views[other.get((h.fqn, h.region), (h.fqn, h.region))]) for h in self.held]


def box(fqn, start=0, size=4):
    return fqn, Region((start, 0), (size, 6))


SWAPS = {
    "two experts": [(box(f"experts.0.{part}"), box(f"experts.1.{part}")) for part in ("gate", "up")],
    "gate and up": [(box("experts.1.gate"), box("experts.1.up"))],
    "q rows of two groups": [(box("q", 0), box("q", 4))],
    "k rows of two groups": [(box("k", 0, 2), box("k", 2, 2))],
    "v rows of two groups": [(box("v", 0, 2), box("v", 2, 2))],
}


class Sends(InprocChannel):
    """A transport whose sends go through `change(transport, buffer, dst, tag) -> buffer`."""

    def __init__(self, inner, change):
        super().__init__(inner._hub, inner._rank)
        self.plain, self.change = super().send, change

    def send(self, buffer, dst, tag):
        return super().send(self.change(buffer.clone(), dst, tag), dst, tag)


@pytest.mark.parametrize("what", SWAPS)
def test_swapped_in_transit(what):
    def change(buffer, dst, tag):
        parts, start = {}, 0
        for copy in (plan.copy(plan.bulk, i) for i in range(len(plan.bulk))):  # all of one message, densely packed
            size = copy.region.volume * 4
            parts[copy.fqn, copy.region] = buffer[start : start + size]
            start += size
        for a, b in SWAPS[what]:
            kept = parts[a].clone()
            parts[a].copy_(parts[b])
            parts[b].copy_(kept)
        return buffer

    full = model(block())
    landing = PlainLanding(rows_of(block()))
    wrap = lambda rank, t: Sends(t, change) if rank == 0 else t  # noqa: E731
    sim = SimulatedWorld([Fused(full)], [landing], FAST, wrap)
    raise_any(plans := sim.start())
    plan = plans[0]
    assert len(plan.bulk.messages) == 1
    caught(sim.refit(1), [landing], VerificationError, *(box[0] for pair in SWAPS[what] for box in pair), "trainer 0")


@pytest.mark.parametrize("what", [None, *SWAPS])
def test_swapped_by_the_trainers_rule(what, tmp_path):
    full = model(block())
    full = {name: tensor.nan_to_num(0.5) for name, tensor in full.items()}
    save_file(full, tmp_path / "model.safetensors")
    source, landing = Fused(full), PlainLanding(rows_of(block()))
    if what is not None:
        source.swap(SWAPS[what])
    sim = SimulatedWorld([source], [landing], FAST)
    differences = checkpoint.differences(source.holdings(), tmp_path)
    results = sim.all(lambda s: (s.connect(), s.plan(differences if s.rank == 0 else ())))
    if what is None:
        raise_any(results)
        return raise_any(sim.refit(1))
    named = [f"{fqn} {region}" for pair in SWAPS[what] for fqn, region in pair]
    caught(results, [landing], PlanError, "trainer 0", "elements are not those of", *named)
    return None


@pytest.mark.parametrize("fault", [None, "gate and up", "two experts", "a value of another checkpoint"])
def test_swapped_by_the_generators_layout(fault):
    """Rows that do not say what the loader does: the loader's own work, done before, tells."""
    slots = {
        f"experts.{e}.{part}": (lambda p, e=e, i=i: p["w13"][e, 4 * i :][:4]) for e in range(2) for i, part in PARTS
    }
    table = make_table({fqn: ((4, 6), torch.float32) for fqn in slots})
    full = model(table)
    engine = Traced(lambda: {"w13": torch.empty(2, 8, 6), "inv_freq": torch.ones(3)}, slots)
    engine.derived["inv_freq"] = "computed from the configuration"
    engine.load(full)
    pairs = {"gate and up": ("experts.1.gate", "experts.1.up"), "two experts": ("experts.0.up", "experts.1.up")}
    engine.mistaken = pairs.get(fault, ())
    if fault == "a value of another checkpoint":
        full["experts.1.gate"] = full["experts.1.gate"] * 1
        full["experts.1.gate"].view(torch.int32)[3, 5] ^= 1
    source, checked = PlainSource.of(full, table, rows_of(table)), UnchangedByStart(engine, lambda: engine.params)
    sim = SimulatedWorld([source], [checked], FAST)
    raise_any(sim.start())
    results = sim.refit(0)
    if fault is not None:
        return caught(results, [engine], RefitError, "version 0 brings other bytes", "from the checkpoint: w13;")
    raise_any(results)
    source.load(model(table, 6))
    return raise_any(sim.refit(1))  # a trained model may differ


PARTS = ((0, "gate"), (1, "up"))

# ---- layouts and plans


def test_a_hole_in_a_published_layout():
    table = make_table({"a": ((8, 4), torch.float32), "b": ((8, 4), torch.float32)})
    first, second = halves_of(table)
    second[1] = ("b", Region((5, 0), (3, 4)))
    full = model(table)
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(full, table, rows) for rows in (first, second)], [landing], FAST)
    caught(sim.start(), [landing], PlanError, "b [0:8, 0:4]", "generator 0 (rank 2)", "28 of 32 elements")


def test_shards_that_overlap_with_other_bytes():
    """Trainer 1 believes that its shard starts a row earlier than it does."""
    table = make_table({"a": ((8, 4), torch.float32)})
    full = model(table)
    sources = [PlainSource.of(full, table, [("a", Region((0, 0), (4, 4)))]) for _ in range(2)]
    sources[1].held = [Holding("a", Region((3, 0), (5, 4)), torch.cat([full["a"][4:], full["a"][:1]]))]
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld(sources, [landing], FAST)
    raise_any(sim.start())
    caught(sim.refit(1), [landing], VerificationError, "a [3:4, 0:4]", "trainer 0 (rank 0)", "trainer 1 (rank 1)")


def test_shards_that_overlap_with_equal_bytes_are_served():
    table = make_table({"a": ((8, 4), torch.float32)})
    full = model(table)
    boxes = [Region((0, 0), (5, 4)), Region((3, 0), (5, 4))]
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(full, table, [("a", b)]) for b in boxes], [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert same_bytes(landing.serve()[0], full["a"])


def test_a_layout_that_writes_bytes_twice():
    """The loader puts two tensors into one place."""
    engine = Traced(lambda: {"w": torch.empty(4, 6)}, {"a": lambda p: p["w"], "b": lambda p: p["w"]})
    refused_for(engine, make_table({"a": ((4, 6), torch.float32), "b": ((4, 6), torch.float32)}), "w", "0:96")


def test_a_truncated_plan():
    sim, _, _, _ = two_by_two()
    raise_any(plans := sim.start())
    data = plans[0].to_bytes()
    assert RefitPlan.from_bytes(data).digest == plans[0].digest
    for size in (0, 7, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="refused"):
            RefitPlan.from_bytes(data[:size])


@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_truncated_statement(size):
    """A layout that arrives shorter than it was published."""
    sim, _, landings, _ = two_by_two()
    store = sim.store
    whole = store.set

    class Short:
        def set(self, key, value):
            whole(key, value[:size] if key.startswith("blob/") and len(value) > 200 else value)

        def __getattr__(self, name):
            return getattr(store, name)

    raise_any(sim.all(lambda s: s.connect()))
    for session in sim.sessions:
        session._link.control.store = Short()
    caught(sim.all(lambda s: s.plan()), landings, PlanError, "is not the one that was published")


def test_plan_digests_that_differ():
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    plan = sim.sessions[1]._agreed.plan
    object.__setattr__(plan, "required_bytes", 1)
    plan.__dict__.pop("digest", None)
    caught(sim.refit(1), landings, AgreementError, "trainer 1 (rank 1) has plan digest", "trainer 0 (rank 0) has")


def test_a_dtype_that_differs_between_the_sides():
    class Half(PlainLanding):
        def declare(self, table):
            return super().declare({name: TensorMeta(meta.shape, torch.bfloat16) for name, meta in table.items()})

    table = make_table({"a": ((8, 4), torch.float32)})
    landing = Half(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], FAST)
    caught(sim.start(), [landing], PlanError, "a: generator 0 (rank 1) says", "bfloat16", "float32")


def test_a_dtype_that_differs_between_trainers():
    tables = [make_table({"a": ((8, 4), dtype)}) for dtype in (torch.float32, torch.int32)]
    sources = [PlainSource.of(model(t), t, rows) for t, rows in zip(tables, halves_of(tables[0]), strict=True)]
    landing = PlainLanding(rows_of(tables[0]))
    sim = SimulatedWorld(sources, [landing], FAST)
    caught(sim.start(), [landing], PlanError, "the tensor table of trainer 1 (rank 1)")


# ---- what a loader needs and nobody brings


class Traced(PlainLanding):
    """A generator whose layout is traced from its own loader: `slots` says where it puts each tensor."""

    def __init__(self, make, slots):
        super().__init__([])
        self.make, self.slots, self.params = make, slots, make()
        self.mistaken, self.derived = (), {}

    def load(self, tensors):
        for name, tensor in tensors.items():
            self.slots[name](self.params).copy_(tensor)

    def declare(self, table):
        meta = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in self.params.items()}

        def load(weights):
            for name, tensor in weights:
                self.slots[name](meta).copy_(tensor)

        trace = trace_loader(load, table, meta, self.derived)
        other = dict(zip(self.mistaken, reversed(self.mistaken), strict=True))  # the fault: one row taken for the other
        self.rows = [(other.get(row.fqn, row.fqn), row.region) for row in trace.rows]
        said = replace(super().declare(table), misc=trace.misc, problems=trace.problems)
        self.storage = [
            self.params[row.param].as_strided(row.region.sizes, row.stride, row.storage_offset) for row in trace.rows
        ]
        return said


def refused_for(landing, table, *texts):
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], FAST)
    caught(sim.start(), [landing], PlanError, *texts, "generator 0 (rank 1)")


def without(slots, name):
    return make_table({f: ((4, 6), torch.float32) for f in slots if f != name})


def test_a_non_gated_up_projection_that_is_dropped():
    slots = {f"experts.{e}.up": (lambda p, e=e: p["w13"][e]) for e in range(3)}
    engine = Traced(lambda: {"w13": torch.empty(3, 4, 6)}, slots)
    refused_for(engine, without(slots, "experts.1.up"), "w13", "96:192")


def test_a_scale_without_its_weight():
    slots = {"w": lambda p: p["w"], "w_scale_inv": lambda p: p["w_scale"]}
    engine = Traced(lambda: {"w": torch.empty(4, 6), "w_scale": torch.empty(4, 6)}, slots)
    refused_for(engine, without(slots, "w"), "w: nothing is written")


def test_a_weight_without_its_scale():
    slots = {"w": lambda p: p["w"], "w_scale_inv": lambda p: p["w_scale"]}
    engine = Traced(lambda: {"w": torch.empty(4, 6), "w_scale": torch.empty(4, 6)}, slots)
    refused_for(engine, without(slots, "w_scale_inv"), "w_scale: nothing is written")


def test_a_buffer_that_is_not_carried():
    slots = {"gate.weight": lambda p: p["gate"], "gate.e_score_correction_bias": lambda p: p["expert_bias"]}
    engine = Traced(lambda: {"gate": torch.empty(4, 6), "expert_bias": torch.empty(4, 6)}, slots)
    refused_for(engine, without(slots, "gate.e_score_correction_bias"), "expert_bias: nothing is written")


# ---- in transit


def two_by_two(wrap=lambda rank, t: t, options=FAST, landing=PlainLanding, table=None, misc=()):
    """Two trainers that cut every tensor, two generators: one takes all, the other the lower half of each tensor."""
    table = table or make_table({f"w{i}": ((8, 8), torch.float32) for i in range(4)})
    full = model(table)
    sources = [PlainSource.of(full, table, rows) for rows in halves_of(table)]
    misc = dict.fromkeys(misc, "computed by the loader")
    landings = [landing(rows, misc=misc) for rows in (rows_of(table), halves_of(table)[0])]
    return SimulatedWorld(sources, landings, options, wrap), sources, landings, full


def reload(sources, seed):
    full = model(sources[0].whole, seed)
    for source in sources:
        source.load(full)
    return full


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


# ---- sources


def test_a_tied_weight_updated_on_one_side():
    """First and last stage of a pipeline hold the embedding; only one of them took the step."""
    table = make_table({"embed": ((8, 4), torch.float32), "norm": ((4,), torch.float32)})
    full = model(table)
    sources = [PlainSource.of(full, table, rows_of(table)) for _ in range(2)]
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld(sources, [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    sources[1].held[0].view.view(torch.int32)[3, 1] ^= 1
    texts = ("embed [0:8, 0:4]", "trainer 0 (rank 0) holds", "its replica trainer 1 (rank 1)")
    caught(sim.refit(2), [landing], VerificationError, *texts, before=1)


def test_a_tied_weight_held_twice_by_one_rank():
    table = make_table({"embed": ((8, 4), torch.float32)})
    full = model(table)
    source = PlainSource.of(full, table, rows_of(table) * 2)
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([source], [landing], FAST)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    source.held[1].view.view(torch.int32)[3, 1] ^= 1
    caught(sim.refit(2), [landing], VerificationError, "embed [0:8, 0:4]", "its replica trainer 0", before=1)


@pytest.mark.parametrize(("sent", "changed"), [(1, "w0"), (1, "w3"), (4, "w2")])
def test_a_source_that_changes_during_the_refit(sent, changed):
    """An optimizer step that races the refit: over what was sent, what is still to be sent, behind the last message."""
    count = []

    class Racing(InprocChannel):
        def send(self, buffer, dst, tag):
            pending = super().send(buffer, dst, tag)
            count.append(tag)
            if len(count) == sent * 2:  # both generators take all that trainer 0 has
                next(h for h in sources[0].held if h.fqn == changed).view.view(torch.int32).add_(1)
            return pending

    options = RefitOptions(deadline_s=20, bucket_bytes=1024)
    table = make_table({f"w{i}": ((16, 32), torch.float32) for i in range(4)})
    wrap = lambda rank, t: Racing(t._hub, rank) if rank == 0 else t  # noqa: E731
    sim, sources, landings, _ = two_by_two(wrap, options, table=table)
    raise_any(sim.start())
    results = sim.refit(1)
    assert len(count) == 8
    texts = (f"{changed} [0:8, 0:32]", "trainer 0 (rank 0) held digest", "when the refit began")
    caught(results, landings, VerificationError, *texts)


def test_a_trainer_that_missed_a_step():
    """A pipeline stage that lags: no other rank holds what it holds, only its count tells."""
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    raise_any(sim.all(lambda s: s.refit(1, {0: 4, 1: 4}.get(s.rank))))
    results = sim.all(lambda s: s.refit(2, {0: 5, 1: 4}.get(s.rank)))
    assert all("trainer 1 (rank 1) has optimizer steps 4, trainer 0 (rank 0) has 5" in str(r) for r in results.values())
    assert all(isinstance(r, AgreementError) for r in results.values())
    assert all(landing.version == 1 and landing.serve() for landing in landings), "untouched, they serve on"


# ---- versions, hooks and the checker


def test_a_version_after_a_newer_one():
    sim, _, landings, full = two_by_two()
    raise_any(sim.start())
    raise_any(sim.refit(5))
    results = sim.refit(4)
    assert all(
        isinstance(r, AgreementError) and "version 4 was asked for after version 5" in str(r) for r in results.values()
    )
    assert all(
        landing.version == 5 and same_bytes(landing.serve()[0], full["w0"][: len(landing.serve()[0])])
        for landing in landings
    )


def test_ranks_that_ask_for_different_versions():
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    results = sim.all(lambda s: s.refit(2 if s.rank == 3 else 1))
    assert all(
        isinstance(r, AgreementError) and "generator 1 (rank 3) has version 2" in str(r) for r in results.values()
    )
    assert all(landing.version == -1 for landing in landings)


def test_nothing_is_sent_before_every_engine_is_closed():
    closed, early = [], []

    class Slow(PlainLanding):
        def begin(self, version):
            time.sleep(0.2)
            super().begin(version)
            closed.append(version)

    def note(buffer, dst, tag):
        early.append(len(closed) < 2)
        return buffer

    sim, _, _, _ = two_by_two(lambda rank, t: Sends(t, note), landing=Slow)
    raise_any(sim.start())
    raise_any(sim.refit(1))
    assert early and not any(early)


def test_a_finalize_hook_that_did_not_run():
    """The engine counts what it processed; a unit whose processing was left out is named."""

    class Repacking(PlainLanding):
        def declare(self, table):
            self.processed = set()
            return super().declare(table)

        def close(self, unit):
            super().close(unit)
            if unit != 1:  # the fault
                self.processed.add(unit)

        def finish(self):
            super().finish()
            missing = set(self.unit) - self.processed
            if missing:
                raise RuntimeError(f"processing of units {sorted(missing)} did not run")

    table = make_table({f"w{i}": ((8, 8), torch.float32) for i in range(3)})
    landing = Repacking(rows_of(table), [0, 1, 2])
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table))], [landing], FAST)
    raise_any(sim.start())
    caught(sim.refit(1), [landing], RefitError, "processing of units [1] did not run")


def test_a_prefix_cache_that_is_kept():
    """Caches are dropped in `commit`; an engine that cannot drop them does not serve the new weights beside them."""

    class Cached(PlainLanding):
        def commit(self, version):
            raise RuntimeError("the KV cache still holds blocks of the version before")

    sim, _, landings, _ = two_by_two(landing=Cached)
    raise_any(sim.start())
    caught(sim.refit(1), landings, RefitError, "the KV cache still holds blocks")


@pytest.mark.parametrize("side", ["verify", "pipeline", "misc"])
def test_a_checker_that_fails(side, monkeypatch):
    """Digests that cannot be taken: of the source, of what lands in place, of whole tensors."""

    class Broken(Ledger):
        def take(self, number, view, region):
            raise RuntimeError("planted")

    sim, _, landings, _ = two_by_two(misc=("w0",))
    raise_any(sim.start())
    monkeypatch.setattr(f"nemo_rl.refit.{side}.Ledger", Broken)
    caught(sim.refit(1), landings, RefitError, "planted")


@pytest.mark.parametrize("side", ["pipeline", "misc"])
def test_a_checker_that_skips(side, monkeypatch):
    """Also where the digest is 0, as that of zeros."""

    class Lazy(Ledger):
        def take(self, number, view, region):
            return None

    sim, sources, landings, _ = two_by_two(misc=("w0",))
    raise_any(sim.start())
    for holding in (h for source in sources for h in source.held):
        holding.view.zero_()
    monkeypatch.setattr(f"nemo_rl.refit.{side}.Ledger", Lazy)
    texts = {"pipeline": ("w1 [0:4, 0:8]", "has none"), "misc": ("w0 [0:4, 0:8]", "has none")}[side]
    caught(sim.refit(1), landings, VerificationError, *texts)


def test_replicas_that_are_not_told_of(monkeypatch):
    """A trainer that sends no digests of what it shares with another."""
    table = make_table({"embed": ((8, 4), torch.float32)})
    landing = PlainLanding(rows_of(table))
    sim = SimulatedWorld([PlainSource.of(model(table), table, rows_of(table)) for _ in range(2)], [landing], FAST)
    raise_any(sim.start())
    verifier = sim.sessions[0]._agreed.verifier
    verifier._told = replace(verifier._told, number=verifier._told.number[:0], peer=verifier._told.peer[:0])
    statements = verifier.statements
    empty = {name: np.zeros(0, np.int64) for name in ("bulk", "misc", "shared")}
    verifier.statements = lambda held: {1: pack(None, empty), **statements(held)}
    caught(sim.refit(1), [landing], VerificationError, "trainer 0 (rank 0) sent 0 digests for 1 shared boxes")


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, -8), None])
def test_digests_that_arrive_damaged(cut, monkeypatch):
    """A trainer's statement that is truncated, or that has fewer digests than it sent copies."""
    sim, _, landings, _ = two_by_two()
    raise_any(sim.start())
    statements = Verifier.statements

    def damaged(verifier, held):
        said = statements(verifier, held)
        empty = {name: np.zeros(0, np.int64) for name in ("bulk", "misc", "shared")}
        return {peer: data[cut] if cut is not None else pack(None, empty) for peer, data in said.items()}

    monkeypatch.setattr(Verifier, "statements", damaged)
    caught(sim.refit(1), landings, VerificationError, "decode" if cut is not None else "sent 0 digests for 4 copies")


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
