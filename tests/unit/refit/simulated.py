"""Simulated ranks: threads of one process, each with plain tensors, running the real session over in-process mail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.layout import Holding, Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.inproc import Hub, InprocChannel

Rows = Sequence[tuple[str, Region]]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern, NaNs included: equality is checked on bytes."""
    size = 1
    for n in shape:
        size *= n
    raw = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def make_table(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> TensorTable:
    return {name: TensorMeta(*shapes[name]) for name in natural_order(shapes)}


@dataclass
class PlainSource:
    """A trainer rank over plain tensors."""

    whole: TensorTable
    held: list[Holding]

    @classmethod
    def of(cls, full: Mapping[str, torch.Tensor], table: TensorTable, rows: Rows) -> PlainSource:
        held = [Holding(f, r, full[f][r.slices_in(Region.whole(tuple(full[f].shape)))].clone()) for f, r in rows]
        return cls(table, held)

    def table(self) -> TensorTable:
        return self.whole

    def holdings(self) -> list[Holding]:
        return self.held

    def unused(self) -> dict[str, str]:
        return {}

    def load(self, full: Mapping[str, torch.Tensor]) -> None:
        for h in self.held:
            h.view.copy_(full[h.fqn][h.region.slices_in(Region.whole(tuple(full[h.fqn].shape)))])


@dataclass
class PlainLanding:
    """A generator rank over plain tensors; `units` > -1 stage like a repacking engine, copied out on close."""

    rows: Rows
    units: Sequence[int] | None = None
    misc: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seed: int = 0
    version: int = field(default=-1, init=False)
    rejected: str = field(default="", init=False)

    def declare(self, table: TensorTable) -> Declaration:
        self.table = table
        generator = torch.Generator().manual_seed(self.seed)
        self.storage = [random_bytes(r.sizes, table[f].dtype, generator) for f, r in self.rows]
        self.whole: dict[str, torch.Tensor] = {}
        self.unit = list(self.units) if self.units is not None else [-1] * len(self.rows)
        self.staged: dict[int, dict[int, torch.Tensor]] = {}
        self.most_open, self.version, self.rejected, self.finished = 0, -1, "", 0
        return Declaration(Layout.from_regions(self.rows, table, self.unit), self.misc, self.problems)

    def begin(self, version: int) -> None:
        self.rejected = "updating"

    def open(self, unit: int) -> dict[int, torch.Tensor]:
        rows = [i for i, u in enumerate(self.unit) if u == unit]
        if unit == -1:
            return {i: self.storage[i] for i in rows}
        generator = torch.Generator().manual_seed(99)
        self.staged[unit] = {
            i: random_bytes(tuple(self.storage[i].shape), self.storage[i].dtype, generator) for i in rows
        }
        self.most_open = max(self.most_open, len(self.staged))
        return self.staged[unit]

    def close(self, unit: int) -> None:
        for i, staged in self.staged.pop(unit, {}).items():
            self.storage[i].copy_(staged)

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.whole[name] = tensor.clone()

    def finish(self) -> None:
        self.finished += 1

    def commit(self, version: int) -> None:
        self.version, self.rejected = version, ""

    def reject(self, reason: str) -> None:
        self.rejected = reason

    def serve(self) -> list[torch.Tensor]:
        """What the generator would generate from. Raises RuntimeError where it refuses."""
        if self.rejected or self.version == -1:
            raise RuntimeError(f"the generator refuses: {self.rejected or 'it has no weights'}")
        return self.storage

    def scramble(self) -> None:
        generator = torch.Generator().manual_seed(1234)
        for t in self.storage:
            t.copy_(random_bytes(tuple(t.shape), t.dtype, generator))


class SimulatedWorld:
    """All ranks' sessions in one process."""

    def __init__(
        self,
        sources: Sequence[PlainSource],
        landings: Sequence[Any],
        options: RefitOptions | Mapping[int, RefitOptions] | None = None,
        wrap: Callable[[int, Channel], Channel] = lambda rank, channel: channel,
    ) -> None:
        options = options or RefitOptions(deadline_s=20)
        self.world = World.of(len(sources), len(landings))
        self.store = dist.HashStore()
        hub = Hub()
        self.sessions = []
        for rank in range(self.world.size):
            mine = options if isinstance(options, RefitOptions) else options[rank]
            source = sources[rank] if rank < len(sources) else None
            landing = landings[rank - len(sources)] if source is None else None
            channel = wrap(rank, InprocChannel(hub, rank))
            self.sessions.append(RefitSession(rank, self.world, self.store, mine, source, landing, channel=channel))

    def all(self, call: Callable[[RefitSession], Any], ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """Run `call` on every rank at once; the value is its result or the exception."""
        out: dict[int, Any] = {}

        def run(rank: int) -> None:
            try:
                out[rank] = call(self.sessions[rank])
            except Exception as error:
                out[rank] = error

        chosen = list(range(self.world.size)) if ranks is None else list(ranks)
        threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in chosen]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert set(out) == set(chosen), f"ranks {set(chosen) - set(out)} hang"
        return out

    def start(self) -> dict[int, Any]:
        return self.all(lambda s: (s.connect(), s.plan())[1])

    def refit(self, version: int) -> dict[int, Any]:
        return self.all(lambda s: s.refit(version))


def raise_any(results: Mapping[int, Any]) -> None:
    for result in results.values():
        if isinstance(result, Exception):
            raise result
