"""The join of trainer layouts and generator layouts into a plan. Pure NumPy: no I/O, no environment, no processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.join import Cells, Join, Pieces, Takers
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.plan import CopyTable, MiscBuffer, RefitPlan
from nemo_rl.refit.proof import Refusal, prove, prove_part
from nemo_rl.refit.region import Region
from nemo_rl.refit.rounds import Timetable
from nemo_rl.refit.schedule import most_messages, pack, schedule, timetable

_ALIGN = 16  # of tensors inside a misc buffer


def plan_refit(
    world: World,
    sources: Mapping[int, Layout],
    declarations: Mapping[int, Declaration],
    table: TensorTable,
    *,
    bucket_bytes: int = 16 << 20,
    all_misc: str | None = None,
    unused: Mapping[str, str] | None = None,
) -> RefitPlan:
    """Join what trainers hold with what generators take, and prove the result.

    Args:
        world: the ranks; `sources` has every trainer rank, `declarations` every generator rank. Layouts of replicas
            are joined once where they are one object.
        table: every tensor that the trainers export.
        bucket_bytes: limit of one message.
        all_misc: a reason to send every tensor whole (the conventional refit), or None.
        unused: trainer tensors that are not exported, with the reason; carried into the plan.

    Raises:
        Refusal: any violation of the promise (all of them at once): a destination byte that no source holds or that
            two copies write, a dtype or shape that differs, a problem that a declaration carries.
    """
    frame = _Frame.of(world, sources, declarations, table, bucket_bytes, all_misc)
    plan = frame.plan(frame.bulk.all(), frame.misc.all(), declarations, unused or {})
    prove(plan, sources, declarations)
    return plan


def plan_part(
    rank: int,
    world: World,
    sources: Mapping[int, Layout],
    declarations: Mapping[int, Declaration],
    table: TensorTable,
    *,
    bucket_bytes: int = 16 << 20,
    all_misc: str | None = None,
    unused: Mapping[str, str] | None = None,
) -> RefitPlan:
    """What `plan_refit(...).part(rank)` is, bit for bit, without the copies that do not concern `rank`; proven as such.

    Args, Raises: as `plan_refit`. A destination byte that no source holds is found by the destination's own rank.
    """
    frame = _Frame.of(world, sources, declarations, table, bucket_bytes, all_misc)
    whole = rank == world.trainers[0] or rank in world.generators
    misc = frame.misc.all() if whole else frame.misc.of_rank(rank)
    plan = frame.plan(frame.bulk.of_rank(rank), misc, declarations, unused or {})
    prove_part(plan, rank, sources, declarations)
    return plan


@dataclass(frozen=True, eq=False)
class _Task:
    """Everything that one table of copies is made of."""

    held: Boxes
    takers: Takers
    times: Timetable
    item: np.ndarray
    bucket_bytes: int

    def all(self) -> CopyTable:
        held = self.held.take(np.flatnonzero(np.isin(self.held.tensor, self.takers.boxes.tensor)))
        join = Join.of(Cells.of(held), self.takers, self.times.turns(), self.item, self.bucket_bytes)
        return schedule(join, self.times, self.item, self.bucket_bytes)

    def of_rank(self, rank: int) -> CopyTable:
        """The part of `all()` that `rank` sends or receives."""
        pieces = self._sent(rank)
        if rank in self.takers.ranks:
            own = int(np.searchsorted(self.takers.ranks, rank))
            pieces = pieces.take(np.flatnonzero(pieces.dst != own))
            pieces = Pieces.stack(pieces, self._received(own))
        return pack(pieces, self.times, self.item, self.bucket_bytes)

    def _sent(self, rank: int) -> Pieces:
        """A sender needs the tensors that it holds, of everyone: it owns all cells of its sets of owners."""
        mine = np.zeros(len(self.item), bool)
        mine[self.held.tensor[self.held.rank == rank]] = True
        cells = Cells.of(self.held.take(np.flatnonzero(mine[self.held.tensor])))
        every = np.arange(len(cells.boxes))
        cells = cells.take(np.flatnonzero(cells.owned_by(every, np.full(len(every), rank)) >= 0))
        takers = self._only(mine[self.takers.boxes.tensor])
        join = Join.of(cells, takers, self.times.turns(), self.item, self.bucket_bytes)
        return join.pieces(np.arange(len(self.takers.ranks)), rank)

    def _received(self, destination: int) -> Pieces:
        """A receiver needs its own boxes, and everyone's of tensors of which replicas share the sending."""
        cells = Cells.of(self.held)
        shared = np.zeros(len(self.item), bool)
        shared[cells.boxes.tensor[np.diff(cells.start) > 1]] = True
        boxes = self.takers.boxes
        takers = self._only((boxes.rank == self.takers.kind[destination]) | shared[boxes.tensor])
        join = Join.of(cells, takers, self.times.turns(), self.item, self.bucket_bytes)
        return join.pieces(np.array([destination]))

    def _only(self, chosen: np.ndarray) -> Takers:
        return self.takers.only(np.flatnonzero(chosen))


@dataclass(frozen=True, eq=False)
class _Frame:
    """What every rank must know of the whole plan, and the two tasks that it comes from."""

    world: World
    table: TensorTable
    misc_reasons: Mapping[str, str]
    misc_buffers: tuple[MiscBuffer, ...]
    bulk: _Task
    misc: _Task

    @classmethod
    def of(
        cls,
        world: World,
        sources: Mapping[int, Layout],
        declarations: Mapping[int, Declaration],
        table: TensorTable,
        bucket_bytes: int,
        all_misc: str | None,
    ) -> _Frame:
        """Raises Refusal where the inputs contradict each other."""
        problems = _check_inputs(world, sources, declarations, table)
        if problems:
            raise Refusal(problems)
        asked = _misc_tensors(declarations, table, all_misc)
        misc = {fqn: asked[fqn] for fqn in table if fqn in asked}
        index = {name: i for i, name in enumerate(table)}
        ndim = max((len(m.shape) for m in table.values()), default=0)
        item = np.array([m.dtype.itemsize for m in table.values()], np.int64)
        held, trainers = Boxes.of(sources, index, ndim), np.array(sorted(world.trainers), np.int64)
        layouts = {r: d.layout for r, d in declarations.items()}
        takers = Takers.of(layouts, world.shared, index, ndim, np.array([fqn not in misc for fqn in table]))
        times = timetable(held, trainers, takers, item, bucket_bytes)
        buffers = _pack(list(misc), table, bucket_bytes)
        root = Layout.from_regions([(fqn, Region.whole(table[fqn].shape)) for fqn in misc], table)
        whole = Takers.of({world.trainers[0]: root}, (world.trainers[0],), index, ndim, np.ones(len(table), bool))
        gather = _gather_times(trainers, whole, buffers, index, item, bucket_bytes)
        tasks = (_Task(held, takers, times, item, bucket_bytes), _Task(held, whole, gather, item, bucket_bytes))
        return cls(world, table, misc, buffers, *tasks)

    def plan(
        self,
        bulk: CopyTable,
        misc: CopyTable,
        declarations: Mapping[int, Declaration],
        unused: Mapping[str, str],
    ) -> RefitPlan:
        return RefitPlan(
            world=self.world,
            table=self.table,
            bulk=bulk,
            misc=misc,
            misc_fqns=tuple(self.misc_reasons),
            misc_buffers=self.misc_buffers,
            misc_reasons=self.misc_reasons,
            required_bytes=int(self.bulk.takers.num_bytes(self.bulk.item).sum()),
            bucket_bytes=self.bulk.bucket_bytes,
            unused=_unused(declarations, self.misc_reasons, self.table, unused),
            kept={name: reason for _, d in sorted(declarations.items()) for name, reason in d.kept.items()},
        )


def _check_inputs(
    world: World, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration], table: TensorTable
) -> list[str]:
    problems = []
    if set(sources) != set(world.trainers) or set(declarations) != set(world.generators):
        problems.append(f"layouts of ranks {sorted(sources)} and {sorted(declarations)} given for {world}")
    if list(table) != natural_order(table):
        problems.append("the tensor table is not in natural order")
    expected: dict[int, tuple[TensorMeta | None, ...]] = {}
    layouts = {**sources, **{r: d.layout for r, d in declarations.items()}}
    for rank, layout in sorted(layouts.items()):
        if id(layout.names) not in expected:
            expected[id(layout.names)] = tuple(map(table.get, layout.names))
        if layout.metas == expected[id(layout.names)]:
            continue
        for fqn, meta in layout.table.items():
            if fqn not in table:
                problems.append(f"{fqn}: {world.describe(rank)} names it, the trainers' table does not")
            elif meta != table[fqn]:
                problems.append(f"{fqn}: {world.describe(rank)} says {meta}, the trainers' table says {table[fqn]}")
    for rank, declaration in sorted(declarations.items()):
        problems += [f"{world.describe(rank)}: {p}" for p in declaration.problems]
        problems += [
            f"{f}: {world.describe(rank)} needs it whole, the trainers' table lacks it"
            for f in declaration.misc
            if f not in table
        ]
    return problems


def _misc_tensors(
    declarations: Mapping[int, Declaration], table: TensorTable, all_misc: str | None
) -> Mapping[str, str]:
    """fqn -> reason. A tensor that one generator cannot take as bulk travels whole to all of them."""
    if all_misc is not None:
        wanted = _names(declarations.values())
        return {f: all_misc for f in table if f in wanted}
    misc: dict[str, str] = {}
    for _, declaration in sorted(declarations.items()):
        for fqn, reason in declaration.misc.items():
            misc.setdefault(fqn, reason)
    return _close_over_units(misc, declarations)


def _close_over_units(misc: dict[str, str], declarations: Mapping[int, Declaration]) -> Mapping[str, str]:
    """A landing unit is all bulk or all misc: its module processes its bytes once, when all are there."""
    if not misc:
        return misc
    layouts = list({id(d.layout): d.layout for d in declarations.values()}.values())
    pairs = [set(zip(lay.unit.tolist(), lay.tensor.tolist(), strict=True)) for lay in layouts]
    grown = True
    while grown:
        grown = False
        for layout, members in zip(layouts, pairs, strict=True):
            broken = {u for u, t in members if u >= 0 and layout.names[t] in misc}
            for unit, tensor in sorted(members):
                if unit in broken and layout.names[tensor] not in misc:
                    misc[layout.names[tensor]] = "shares a module with a tensor that travels whole"
                    grown = True
    return misc


def _unused(
    declarations: Mapping[int, Declaration],
    misc: Mapping[str, str],
    table: TensorTable,
    given: Mapping[str, str],
) -> dict[str, str]:
    used = _names(declarations.values()) | set(misc)
    return {**given, **{f: "no generator's loader reads it" for f in table if f not in used}}


def _names(declarations: Iterable[Declaration]) -> set[str]:
    """What any generator takes, as bulk or whole."""
    distinct = {id(d.layout.names): d.layout.names for d in declarations}
    return set().union(*distinct.values(), *(d.misc for d in declarations))


def _pack(fqns: Sequence[str], table: TensorTable, bucket_bytes: int) -> tuple[MiscBuffer, ...]:
    """Consecutive whole tensors in buffers of at most a bucket; a larger tensor has a buffer of its own."""
    buffers: list[MiscBuffer] = []
    names: list[str] = []
    offsets: list[int] = []
    end = 0
    for fqn in fqns:
        size = table[fqn].num_bytes
        start = -(-end // _ALIGN) * _ALIGN
        if names and start + size > bucket_bytes:
            buffers.append(MiscBuffer(tuple(names), tuple(offsets), end))
            names, offsets, start = [], [], 0
        names.append(fqn)
        offsets.append(start)
        end = start + size
    if names:
        buffers.append(MiscBuffer(tuple(names), tuple(offsets), end))
    return tuple(buffers)


def _gather_times(
    trainers: np.ndarray,
    root: Takers,
    buffers: Sequence[MiscBuffer],
    index: Mapping[str, int],
    item: np.ndarray,
    bucket_bytes: int,
) -> Timetable:
    """Rounds of the gather of whole tensors: buffers fill one after the other."""
    wave = np.zeros(len(index), np.int64)
    for number, buffer in enumerate(buffers):
        wave[[index[fqn] for fqn in buffer.fqns]] = number
    largest = max((buffer.num_bytes for buffer in buffers), default=0)
    num_messages = most_messages(largest, item, bucket_bytes)
    return Timetable.of(trainers, root.ranks, np.zeros_like(trainers), np.zeros_like(wave), wave, num_messages)
