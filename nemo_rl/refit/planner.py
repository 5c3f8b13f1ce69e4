"""The join of trainer layouts and generator layouts into a plan. Pure NumPy: no I/O, no environment, no processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout, TensorTable, natural_order
from nemo_rl.refit.plan import CopyTable, MiscBuffer, RefitPlan
from nemo_rl.refit.region import Region
from nemo_rl.refit.rounds import color_edges

_ALIGN = 16  # of tensors inside a misc buffer


class Refusal(ValueError):
    """Layouts that do not make a plan.

    Attributes:
        problems: every violation, each naming tensor, rank and region or numbers.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        super().__init__(f"{len(problems)} violation(s): {shown}")
        self.problems = tuple(problems)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Rows of several ranks' layouts in one index space: tensor ids are those of one global table."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(cls, layouts: Mapping[int, Layout], index: Mapping[str, int], ndim: int, skip: Iterable[str] = ()) -> Boxes:
        """Stack `layouts` by rank; rows of tensors in `skip` or with no bytes are left out."""
        skipped = set(skip)
        parts = [
            cls._of_rank(rank, layout, index, ndim, skipped) for rank, layout in sorted(layouts.items()) if len(layout)
        ]
        if not parts:
            empty = np.zeros(0, np.int64)
            return cls(empty, np.zeros((0, ndim), np.int64), np.zeros((0, ndim), np.int64), empty, empty, empty)
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in cls.__dataclass_fields__))

    @classmethod
    def _of_rank(cls, rank: int, layout: Layout, index: Mapping[str, int], ndim: int, skip: set[str]) -> Boxes:
        ids = np.array([-1 if n in skip else index.get(n, -1) for n in layout.names], np.int64)[layout.tensor]
        keep = np.flatnonzero((ids >= 0) & (layout.sizes.prod(axis=1) > 0))
        pad = ((0, 0), (0, ndim - layout.offsets.shape[1]))
        return cls(
            ids[keep],
            np.pad(layout.offsets[keep], pad),
            np.pad(layout.sizes[keep], pad, constant_values=1),
            np.full(len(keep), rank, np.int64),
            keep,
            layout.unit[keep].astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: np.ndarray) -> Boxes:
        return Boxes(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))


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
    index = {name: i for i, name in enumerate(table)}
    ndim = max((len(m.shape) for m in table.values()), default=0)
    item = np.array([m.dtype.itemsize for m in table.values()], np.int64)
    held = Boxes.of(sources, index, ndim)
    taken = Boxes.of({r: d.layout for r, d in declarations.items()}, index, ndim, skip=misc)
    misc_fqns = tuple(f for f in table if f in misc)
    root = Layout.from_regions([(f, Region.whole(table[f].shape)) for f in misc_fqns], table)
    whole = Boxes.of({0: root}, index, ndim)
    plan = RefitPlan(
        world=world,
        table=table,
        bulk=_schedule(_join(held, taken, item), item, _waves(taken, item, bucket_bytes), bucket_bytes),
        misc=_schedule(_join(held, whole, item), item, np.zeros(len(table), np.int64), bucket_bytes),
        misc_fqns=misc_fqns,
        misc_buffers=_pack(misc_fqns, table, bucket_bytes),
        misc_reasons={f: misc[f] for f in misc_fqns},
        required_bytes=int((taken.sizes.prod(axis=1) * item[taken.tensor]).sum()) if len(taken) else 0,
        bucket_bytes=bucket_bytes,
        unused=_unused(declarations, misc, table, unused or {}),
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
    layouts = list({d.layout.digest: d.layout for d in declarations.values()}.values())
    pairs = [set(zip(lay.unit.tolist(), lay.tensor.tolist(), strict=True)) for lay in layouts] if misc else []
    grown = bool(misc)
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


# ---- join


def _overlaps(a: Boxes, b: Boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows of the same tensor whose boxes meet: (row of a, row of b, offsets, sizes)."""
    order = np.argsort(a.tensor, kind="stable")
    sorted_ids = a.tensor[order]
    first = np.searchsorted(sorted_ids, b.tensor, "left")
    count = np.searchsorted(sorted_ids, b.tensor, "right") - first
    rows_b = np.repeat(np.arange(len(b)), count)
    step = np.arange(len(rows_b)) - np.repeat(np.cumsum(count) - count, count)
    rows_a = order[np.repeat(first, count) + step]
    low = np.maximum(a.offsets[rows_a], b.offsets[rows_b])
    high = np.minimum(a.offsets[rows_a] + a.sizes[rows_a], b.offsets[rows_b] + b.sizes[rows_b])
    meet = (high > low).all(axis=1)
    return rows_a[meet], rows_b[meet], low[meet], (high - low)[meet]


@dataclass(frozen=True, eq=False)
class _Cells:
    """Disjoint boxes of the sources and who owns each: owners of cell i are `owner_rows[start[i]:start[i + 1]]`."""

    boxes: Boxes
    start: np.ndarray
    owner_rows: np.ndarray


def _cells(held: Boxes) -> _Cells:
    """Cut the sources' boxes into disjoint cells. Equal boxes (replicas) become one cell with several owners."""
    key = np.column_stack([held.tensor, held.offsets, held.sizes])
    _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    unique = held.take(first)
    rows_a, rows_b, _, _ = _overlaps(unique, unique)
    crossing = np.unique(unique.tensor[rows_a[rows_a != rows_b]])
    if len(crossing):
        return _refined_cells(held, crossing)
    order = np.argsort(inverse, kind="stable")
    start = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
    return _Cells(unique, start, order)


def _refined_cells(held: Boxes, crossing: np.ndarray) -> _Cells:
    """As `_cells`, where boxes of the tensors in `crossing` overlap without being equal: cut along every border."""
    plain = np.flatnonzero(~np.isin(held.tensor, crossing))
    parts: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    for tensor in crossing:
        rows = np.flatnonzero(held.tensor == tensor)
        low, high = held.offsets[rows], held.offsets[rows] + held.sizes[rows]
        cuts = [np.unique(np.concatenate([low[:, d], high[:, d]])) for d in range(low.shape[1])]
        grid = np.stack(np.meshgrid(*[np.arange(max(len(c) - 1, 0)) for c in cuts], indexing="ij"), -1)
        for cell in grid.reshape(-1, low.shape[1]):
            start = np.array([cuts[d][i] for d, i in enumerate(cell)])
            end = np.array([cuts[d][i + 1] for d, i in enumerate(cell)])
            owners = rows[((low <= start) & (end <= high)).all(axis=1)]
            if len(owners):
                parts.append((int(tensor), start, end - start, owners))
    cut = Boxes(
        np.array([p[0] for p in parts], np.int64),
        np.stack([p[1] for p in parts]),
        np.stack([p[2] for p in parts]),
        *(np.array([getattr(held, f)[p[3][0]] for p in parts], np.int64) for f in ("rank", "row", "unit")),
    )
    if not len(plain):
        sizes = np.array([len(p[3]) for p in parts])
        return _Cells(cut, np.concatenate([[0], np.cumsum(sizes)]), np.concatenate([p[3] for p in parts]))
    rest = _cells(held.take(plain))
    counts = np.concatenate([np.diff(rest.start), [len(p[3]) for p in parts]])
    boxes = Boxes(*(np.concatenate([getattr(rest.boxes, f), getattr(cut, f)]) for f in Boxes.__dataclass_fields__))
    owners = np.concatenate([plain[rest.owner_rows], *(p[3] for p in parts)])
    return _Cells(boxes, np.concatenate([[0], np.cumsum(counts)]), owners)


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The join before it is cut into messages: one row a copy."""

    tensor: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    src_rank: np.ndarray
    src_row: np.ndarray
    dst_rank: np.ndarray
    dst_row: np.ndarray

    def take(self, rows: np.ndarray) -> _Pieces:
        return _Pieces(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))

    def num_bytes(self, item: np.ndarray) -> np.ndarray:
        return self.sizes.prod(axis=1) * item[self.tensor]


def _join(held: Boxes, taken: Boxes, item: np.ndarray) -> _Pieces:
    """Every destination box cut along the sources' cells, each piece with the owner that sends it."""
    used = np.isin(held.tensor, np.unique(taken.tensor))
    held = held.take(np.flatnonzero(used))
    cells = _cells(held)
    cell, dst, offsets, sizes = _overlaps(cells.boxes, taken)
    nbytes = sizes.prod(axis=1) * item[taken.tensor[dst]]
    owner = _choose_owners(cells, cell, held.rank, taken.rank[dst], nbytes)
    return _Pieces(
        taken.tensor[dst], offsets, sizes, held.rank[owner], held.row[owner], taken.rank[dst], taken.row[dst]
    )


def _choose_owners(
    cells: _Cells, cell: np.ndarray, rank_of: np.ndarray, dst_rank: np.ndarray, nbytes: np.ndarray
) -> np.ndarray:
    """The row that sends each piece: the destination's own where it has one, else replicas share by bytes.

    Pieces of one set of replicas, ordered by destination, are cut into one run of equal bytes for each replica, so
    that a replica serves as few destinations as it can.
    """
    sets: dict[bytes, int] = {}
    set_of_cell = np.empty(len(cells.boxes), np.int64)
    for i in range(len(cells.boxes)):
        owners = rank_of[cells.owner_rows[cells.start[i] : cells.start[i + 1]]]
        set_of_cell[i] = sets.setdefault(owners.tobytes(), len(sets))
    group = set_of_cell[cell]
    order = np.lexsort((cell, dst_rank, group))
    total = np.bincount(group, nbytes, minlength=len(sets)) if len(group) else np.zeros(len(sets))
    running = np.cumsum(nbytes[order])
    starts = np.concatenate([[0], np.cumsum(total)])[group[order]]
    middle = running - starts - nbytes[order] / 2
    count = (cells.start[1:] - cells.start[:-1])[cell[order]]
    pick = np.minimum((middle * count / np.maximum(total[group[order]], 1)).astype(np.int64), count - 1)
    chosen = np.empty(len(cell), np.int64)
    chosen[order] = cells.owner_rows[cells.start[cell[order]] + pick]
    for i in np.flatnonzero(np.isin(dst_rank, rank_of)):
        own = cells.owner_rows[cells.start[cell[i]] : cells.start[cell[i] + 1]]
        local = own[rank_of[own] == dst_rank[i]]
        chosen[i] = local[0] if len(local) else chosen[i]
    return chosen


# ---- schedule


def _waves(taken: Boxes, item: np.ndarray, bucket_bytes: int) -> np.ndarray:
    """tensor -> wave. Waves run one after the other; a landing unit lies in one wave, which bounds open staging.

    Tensors that share a unit on any rank share a wave. Consecutive waves merge up to a bucket per destination.
    Where no destination has units there is one wave.
    """
    if not len(taken) or (taken.unit < 0).all():
        return np.zeros(len(item), np.int64)
    parent = np.arange(len(item))

    def find(t: int) -> int:
        while parent[t] != t:
            parent[t] = parent[parent[t]]
            t = int(parent[t])
        return t

    rows = np.unique(np.column_stack([taken.rank, taken.unit, taken.tensor])[taken.unit >= 0], axis=0)
    same = (rows[1:, :2] == rows[:-1, :2]).all(axis=1)
    for a, b in zip(rows[:-1][same, 2], rows[1:][same, 2], strict=True):
        low, high = sorted((find(int(a)), find(int(b))))
        parent[high] = low
    root = np.array([find(t) for t in range(len(item))])
    ranks, rank_index = np.unique(taken.rank, return_inverse=True)
    load = np.zeros((len(item), len(ranks)))
    np.add.at(load, (root[taken.tensor], rank_index.reshape(-1)), taken.sizes.prod(axis=1) * item[taken.tensor])
    wave = np.zeros(len(item), np.int64)
    current, filled = 0, np.zeros(len(ranks))
    for t in range(len(item)):
        if root[t] != t:
            continue
        if filled.any() and (filled + load[t]).max() > bucket_bytes:
            current, filled = current + 1, np.zeros(len(ranks))
        wave[t], filled = current, filled + load[t]
    return wave[root]


def _split(pieces: _Pieces, item: np.ndarray, bucket_bytes: int) -> _Pieces:
    """Cut pieces larger than a bucket along their outermost axes."""
    large = pieces.num_bytes(item) > bucket_bytes
    if not large.any():
        return pieces
    source = [np.flatnonzero(~large)]
    offsets, sizes = [pieces.offsets[~large]], [pieces.sizes[~large]]
    for i in np.flatnonzero(large):
        parts = _split_box(pieces.offsets[i], pieces.sizes[i], max(1, bucket_bytes // int(item[pieces.tensor[i]])))
        source.append(np.full(len(parts), i))
        offsets.append(np.stack([p[0] for p in parts]))
        sizes.append(np.stack([p[1] for p in parts]))
    out = pieces.take(np.concatenate(source))
    return _Pieces(
        out.tensor, np.concatenate(offsets), np.concatenate(sizes), *(out.src_rank, out.src_row, out.dst_rank, out.dst_row)
    )


def _split_box(offsets: np.ndarray, sizes: np.ndarray, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes of at most `limit` elements that tile the given one, cut along the first axis that is long enough."""
    if sizes.prod() <= limit:
        return [(offsets, sizes)]
    axis = int(np.flatnonzero(sizes > 1)[0])
    inner = int(sizes.prod() // sizes[axis])
    step = max(1, limit // inner)
    parts = []
    for start in range(0, int(sizes[axis]), step):
        low, size = offsets.copy(), sizes.copy()
        low[axis] += start
        size[axis] = min(step, int(sizes[axis]) - start)
        parts += _split_box(low, size, limit)
    return parts


def _schedule(pieces: _Pieces, item: np.ndarray, wave_of: np.ndarray, bucket_bytes: int) -> CopyTable:
    """Pack pieces into messages and pair ranks in rounds, wave by wave."""
    pieces = _split(pieces, item, bucket_bytes)
    wave, size = wave_of[pieces.tensor], item[pieces.tensor]
    keys = (pieces.offsets.T[::-1] if pieces.offsets.shape[1] else np.zeros((1, len(wave)))).tolist()
    order = np.lexsort((*keys, pieces.dst_row, pieces.tensor, size, pieces.dst_rank, pieces.src_rank, wave))
    pieces, wave, size = pieces.take(order), wave[order], size[order]
    lo, hi = _message_bounds(pieces, wave, size, pieces.num_bytes(item), bucket_bytes)
    rounds = _rounds(pieces.src_rank[lo], pieces.dst_rank[lo], wave[lo])
    nbytes = np.add.reduceat(pieces.num_bytes(item), lo) if len(lo) else np.zeros(0, np.int64)
    columns = [rounds, pieces.src_rank[lo], pieces.dst_rank[lo], lo, hi, nbytes]
    messages = np.stack(columns, axis=1).astype(np.int64) if len(lo) else np.zeros((0, 6), np.int64)
    messages = messages[np.lexsort((messages[:, 3], messages[:, 0]))]
    return CopyTable(**{f: getattr(pieces, f) for f in _Pieces.__dataclass_fields__}, messages=messages)


def _message_bounds(
    pieces: _Pieces, wave: np.ndarray, size: np.ndarray, nbytes: np.ndarray, bucket_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Runs `[lo, hi)` of pieces with the same wave, pair and item size, each of at most a bucket."""
    if not len(wave):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    key = np.column_stack([wave, pieces.src_rank, pieces.dst_rank, size])
    breaks = np.concatenate([[True], (key[1:] != key[:-1]).any(axis=1)])
    lo, filled = [], 0
    for i, (new, n) in enumerate(zip(breaks.tolist(), nbytes.tolist(), strict=True)):
        if new or filled + n > bucket_bytes:
            lo.append(i)
            filled = 0
        filled += n
    starts = np.array(lo, np.int64)
    return starts, np.concatenate([starts[1:], [len(wave)]])


def _rounds(src: np.ndarray, dst: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Round of each message: waves in order, inside a wave as few rounds as the busiest rank needs."""
    rounds = np.zeros(len(src), np.int64)
    base = 0
    for w in np.unique(wave):
        rows = np.flatnonzero(wave == w)
        colors = color_edges(src[rows], dst[rows])
        rounds[rows] = base + colors
        base += int(colors.max()) + 1
    return rounds


# ---- proof


def prove(plan: RefitPlan, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration]) -> None:
    """Check the plan against the layouts it was made of, without trusting how it was made.

    Every destination row outside misc is tiled exactly by copies; every copy lies inside its source row and its
    destination row; every misc tensor is tiled at the root; messages carry every copy once, within a bucket and in
    rounds that are matchings; bytes sent equal bytes received.

    Raises:
        Refusal: with every violation.
    """
    index = {n: i for i, n in enumerate(plan.table)}
    ndim = max((len(m.shape) for m in plan.table.values()), default=0)
    item = np.array([m.dtype.itemsize for m in plan.table.values()], np.int64)
    held = Boxes.of(sources, index, ndim)
    taken = Boxes.of({r: d.layout for r, d in declarations.items()}, index, ndim, skip=plan.misc_reasons)
    root = Layout.from_regions([(f, Region.whole(plan.table[f].shape)) for f in plan.misc_fqns], plan.table)
    whole = Boxes.of({plan.misc_root: root}, index, ndim)
    problems = _prove_part(plan, plan.bulk, held, taken, item) + _prove_part(plan, plan.misc, held, whole, item)
    if plan.bulk_bytes != plan.required_bytes:
        problems.append(f"{plan.bulk_bytes} bulk bytes planned, destinations have {plan.required_bytes}")
    if problems:
        raise Refusal(problems)


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
    a, b, _, _ = _overlaps(pieces, pieces)
    twice = np.unique(pieces.tensor[a[a < b]])
    return problems + [f"{where(int(i))}: written twice" for i in twice]


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
