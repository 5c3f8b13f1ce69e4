"""What links give, measured at start: refits of made-up tensors through each transport's own mover.

Trainers and generators are paired, all pairs move at once, and a probe takes what its slowest rank takes. Rates are
those with which `cost.Load` says of the probes what was measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, World
from nemo_rl.refit.control import Control
from nemo_rl.refit.cost import Demand, Links, Load, Rates
from nemo_rl.refit.device import finish
from nemo_rl.refit.digest import Ledger, Piece, Pieces
from nemo_rl.refit.errors import RefitError, TransferError
from nemo_rl.refit.layout import Holding, Layout, SourceViews, TensorMeta, TensorTable
from nemo_rl.refit.pipeline import Arrivals, Pipeline, Tracker
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.refit.strided import Jobs
from nemo_rl.refit.transports.base import Channel
from nemo_rl.refit.transports.lanes import Flight, Lanes, Post
from nemo_rl.refit.transports.mover import Setting, Transport
from nemo_rl.refit.transports.nccl import NcclChannel
from nemo_rl.refit.transports.registry import open_channel

_MOST_PAIRS = 8  # that are measured in a large world
_REPEAT = {"cuda": 12, "cpu": 4}  # timed runs of a probe, after one that is not timed
MOST_BYTES = {"cuda": 3 << 30, "cpu": 24 << 20}
"""Of what a pair moves in one probe, where there is room for it."""

_MEETINGS = 4  # of all ranks that are timed
_TINY = 1e-9  # seconds; what a difference of two measurements is at least
_DTYPE = torch.bfloat16
_UNIT = Rates(0.0, 0.0, 0.0, 0.0, 1.0, 1.0, one_sided=True, overlaps=False)  # spans in bytes


@dataclass(frozen=True, slots=True)
class Probe:
    """What one pair moves: `count` boxes of `rows` runs of `run_bytes`, of which every `step`-th is taken."""

    count: int
    rows: int
    run_bytes: int
    step: int
    bucket_bytes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.count * self.rows, self.step, self.run_bytes // _DTYPE.itemsize

    def boxes(self, step: int) -> list[Region]:
        """The boxes at one end, `step` runs wide."""
        sizes = self.rows, step, self.shape[2]
        return [Region((i * self.rows, 0, 0), sizes) for i in range(self.count)]


def probes_of(kind: str, bucket_bytes: int, free_bytes: int | None = None) -> dict[str, Probe]:
    """What is moved on devices of `kind` that have `free_bytes`.

    Long and short runs in two sizes: what the larger takes longer is the price of its bytes alone. On GPUs they are as
    many messages as make a rank pack some while others are on their way; what those cost is part of the price.
    """
    many, few = (15, 5) if kind == "cuda" else (1, 1)
    count, small, row = (256, 2048, 1536) if kind == "cuda" else (64, 2048, 1536)
    most = min(MOST_BYTES[kind], count * bucket_bytes)
    most = max(min(most, most if free_bytes is None else free_bytes // 8), 3 * small)
    return {
        "start": Probe(1, 1, small, 1, bucket_bytes),
        "run": Probe(many, most // small // many, small, 1, bucket_bytes),
        "third of run": Probe(few, most // 3 // small // few, small, 1, bucket_bytes),
        "short": Probe(many, most // row // many, row, 2, bucket_bytes),
        "third of short": Probe(few, most // 3 // row // few, row, 2, bucket_bytes),
        "copies": Probe(count, 1, small, 1, bucket_bytes),
        "messages": Probe(count, 1, small, 1, small),
    }


def measure(
    control: Control,
    transports: Sequence[Transport],
    options: RefitOptions,
    device: torch.device,
    free_bytes: int | None = None,
) -> Links:
    """Measure every one of `transports` with at most a part of `free_bytes`; all ranks call it.

    Raises:
        TransferError: one of them failed; its name and why.
        RefitError: another rank failed.
    """
    channel = _open(control, device)
    probes = probes_of(device.type, options.bucket_bytes, free_bytes)
    try:
        rates = {}
        for transport in transports:
            found = _run_all(_Runner(control, transport, options, device, channel), probes)
            rates[transport.name] = fit(found, one_sided=transport.one_sided, overlaps=device.type == "cuda")
    finally:
        channel.close()
    links = Links(rates, *_digest_rates(control, device), _meet_s(control))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # engines and trainers count on this memory
    return links


def _run_all(runner: _Runner, probes: Mapping[str, Probe]) -> dict[str, tuple[Load, float]]:
    try:
        return {name: runner.run(probe) for name, probe in probes.items()}
    except RefitError:
        raise
    except Exception as error:
        name = runner.transport.name
        raise TransferError(
            f"transport '{name}' failed while links were measured: {error}",
            rank=runner.rank,
            phase="connect",
            remedy=f"repair what '{name}' needs, name another transport, or set policy.refit.measure_links=never",
        ) from error


def _open(control: Control, device: torch.device) -> Channel:
    ends = dist.PrefixStore("links", control.store), control.rank, control.world.size, control.deadline_s
    return open_channel(device, *ends) if device.type == "cpu" else _OneSetOfLanes(*ends, device)


class _OneSetOfLanes(NcclChannel):
    """Communicators take long to make: the movers of all probes borrow the same."""

    _kept: Lanes | None = None

    def lanes(self, count: int) -> Lanes:
        self._kept = self._kept or super().lanes(count)
        return _Lent(self._kept)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
        super().close()


@dataclass(frozen=True, slots=True)
class _Lent:
    """Lanes that stay open when their borrower closes them."""

    own: Lanes

    def exchange(
        self,
        lane: int,
        sends: Sequence[Post],
        recvs: Sequence[Post],
        end: float,
        look: Callable[[], None] = lambda: None,
    ) -> Flight:
        return self.own.exchange(lane, sends, recvs, end, look)

    def ahead(self) -> AbstractContextManager[None]:
        return self.own.ahead()

    def prepare(self, jobs: Jobs) -> Callable[[], None]:
        return self.own.prepare(jobs)

    def finish(self, end: float, look: Callable[[], None]) -> None:
        self.own.finish(end, look)

    def close(self) -> None:
        return None


class _Runner:
    """Runs probes by one transport on one rank."""

    def __init__(
        self, control: Control, transport: Transport, options: RefitOptions, device: torch.device, channel: Channel
    ) -> None:
        self._control, self.rank, self.transport = control, control.rank, transport
        self._num_streams, self.device, self._channel = options.num_streams, device, channel
        self.bucket_bytes = options.bucket_bytes

    def run(self, probe: Probe) -> tuple[Load, float]:
        """What the probe asks of links, and the seconds of the slowest rank in the best run."""
        case = Case.of(self._control.world, probe)
        pipeline = Pipeline(case.plan, self.rank, self._channel, self._num_streams, self.device)
        ends = case.sources, case.landings
        setting = Setting(case.plan, self.rank, self.device, self._control, pipeline, *ends)
        mover = self.transport.mover(setting)
        held, views = case.source(self.rank, self.device), case.landing(self.rank, self.device)
        took = []
        try:
            for _ in range(1 + _REPEAT[self.device.type]):
                tracker = case.tracker(self.rank, self.device, views)
                news = any(other for (other,) in self._control.meet("connect", (mover.ready(held, tracker),)))
                started = time.monotonic()
                mover.run(case.plan.bulk, held, tracker, news, self._control.deadline_s)
                finish(self.device, started + self._control.deadline_s)
                took.append(time.monotonic() - started)
        finally:
            mover.close()
        said = self._control.gather("connect", json.dumps(took[1:]).encode())
        slowest = [max(run) for run in zip(*map(json.loads, said.values()), strict=True)]
        return Load.of(Demand(case.plan, case.sources, case.landings)), min(slowest)


@dataclass(frozen=True, eq=False)
class Case:
    """One probe in one world."""

    probe: Probe
    plan: RefitPlan
    sources: Mapping[int, Layout]
    landings: Mapping[int, Layout]

    @classmethod
    def of(cls, world: World, probe: Probe) -> Case:
        pairs = _pairs(world)
        table: TensorTable = {f"probe.{i}": TensorMeta(probe.shape, _DTYPE) for i in range(len(pairs))}
        ends = []
        for side, ranks, step in ((0, world.trainers, probe.step), (1, world.generators, 1)):
            rows = {r: [f"probe.{i}" for i, pair in enumerate(pairs) if pair[side] == r] for r in ranks}
            boxes = probe.boxes(step)
            ends.append(
                {r: Layout.from_regions([(f, b) for f in own for b in boxes], table) for r, own in rows.items()}
            )
        declared = {r: Declaration(layout) for r, layout in ends[1].items()}
        plan = plan_refit(world, ends[0], declared, table, bucket_bytes=probe.bucket_bytes)
        return cls(probe, plan, *ends)

    def source(self, rank: int, device: torch.device) -> SourceViews:
        layout = self.sources.get(rank)
        if layout is None:
            return SourceViews(())
        return SourceViews([Holding(layout.fqn(i), layout.region(i), v) for i, v in _views(layout, device).items()])

    def landing(self, rank: int, device: torch.device) -> Mapping[int, torch.Tensor]:
        """Destinations in the opposite order, so that neighbouring copies cannot be merged."""
        layout = self.landings.get(rank)
        return {} if layout is None else _views(layout, device, backwards=True)

    def tracker(self, rank: int, device: torch.device, views: Mapping[int, torch.Tensor]) -> Tracker | None:
        layout = self.landings.get(rank)
        if layout is None:
            return None
        arrivals = Arrivals(self.plan, self.plan.bulk, rank, layout, device)
        return Tracker(self.plan, self.plan.bulk, arrivals, _Views(views), verify=False)


@dataclass(frozen=True, slots=True)
class _Views:
    """A sink whose storage is always open."""

    views: Mapping[int, torch.Tensor]

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return self.views

    def close(self, unit: int) -> None:
        return None


def _pairs(world: World) -> list[tuple[int, int]]:
    """Trainer and generator of each pair; every rank of a small world is in one, and never with itself if it can."""
    num_t, num_g = len(world.trainers), len(world.generators)
    count = max(num_t, num_g)
    shift = int(bool(world.shared))
    chosen = sorted({i * count // min(count, _MOST_PAIRS) for i in range(min(count, _MOST_PAIRS))})
    return [(world.trainers[i % num_t], world.generators[(i + shift) % num_g]) for i in chosen]


def _views(layout: Layout, device: torch.device, backwards: bool = False) -> dict[int, torch.Tensor]:
    """Row -> zeroed storage; all rows have one size and lie one after the other."""
    if not len(layout):
        return {}
    sizes = layout.region(0).sizes
    whole = torch.zeros((len(layout), *sizes), dtype=_DTYPE, device=device)
    return {i: whole[len(layout) - 1 - i if backwards else i] for i in range(len(layout))}


def fit(found: Mapping[str, tuple[Load, float]], *, one_sided: bool, overlaps: bool) -> Rates:
    """Rates that explain each probe of `probes_of` (its load, its seconds)."""
    start_s = found["start"][1]
    spans = {name: (load.span(load.num_bytes), seconds) for name, (load, seconds) in found.items()}
    run, short = (_slope(spans[f"third of {name}"], spans[name]) for name in ("run", "short"))
    rates = replace(_UNIT, start_s=start_s, run_bytes_per_s=run, one_sided=one_sided, overlaps=overlaps)
    rates = replace(rates, short_bytes_per_s=min(short, run))
    each = {}
    for name in ("copies", "messages"):
        load, seconds = found[name]
        moving = 0.0 if overlaps else load.transfer_s(replace(rates, start_s=0.0))
        each[name] = max(seconds - start_s - moving, 0.0) / load.span(load.num_copies)
    message_s = 0.0 if one_sided else max(each["messages"] - each["copies"], 0.0)
    rates = replace(rates, copy_s=each["copies"], message_s=message_s)
    if one_sided or not overlaps:
        return rates
    load, seconds = found["third of short"]
    return replace(rates, fill_s=max(seconds - load.transfer_s(rates), 0.0))


def _slope(small: tuple[float, float], large: tuple[float, float]) -> float:
    """Bytes a second that explain two runs (bytes, seconds); at most twice what the large one shows as a whole."""
    more, longer = large[0] - small[0], large[1] - small[1]
    return more / max(longer, 0.5 * large[1] * more / large[0], _TINY)


def _digest_rates(control: Control, device: torch.device) -> tuple[float, float]:
    """(bytes a second, seconds a piece) of digests while all ranks take theirs."""
    rows, count = (1 << 16, 256) if device.type == "cuda" else (1 << 10, 64)
    runs = []
    for size in (rows // 4, rows):
        one = torch.zeros((size, 2048), dtype=_DTYPE, device=device)
        whole = Region.whole(tuple(one.shape))
        runs.append((float(one.nbytes), _digest_s(control, Pieces([Piece(0, 0, whole, whole)]), {0: one}, 1)))
    speed = _slope(*runs)
    small, part = torch.zeros((2, 4, 8), dtype=_DTYPE, device=device), Region.whole((2, 4, 8))
    many = Pieces([Piece(i, i, part, part) for i in range(count)])
    many_s = _digest_s(control, many, {i: small.clone() for i in range(count)}, count)
    fixed_s = max(runs[1][1] - runs[1][0] / speed, 0.0) if device.type == "cuda" else 0.0
    return speed, max(many_s - fixed_s, 0.0) / count


def _digest_s(control: Control, pieces: Pieces, views: Mapping[int, torch.Tensor], count: int) -> float:
    took = []
    for _ in range(1 + _MEETINGS):
        control.meet("connect")
        started = time.monotonic()
        ledger = Ledger(count)
        pieces.take(views, ledger)
        ledger.read()
        took.append(time.monotonic() - started)
    return _worst(control, min(took[1:]))


def _meet_s(control: Control) -> float:
    started = time.monotonic()
    for _ in range(_MEETINGS):
        control.meet("connect")
    return _worst(control, (time.monotonic() - started) / _MEETINGS)


def _worst(control: Control, seconds: float) -> float:
    said = control.gather("connect", json.dumps(seconds).encode())
    return float(max(map(json.loads, said.values())))
