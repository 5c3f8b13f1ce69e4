"""Content in the wrong place, planted in transit, in the trainer's rule and in the generator's layout.

Digests know what transit does. Where a rule or a layout is wrong, both ends of the refit agree on the wrong place, and
only a statement that does not come from it knows: the checkpoint on disk for a trainer that was filled otherwise, the
engine's own load of it for a generator. A rule that is wrong in both directions, reading and giving, is the business of
`tests/e2e/test_trainer_faults.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nemo_rl import checkpoint
from nemo_rl.refit.errors import PlanError, RefitError, VerificationError
from nemo_rl.refit.layout import Holding
from nemo_rl.refit.region import Region
from nemo_rl.refit.start import UnchangedByStart

from .planted import FAST, WHOLE, Sends, Traced, caught, model, rows_of
from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, raise_any


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
    places = {f"experts.{e}.{part}": (e, start) for e in range(2) for part, start in (("gate", 0), ("up", 4))}
    slots = {fqn: (lambda p, e=e, start=start: p["w13"][e, start:][:4]) for fqn, (e, start) in places.items()}
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
