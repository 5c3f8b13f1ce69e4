"""The join of trainer layouts and generator layouts into a plan. Pure NumPy: no I/O, no environment, no processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.boxes import Boxes
from nemo_rl.refit.join import join
from nemo_rl.refit.layout import Layout, TensorTable, natural_order
from nemo_rl.refit.plan import MiscBuffer, RefitPlan
from nemo_rl.refit.proof import Refusal, prove
from nemo_rl.refit.region import Region
from nemo_rl.refit.schedule import schedule, waves

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
        world: the ranks; `sources` has every trainer rank, `declarations` every generator rank.
        table: every tensor that the trainers export.
        bucket_bytes: limit of one message.
        all_misc: a reason to send every tensor whole (the conventional refit), or None.
        unused: trainer tensors that are not exported, with the reason; carried into the plan.

    Raises:
        Refusal: any violation of the promise (all of them at once): a destination byte that no source holds or that
            two copies write, a dtype or shape that differs, a problem that a declaration carries.
    """
    problems = _check_inputs(world, sources, declarations, table)
    if problems:
        raise Refusal(problems)
    misc = _misc_tensors(declarations, table, all_misc)
    if misc and world.shared:
        raise Refusal(_colocated(world, misc))
    index = {name: i for i, name in enumerate(table)}
    ndim = max((len(m.shape) for m in table.values()), default=0)
    item = np.array([m.dtype.itemsize for m in table.values()], np.int64)
    held = Boxes.of(sources, index, ndim)
    taken = Boxes.of(
        {r: d.layout for r, d in declarations.items()}, index, ndim, np.array([n not in misc for n in table])
    )
    misc_fqns = tuple(f for f in table if f in misc)
    root = Layout.from_regions([(f, Region.whole(table[f].shape)) for f in misc_fqns], table)
    whole = Boxes.of({world.trainers[0]: root}, index, ndim)
    buffers = _pack(misc_fqns, table, bucket_bytes)
    plan = RefitPlan(
        world=world,
        table=table,
        bulk=schedule(join(held, taken, item), item, waves(taken, item, bucket_bytes), bucket_bytes),
        misc=schedule(join(held, whole, item), item, _buffer_waves(buffers, index), bucket_bytes),
        misc_fqns=misc_fqns,
        misc_buffers=buffers,
        misc_reasons={f: misc[f] for f in misc_fqns},
        required_bytes=int((taken.sizes.prod(axis=1) * item[taken.tensor]).sum()) if len(taken) else 0,
        bucket_bytes=bucket_bytes,
        unused=_unused(declarations, misc, table, unused or {}),
        kept={name: reason for _, d in sorted(declarations.items()) for name, reason in d.kept.items()},
    )
    prove(plan, sources, declarations)
    return plan


def _check_inputs(
    world: World, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration], table: TensorTable
) -> list[str]:
    problems = []
    if set(sources) != set(world.trainers) or set(declarations) != set(world.generators):
        problems.append(f"layouts of ranks {sorted(sources)} and {sorted(declarations)} given for {world}")
    if list(table) != natural_order(table):
        problems.append("the tensor table is not in natural order")
    layouts = {**sources, **{r: d.layout for r, d in declarations.items()}}
    for rank, layout in sorted(layouts.items()):
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


def _colocated(world: World, misc: Mapping[str, str]) -> list[str]:
    """A rank cannot wait for the broadcast of a whole tensor while it still has to send its part of the next one."""
    both = ", ".join(map(world.describe, world.shared))
    remedy = (
        "put trainers and generators on ranks of their own, or export the tensor as the generator's loader keeps it"
    )
    return [f"{fqn}: must travel whole ({reason}), which {both} cannot serve; {remedy}" for fqn, reason in misc.items()]


def _misc_tensors(
    declarations: Mapping[int, Declaration], table: TensorTable, all_misc: str | None
) -> Mapping[str, str]:
    """fqn -> reason. A tensor that one generator cannot take as bulk travels whole to all of them."""
    if all_misc is not None:
        wanted = {f for d in declarations.values() for f in (*d.layout.names, *d.misc)}
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
    layouts = list({d.layout.digest: d.layout for d in declarations.values()}.values())
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
    used = {f for d in declarations.values() for f in d.layout.names} | set(misc)
    return {**given, **{f: "no generator's loader reads it" for f in table if f not in used}}


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


def _buffer_waves(buffers: Sequence[MiscBuffer], index: Mapping[str, int]) -> np.ndarray:
    """tensor -> wave of its gather: buffers fill one after the other."""
    wave = np.zeros(len(index), np.int64)
    for number, buffer in enumerate(buffers):
        wave[[index[fqn] for fqn in buffer.fqns]] = number
    return wave
