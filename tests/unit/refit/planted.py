"""What plants of faults share: small worlds, transports that meddle, and what must follow from a fault."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import trace_loader
from nemo_rl.refit.transports.inproc import InprocChannel

from .simulated import PlainLanding, PlainSource, SimulatedWorld, make_table, random_bytes

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


class Sends(InprocChannel):
    """A transport whose sends go through `change(transport, buffer, dst, tag) -> buffer`."""

    def __init__(self, inner, change):
        super().__init__(inner._hub, inner._rank)
        self.plain, self.change = super().send, change

    def send(self, buffer, dst, tag):
        return super().send(self.change(buffer.clone(), dst, tag), dst, tag)


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
