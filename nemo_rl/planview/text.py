"""A plan, and the difference of two, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from nemo_rl.planview.groups import Group, between, groups_of
from nemo_rl.planview.model import PlanView, RankView, Reason
from nemo_rl.planview.units import seconds, size

_LINK_COLUMNS = 12
_RANK_ROWS = 32


def print_view(view: PlanView, console: Console) -> None:
    """Everything that `PlanView` holds, in tables that fit a terminal; larger meshes in groups."""
    console.print(Text(view.title, style="bold"))
    for line in summary(view):
        console.print(line, highlight=False, soft_wrap=True)
    for title, part in (*_layouts(view), *_tables(view)):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(part)


def summary(view: PlanView) -> Iterator[str]:
    """The plan in a few lines."""
    p = view.prediction
    yield f"plan {view.digest[:12]}: {len(view.trainers)} trainer ranks -> {len(view.generators)} generator ranks, " + (
        f"{view.num_tensors} tensors"
    )
    yield (
        f"bulk: {size(view.bulk_bytes)} in {view.num_copies} copies, {view.num_messages} messages and "
        f"{view.num_rounds} rounds; required {size(view.required_bytes)}"
    )
    yield (
        f"misc: {size(view.misc_bytes)} whole in {view.num_misc_buffers} buffers; "
        f"{100 * view.bulk_share:.2f}% of the bytes travel shard to shard"
    )
    yield f"bottleneck: {p.bottleneck} {size(p.bottleneck_bytes)}"
    yield (
        f"predicted time: {seconds(p.total_s)} (bulk {seconds(p.rounds_s)}, of which the bottleneck is busy for "
        f"{seconds(p.bulk_s)}; misc {seconds(p.misc_s)})"
    )
    yield (
        f"predicted memory: {size(p.staging_bytes)} of message buffers a rank, {size(p.misc_staging_bytes)} for whole "
        "tensors"
    )
    yield from (f"assumed: {text}" for text in p.assumed)
    yield from (f"note: {text}" for text in view.notes)


def _layouts(view: PlanView) -> Iterator[tuple[str, RenderableType]]:
    for side, lines in view.layouts.items():
        yield f"layout of the {side}", Lines(*(Text(line) for line in lines))


def _tables(view: PlanView) -> Iterator[tuple[str, RenderableType]]:
    yield "bytes by link: trainers down, generators across", _links(view)
    yield "bytes by rank", _ranks(view)
    for title, reasons in (("misc: travels whole, because", view.misc), ("unused, because", view.unused)):
        if reasons:
            yield title, _reason_table(reasons)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _links(view: PlanView) -> Table:
    """Bytes from trainers (rows) to generators (columns)."""
    rows, columns = groups_of(view.trainers, _RANK_ROWS), groups_of(view.generators, _LINK_COLUMNS)
    cells = between(view.matrix, rows, columns)
    table = _table("", *(c.label.split(" · ")[0] for c in columns), "sum")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(row.label, *(size(n) if n else "·" for n in line), size(line.sum()))
    table.add_row("sum", *(size(n) for n in cells.sum(axis=0)), size(cells.sum()))
    return table


def _ranks(view: PlanView) -> Table:
    table = _table("ranks", "node", "weights", "over the wire", "least", "most")
    for name, ranks in (("trainer", view.trainers), ("generator", view.generators)):
        for group in groups_of(ranks, _RANK_ROWS // 2):
            table.add_row(*_rank_row(name, group, ranks))
    return table


def _rank_row(name: str, group: Group, ranks: Sequence[RankView]) -> list[str]:
    members = [ranks[i] for i in group.members]
    wire = [m.wire_bytes for m in members]
    nodes = sorted({m.node for m in members})
    where = str(nodes[0]) if len(nodes) == 1 else f"{nodes[0]}–{nodes[-1]}"
    span = [size(min(wire)), size(max(wire))] if len(members) > 1 else ["", ""]
    return [f"{name} {group.label}", where, size(sum(m.held_bytes for m in members)), size(sum(wire)), *span]


def _reason_table(reasons: Sequence[Reason]) -> Table:
    table = _table("tensors", "bytes")
    table.add_column("reason", overflow="fold")
    table.add_column("first of them", overflow="fold")
    for r in reasons:
        table.add_row(str(r.count), size(r.num_bytes), r.reason, r.first)
    return table
