"""Runs a case: weights A, B and A again through the real session, and what every generator rank then holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.distributed as dist

from nemo_rl.refit.base import Declaration, RefitOptions, RefitReport, World
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.session import RefitSession
from nemo_rl.refit.transports.inproc import Hub, InprocChannel
from tests.golden.case import Case, load_whole
from tests.golden.ranks import RankLanding, RankSource, Tensors

ORDER = ("A", "B", "A")
OPTIONS = RefitOptions(bucket_bytes=4096, deadline_s=120)
"""A bucket is smaller than most tensors: who held one whole would be seen."""
_STACK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a case.

    Attributes:
        plan: that all ranks agreed on.
        reports: for each refit, by rank.
        held: for each refit, by generator rank counted from 0, what it generates from.
    """

    plan: RefitPlan
    reports: tuple[Mapping[int, RefitReport], ...]
    held: tuple[Mapping[int, Tensors], ...]


def world_of(case: Case) -> World:
    trainers, generators = len(case.trainer.rows), len(case.targets)
    if not case.row.colocated:
        return World.of(trainers, generators)
    return World(tuple(range(trainers)), tuple(range(generators)))


class SharedPlanner:
    """A plan for all ranks of one process: the first that asks makes it, the others must ask the same."""

    def __init__(self) -> None:
        self._lock, self._plans = threading.Lock(), dict[Any, RefitPlan]()

    def __call__(
        self,
        world: World,
        sources: Mapping[int, Layout],
        declarations: Mapping[int, Declaration],
        *args: Any,
        **kw: Any,
    ) -> RefitPlan:
        said = tuple((r, d.layout.digest, tuple(d.misc.items()), d.problems) for r, d in sorted(declarations.items()))
        key = (world, tuple((r, lay.digest) for r, lay in sorted(sources.items())), said, repr((args, kw)))
        with self._lock:
            if key not in self._plans:
                self._plans[key] = plan_refit(world, sources, declarations, *args, **kw)
            return self._plans[key]


def source_of(case: Case, rank: int) -> RankSource | None:
    world = world_of(case)
    if rank not in world.trainers:
        return None
    return RankSource(case.trainer.table, case.trainer.rows[rank], case.trainer.unused)


def landing_of(case: Case, rank: int) -> RankLanding | None:
    world = world_of(case)
    if rank not in world.generators:
        return None
    target = case.targets[world.generators.index(rank)]
    load = partial(load_whole, target.spec, target.role)
    return RankLanding(target.trace, target.wanted["A"], load, case.row.staged)


def simulate(case: Case, meddle: Callable[[RefitSession, RankLanding | None], None] = lambda *_: None) -> Outcome:
    """All ranks as threads of this process.

    Args:
        meddle: called once for each rank before it plans; a planted fault.

    Raises:
        RefitError: the first failure by rank.
    """
    world, store, hub, planner = world_of(case), dist.HashStore(), Hub(), SharedPlanner()
    ranks = range(world.size)
    sources, landings = [source_of(case, r) for r in ranks], [landing_of(case, r) for r in ranks]
    sessions = [
        RefitSession(r, world, store, OPTIONS, sources[r], landings[r], channel=InprocChannel(hub, r), planner=planner)
        for r in ranks
    ]
    for session, landing in zip(sessions, landings, strict=True):
        meddle(session, landing)
    together([session.connect for session in sessions])
    plan = together([session.plan for session in sessions])[0]
    reports, held = [], []
    for version, name in enumerate(ORDER, 1):
        for rank in ranks:
            prepare(sources[rank], landings[rank], case.weights[name], 100 * version + rank)
        done = together([partial(session.refit, version) for session in sessions])
        reports.append(dict(enumerate(done)))
        held.append({i: landings[r].snapshot() for i, r in enumerate(world.generators)})  # type: ignore[union-attr]
    for session in sessions:
        session.close()
    return Outcome(plan, tuple(reports), tuple(held))


def prepare(source: RankSource | None, landing: RankLanding | None, weights: Tensors, seed: int) -> None:
    """A step of the trainer, and random bytes in the generator."""
    if source is not None:
        source.step(weights)
    if landing is not None:
        landing.scramble(seed)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """Every call in a thread of its own. Raises the first error, RefitErrors of those that only heard of it last."""
    out: list[Any] = [None] * len(calls)
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            out[index] = calls[index]()
        except Exception as error:
            errors.append(error)

    before = threading.stack_size(_STACK_BYTES)
    try:
        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(before)
    for thread in threads:
        thread.join(2 * OPTIONS.deadline_s)
    if any(thread.is_alive() for thread in threads):
        raise RuntimeError(f"ranks {[i for i, t in enumerate(threads) if t.is_alive()]} hang")
    if errors:
        raise errors[0]
    return out
