"""Layouts, plans and statements that cannot be right: refused on all ranks before a byte moves."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.refit.errors import AgreementError, PlanError, VerificationError
from nemo_rl.refit.layout import Holding, TensorMeta
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.region import Region

from .planted import FAST, Traced, caught, halves_of, model, rows_of, two_by_two
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any, same_bytes


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
        session._link.control.asked = Short()
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
