"""Proof of a plan against the layouts it was made of, without trusting how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rl.refit.base import Declaration
from nemo_rl.refit.boxes import Boxes, colliding
from nemo_rl.refit.layout import Layout, TensorMeta
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
    _prove(plan, sources, declarations, plan.world.generators, (plan.misc_root,))


def prove_part(
    plan: RefitPlan, rank: int, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration]
) -> None:
    """As `prove` for the part of a plan that concerns `rank`: its own destination rows, its own messages.

    Raises:
        Refusal: with every violation, a copy that does not concern `rank` among them.
    """
    whole = rank == plan.misc_root or rank in plan.world.generators
    tables = ((plan.bulk, False), (plan.misc, whole))
    foreign = [int(((c.src_rank != rank) & (c.dst_rank != rank)).sum()) for c, all_of_it in tables if not all_of_it]
    if any(foreign):
        raise Refusal([f"{sum(foreign)} copies do not concern {plan.world.describe(rank)}"])
    takes = (rank,) if rank in plan.world.generators else ()
    _prove(plan, sources, declarations, takes, (plan.misc_root,) if whole else ())


def _prove(
    plan: RefitPlan,
    sources: Mapping[int, Layout],
    declarations: Mapping[int, Declaration],
    bulk_ranks: Sequence[int],
    misc_ranks: Sequence[int],
) -> None:
    """`bulk_ranks` and `misc_ranks`: those whose destination rows must be covered by the plan's copies."""
    problems = _prove_metas(plan, sources, declarations) + _prove_misc(plan, declarations)
    if problems:
        raise Refusal(problems)
    item = plan.item_bytes
    root = Layout.from_regions([(f, Region.whole(plan.table[f].shape)) for f in plan.misc_fqns], plan.table)
    held = _Side(plan, "src", sources, frozenset())
    taken = _Side(plan, "dst", {r: d.layout for r, d in declarations.items()}, frozenset(plan.misc_fqns))
    whole = _Side(plan, "dst", {plan.misc_root: root}, frozenset())
    problems = _prove_part(plan, plan.bulk, held, taken, item, bulk_ranks)
    problems += _prove_part(plan, plan.misc, held, whole, item, misc_ranks)
    distinct = {id(d.layout): r for r, d in declarations.items()}
    by_layout = {layout: taken.num_bytes(rank, item) for layout, rank in distinct.items()}
    required = {r: by_layout[id(d.layout)] for r, d in declarations.items()}
    arriving = plan.bulk_bytes if len(bulk_ranks) > 1 else int(sum(_received(plan.bulk, r) for r in bulk_ranks))
    if arriving != sum(required[r] for r in bulk_ranks) or plan.required_bytes != sum(required.values()):
        problems.append(
            f"{arriving} bulk bytes planned for {len(bulk_ranks)} ranks, which take "
            f"{sum(required[r] for r in bulk_ranks)}; {plan.required_bytes} said, all destinations have "
            f"{sum(required.values())}"
        )
    if problems:
        raise Refusal(problems)


def _received(copies: CopyTable, rank: int) -> int:
    return int(copies.messages[copies.messages[:, 2] == rank, 5].sum())


def _prove_metas(plan: RefitPlan, sources: Mapping[int, Layout], declarations: Mapping[int, Declaration]) -> list[str]:
    layouts = [*sources.items(), *((r, d.layout) for r, d in declarations.items())]
    problems: list[str] = []
    expected: dict[int, tuple[TensorMeta | None, ...]] = {}
    for rank, layout in layouts:
        if id(layout.names) not in expected:
            expected[id(layout.names)] = tuple(map(plan.table.get, layout.names))
        if layout.metas != expected[id(layout.names)]:
            problems += [
                f"{fqn}: {plan.world.describe(rank)} has {meta}, the plan {plan.table.get(fqn)}"
                for fqn, meta in layout.table.items()
                if plan.table.get(fqn) != meta
            ]
    return problems


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
    for rank, layout in {id(d.layout): (r, d.layout) for r, d in declarations.items()}.values() if fqns else ():
        is_misc = np.isin(layout.tensor, [i for i, n in enumerate(layout.names) if n in fqns])
        mixed = set(layout.unit[is_misc].tolist()) & set(layout.unit[~is_misc].tolist()) - {-1}
        problems += [f"unit {u} of {plan.world.describe(rank)} is part bulk, part misc" for u in sorted(mixed)]
    return problems


class _Side:
    """Rows of one end of copies, in the plan's numbers of tensors; rows of `left_out` are no rows.

    Args:
        name: `src` or `dst`.
    """

    def __init__(self, plan: RefitPlan, name: str, layouts: Mapping[int, Layout], left_out: frozenset[str]) -> None:
        self.name, self.layouts = name, layouts
        self._plan, self._left_out = plan, left_out
        self._number = {n: i for i, n in enumerate(plan.table)}
        self._ids: dict[int, np.ndarray] = {}

    def rows(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tensor (-1 where left out), offsets and sizes of every row of a rank, as many axes as the layout has."""
        layout = self.layouts[rank]
        if id(layout.names) not in self._ids:
            numbers = [-1 if n in self._left_out else self._number[n] for n in layout.names]
            self._ids[id(layout.names)] = np.array(numbers, np.int64)
        return self._ids[id(layout.names)][layout.tensor], layout.offsets, layout.sizes

    def num_bytes(self, rank: int, item: np.ndarray) -> int:
        tensor, _, sizes = self.rows(rank)
        return int((sizes.prod(axis=1) * item[tensor])[tensor >= 0].sum())

    def where(self, rank: int, row: int) -> str:
        layout = self.layouts[rank]
        return f"{layout.fqn(row)} {layout.region(row)} of {self._plan.world.describe(rank)}"


@dataclass(frozen=True, eq=False)
class _ByRank:
    """Copies of each rank of one side."""

    order: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, rank: np.ndarray, size: int) -> _ByRank:
        narrow = rank.astype(np.uint16) if size < 1 << 16 else rank  # sorts in linear time
        return cls(np.argsort(narrow, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(rank, None, size))]))

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for rank in np.flatnonzero(np.diff(self.start)).tolist():
            yield rank, self.of_rank(rank)

    def of_rank(self, rank: int) -> np.ndarray:
        return self.order[self.start[rank] : self.start[rank + 1]]


def _prove_part(
    plan: RefitPlan, copies: CopyTable, held: _Side, taken: _Side, item: np.ndarray, ranks: Iterable[int]
) -> list[str]:
    size = plan.world.size
    for rank in (copies.src_rank, copies.dst_rank):
        if len(rank) and not 0 <= int(rank.min()) <= int(rank.max()) < size:
            return [f"copies name rank {int(rank.min())} or {int(rank.max())}, the world has {size}"]
    by_dst = _ByRank.of(copies.dst_rank, size)
    return (
        _prove_inside(plan, copies, held, _ByRank.of(copies.src_rank, size))
        + _prove_inside(plan, copies, taken, by_dst)
        + [problem for rank in ranks for problem in _prove_cover(copies, taken, rank, by_dst.of_rank(rank))]
        + _prove_messages(plan, copies, item)
    )


def _prove_inside(plan: RefitPlan, copies: CopyTable, side: _Side, by_rank: _ByRank) -> list[str]:
    """Every copy names a row of its rank, of its tensor, and lies inside."""
    row = copies.src_row if side.name == "src" else copies.dst_row
    wrong: list[str] = []
    for rank, mine in by_rank:
        ok = np.zeros(len(mine), bool)
        if rank in side.layouts and len(side.layouts[rank]):
            ok = _inside(copies, mine, row[mine], *side.rows(rank))
        wrong += [
            f"{plan.names[copies.tensor[i]]} {plan.region(copies, i)}: not inside {side.name} row {row[i]} of "
            f"{plan.world.describe(rank)}"
            for i in mine[~ok].tolist()
        ]
    return wrong


def _inside(
    copies: CopyTable, mine: np.ndarray, row: np.ndarray, tensor: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Whether each of the copies `mine` lies in its row of `tensor, offsets, sizes`."""
    at = np.clip(row, 0, len(tensor) - 1)
    ok: np.ndarray = (at == row) & (tensor[at] == copies.tensor[mine])
    for axis in range(copies.offsets.shape[1]):
        low, size = copies.offsets[mine, axis], copies.sizes[mine, axis]
        known = axis < offsets.shape[1]
        start, length = (offsets[at, axis], sizes[at, axis]) if known else (0, 1)
        ok &= (low >= start) & (size > 0) & (low + size <= start + length)
    return ok


def _prove_cover(copies: CopyTable, taken: _Side, rank: int, mine: np.ndarray) -> list[str]:
    """Each destination row of a rank: volumes add up and no two pieces meet."""
    tensor, _, sizes = taken.rows(rank)
    row = copies.dst_row[mine].astype(np.int64)
    mine, row = mine[(row >= 0) & (row < len(tensor))], row[(row >= 0) & (row < len(tensor))]
    want = np.where(tensor >= 0, sizes.prod(axis=1), 0)
    volume = np.zeros(len(want), np.int64)
    np.add.at(volume, row, copies.sizes[mine].prod(axis=1))
    problems = [
        f"{taken.where(rank, i)}: {volume[i]} of {want[i]} elements are written; no trainer holds the rest"
        if volume[i] < want[i]
        else f"{taken.where(rank, i)}: {volume[i]} elements are written into {want[i]}"
        for i in np.flatnonzero(volume != want).tolist()
    ]
    several = np.flatnonzero(np.bincount(row, minlength=len(want))[row] > 1)
    mine, row = mine[several], row[several]
    pieces = Boxes(row, copies.offsets[mine], copies.sizes[mine], row, row, row)
    return problems + [f"{taken.where(rank, i)}: written twice" for i in colliding(pieces).tolist()]


def _prove_messages(plan: RefitPlan, copies: CopyTable, item: np.ndarray) -> list[str]:
    m, problems = copies.messages, []
    by_lo = m[np.argsort(m[:, 3], kind="stable")]
    bounds = np.concatenate([by_lo[:, 3], [len(copies)]])
    if len(m) and (bounds[0] != 0 or (by_lo[:, 4] != bounds[1:]).any()) or (not len(m) and len(copies)):
        return ["messages do not carry every copy exactly once"]
    if (m[1:, 0] < m[:-1, 0]).any():
        problems.append("messages are not in the order of their rounds")
    for column, verb in ((1, "sends"), (2, "receives")):
        key = m[:, 0] * plan.world.size + m[:, column]
        _, first, count = np.unique(key, return_index=True, return_counts=True)
        problems += [
            f"{plan.world.describe(int(m[i, column]))} {verb} {n} messages in round {m[i, 0]}"
            for i, n in zip(first[count > 1], count[count > 1], strict=True)
        ]
    num = by_lo[:, 4] - by_lo[:, 3]
    total = np.concatenate([[0], np.cumsum(copies.sizes.prod(axis=1) * item[copies.tensor])])
    if (
        (total[by_lo[:, 4]] - total[by_lo[:, 3]] != by_lo[:, 5]).any()
        or (copies.src_rank != np.repeat(by_lo[:, 1], num)).any()
        or (copies.dst_rank != np.repeat(by_lo[:, 2], num)).any()
    ):
        problems.append("a message's bytes or ranks are not those of its copies")
    if len(m) and int(m[:, 5].max()) > plan.bucket_bytes:
        problems.append(f"a message of {int(m[:, 5].max())} bytes exceeds the bucket of {plan.bucket_bytes}")
    return problems
