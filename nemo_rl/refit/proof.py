"""Proof of a plan against the layouts it was made of, without trusting how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.boxes import Boxes, colliding
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.plan import CopyTable, RefitPlan
from nemo_rl.refit.region import Region


class Refusal(ValueError):
    """Layouts that do not make a plan.

    Attributes:
        problems: every violation, each naming tensor, rank and region or numbers.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        super().__init__(f"{len(problems)} violation(s): {shown}")
        self.problems = tuple(problems)


def prove(plan: RefitPlan, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration]) -> None:
    """Check the plan against the layouts it was made of, without trusting how it was made.

    Every destination row outside misc is tiled exactly by copies; every copy lies inside its source row and its
    destination row; every misc tensor is tiled at the root and travels in one buffer; dtypes and shapes agree; messages
    carry every copy once, within a bucket and in rounds that are matchings; bytes sent equal bytes received.

    Raises:
        Refusal: with every violation.
    """
    problems = _prove_metas(plan, sources, declarations) + _prove_misc(plan, declarations)
    if problems:
        raise Refusal(problems)
    index = {n: i for i, n in enumerate(plan.table)}
    ndim = max((len(m.shape) for m in plan.table.values()), default=0)
    item = np.array([m.dtype.itemsize for m in plan.table.values()], np.int64)
    held = Boxes.of(sources, index, ndim)
    bulk = np.array([n not in plan.misc_reasons for n in plan.table])
    taken = Boxes.of({r: d.layout for r, d in declarations.items()}, index, ndim, bulk)
    root = Layout.from_regions([(f, Region.whole(plan.table[f].shape)) for f in plan.misc_fqns], plan.table)
    whole = Boxes.of({plan.misc_root: root}, index, ndim)
    problems = _prove_part(plan, plan.bulk, held, taken, item) + _prove_part(plan, plan.misc, held, whole, item)
    required = int((taken.sizes.prod(axis=1) * item[taken.tensor]).sum()) if len(taken) else 0
    if not plan.bulk_bytes == plan.required_bytes == required:
        problems.append(
            f"{plan.bulk_bytes} bulk bytes planned, {plan.required_bytes} said, destinations have {required}"
        )
    if problems:
        raise Refusal(problems)


def _prove_metas(plan: RefitPlan, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration]) -> list[str]:
    layouts = [*sources.items(), *((r, d.layout) for r, d in declarations.items())]
    return [
        f"{fqn}: {plan.world.describe(rank)} has {meta}, the plan {plan.table.get(fqn)}"
        for rank, layout in layouts
        for fqn, meta in layout.table.items()
        if plan.table.get(fqn) != meta
    ]


def _prove_misc(plan: RefitPlan, declarations: Mapping[int, Declaration]) -> list[str]:
    """Misc tensors: all that generators asked for, each in one buffer, apart from the others, whole units only."""
    fqns = set(plan.misc_fqns)
    asked = {f for d in declarations.values() for f in d.misc}
    problems = [f"{f}: a generator needs it whole, but it is not misc" for f in sorted(asked - fqns)]
    problems += [f"{f}: misc and its reasons do not name the same tensors" for f in fqns ^ set(plan.misc_reasons)]
    placed = [f for buffer in plan.misc_buffers for f in buffer.fqns]
    if placed != list(plan.misc_fqns):
        problems.append(
            f"buffers hold {len(placed)} tensors in an order that is not that of the {len(fqns)} misc tensors"
        )
        return problems
    for number, buffer in enumerate(plan.misc_buffers):
        end = 0
        for fqn, start in zip(buffer.fqns, buffer.offsets, strict=True):
            if start < end or start % plan.table[fqn].dtype.itemsize:
                problems.append(
                    f"{fqn}: at byte {start} of buffer {number}, where another tensor lies or no element starts"
                )
            end = start + plan.table[fqn].num_bytes
        if end != buffer.num_bytes:
            problems.append(f"buffer {number} has {buffer.num_bytes} bytes, its tensors end at {end}")
    for rank, declaration in declarations.items():
        layout = declaration.layout
        is_misc = np.isin(layout.tensor, [i for i, n in enumerate(layout.names) if n in fqns])
        mixed = set(layout.unit[is_misc].tolist()) & set(layout.unit[~is_misc].tolist()) - {-1}
        problems += [f"unit {u} of {plan.world.describe(rank)} is part bulk, part misc" for u in sorted(mixed)]
    return problems


def _prove_part(plan: RefitPlan, copies: CopyTable, held: Boxes, taken: Boxes, item: np.ndarray) -> list[str]:
    return (
        _prove_inside(plan, copies, held, "src")
        + _prove_inside(plan, copies, taken, "dst")
        + _prove_cover(plan, copies, taken)
        + _prove_messages(plan, copies, item)
    )


def _rows_of(boxes: Boxes, rank: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Position in `boxes` of each (rank, row), or -1."""
    if not len(boxes):
        return np.full(len(rank), -1)
    if len(row) and int(row.min()) < 0:
        return np.full(len(rank), -1)
    width = int(max(boxes.row.max(), row.max(initial=0))) + 1
    key, wanted = boxes.rank * width + boxes.row, rank * width + row
    order = np.argsort(key)
    at = np.minimum(np.searchsorted(key[order], wanted), len(key) - 1)
    return np.where(key[order][at] == wanted, order[at], -1)


def _prove_inside(plan: RefitPlan, copies: CopyTable, boxes: Boxes, side: str) -> list[str]:
    rank, row = getattr(copies, f"{side}_rank"), getattr(copies, f"{side}_row")
    at = _rows_of(boxes, rank, row)
    ok = at >= 0
    inner = boxes.take(np.maximum(at, 0)) if len(boxes) else boxes
    if len(boxes):
        ok &= inner.tensor == copies.tensor
        ok &= (copies.offsets >= inner.offsets).all(axis=1) & (copies.sizes > 0).all(axis=1)
        ok &= (copies.offsets + copies.sizes <= inner.offsets + inner.sizes).all(axis=1)
    return [
        f"{plan.names[copies.tensor[i]]} {plan.region(copies, i)}: not inside {side} row {row[i]} of "
        f"{plan.world.describe(int(rank[i]))}"
        for i in np.flatnonzero(~ok)
    ]


def _prove_cover(plan: RefitPlan, copies: CopyTable, taken: Boxes) -> list[str]:
    """Each destination row: volumes add up and no two pieces meet."""
    at = _rows_of(taken, copies.dst_rank, copies.dst_row)
    inside = np.flatnonzero(at >= 0)
    volume = np.zeros(len(taken), np.int64)
    np.add.at(volume, at[inside], copies.sizes[inside].prod(axis=1))
    want = taken.sizes.prod(axis=1)

    def where(i: int) -> str:
        fqn = plan.names[taken.tensor[i]]
        ndim = len(plan.table[fqn].shape)
        box = Region(tuple(map(int, taken.offsets[i, :ndim])), tuple(map(int, taken.sizes[i, :ndim])))
        return f"{fqn} {box} of {plan.world.describe(int(taken.rank[i]))}"

    problems = [
        f"{where(int(i))}: {volume[i]} of {want[i]} elements are written; no trainer holds the rest"
        if volume[i] < want[i]
        else f"{where(int(i))}: {volume[i]} elements are written into {want[i]}"
        for i in np.flatnonzero(volume != want)
    ]
    pieces = Boxes(at[inside], copies.offsets[inside], copies.sizes[inside], *(inside, inside, inside))
    return problems + [f"{where(int(i))}: written twice" for i in colliding(pieces)]


def _prove_messages(plan: RefitPlan, copies: CopyTable, item: np.ndarray) -> list[str]:
    problems = []
    m = copies.messages
    by_lo = m[np.argsort(m[:, 3])]
    bounds = np.concatenate([by_lo[:, 3], [len(copies)]])
    if len(m) and (bounds[0] != 0 or (by_lo[:, 4] != bounds[1:]).any()) or (not len(m) and len(copies)):
        problems.append("messages do not carry every copy exactly once")
        return problems
    for column, side in ((1, "sends"), (2, "receives")):
        pairs = m[:, [0, column]]
        _, first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)
        problems += [
            f"{plan.world.describe(int(m[i, column]))} {side} {n} messages in round {m[i, 0]}"
            for i, n in zip(first, count, strict=True)
            if n > 1
        ]
    nbytes = copies.sizes.prod(axis=1) * item[copies.tensor] if len(copies) else np.zeros(0, np.int64)
    total = np.concatenate([[0], np.cumsum(nbytes)])
    owner = np.repeat(np.arange(len(by_lo)), by_lo[:, 4] - by_lo[:, 3]) if len(m) else np.zeros(0, np.int64)
    if len(m) and (
        (total[by_lo[:, 4]] - total[by_lo[:, 3]] != by_lo[:, 5]).any()
        or (copies.src_rank != by_lo[owner, 1]).any()
        or (copies.dst_rank != by_lo[owner, 2]).any()
    ):
        problems.append("a message's bytes or ranks are not those of its copies")
    if len(m) and int(m[:, 5].max()) > plan.bucket_bytes:
        problems.append(f"a message of {int(m[:, 5].max())} bytes exceeds the bucket of {plan.bucket_bytes}")
    return problems
