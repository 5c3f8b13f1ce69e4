"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_rl.planview.model import PlanView, RankView, Reason
from nemo_rl.planview.units import seconds, size

_ROWS = 16
_Row = tuple[str, float, float, Callable[[float], str]]


def print_difference(a: PlanView, b: PlanView, console: Console) -> None:
    """Totals of both, then every reason, layout line, rank and link that is not the same, the largest changes first."""
    console.print(Text(f"A: {a.title}\nB: {b.title}", style="bold"))
    if a.digest == b.digest:
        console.print("one plan, byte for byte", highlight=False)
    console.print(_totals_table(a, b))
    lines = [*_reason_changes("misc", a.misc, b.misc), *_reason_changes("unused", a.unused, b.unused)]
    lines += [*_layout_changes(a, b), *_rank_changes(a, b)]
    for line in lines or ["misc, unused, layouts and ranks are equal"]:
        console.print(line, highlight=False, soft_wrap=True)


def totals(a: PlanView, b: PlanView) -> list[_Row]:
    """(what, of a, of b, how to write it)."""

    def count(value: float) -> str:
        return f"{value:.0f}"

    def rows(view: PlanView) -> list[tuple[str, float, Callable[[float], str]]]:
        p = view.prediction
        return [
            ("trainer ranks", len(view.trainers), count),
            ("generator ranks", len(view.generators), count),
            ("tensors", view.num_tensors, count),
            ("bulk bytes", view.bulk_bytes, size),
            ("required bytes", view.required_bytes, size),
            ("misc bytes", view.misc_bytes, size),
            ("copies", view.num_copies, count),
            ("messages", view.num_messages, count),
            ("rounds", view.num_rounds, count),
            ("links used", int(np.count_nonzero(view.matrix)), count),
            ("bottleneck bytes", p.bottleneck_bytes, size),
            ("predicted time", p.total_s, seconds),
            ("message buffers a rank", p.staging_bytes, size),
            ("buffers for whole tensors", p.misc_staging_bytes, size),
        ]

    return [(name, x, y, text) for (name, x, text), (_, y, _) in zip(rows(a), rows(b), strict=True)]


def _totals_table(a: PlanView, b: PlanView) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "A", "B", "change"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, x, y, text in totals(a, b):
        table.add_row(name, text(x), text(y), _change(x, y), style=None if x == y else "bold")
    return table


def _change(x: float, y: float) -> str:
    if x == y:
        return "="
    return f"{100 * (y - x) / x:+.1f}%" if x else "new"


def _reason_changes(what: str, a: Sequence[Reason], b: Sequence[Reason]) -> Iterator[str]:
    old, new = ({r.reason: r for r in reasons} for reasons in (a, b))
    for reason in dict.fromkeys([*old, *new]):
        sides = [f"{r.count} tensors, {size(r.num_bytes)}" if r else "none" for r in (old.get(reason), new.get(reason))]
        if sides[0] != sides[1]:
            yield f"{what}: {sides[0]} -> {sides[1]}: {reason}"


def _layout_changes(a: PlanView, b: PlanView) -> Iterator[str]:
    for side in dict.fromkeys([*a.layouts, *b.layouts]):
        old, new = a.layouts.get(side, ()), b.layouts.get(side, ())
        yield from (f"{side} layout: - {line}" for line in old if line not in new)
        yield from (f"{side} layout: + {line}" for line in new if line not in old)


def _rank_changes(a: PlanView, b: PlanView) -> Iterator[str]:
    """Ranks that both plans have, by name."""
    for old, new in ((a.trainers, b.trainers), (a.generators, b.generators)):
        changed = [(x, y) for x, y in zip(old, new, strict=False) if x.wire_bytes != y.wire_bytes]
        changed.sort(key=lambda pair: -abs(pair[1].wire_bytes - pair[0].wire_bytes))
        yield from map(_rank_change, changed[:_ROWS])
        if len(changed) > _ROWS:
            yield f"and {len(changed) - _ROWS} more {old[0].name.split()[0]} ranks"


def _rank_change(pair: tuple[RankView, RankView]) -> str:
    old, new = pair
    change = _change(old.wire_bytes, new.wire_bytes)
    return f"{new.describe()}: {size(old.wire_bytes)} -> {size(new.wire_bytes)} over the wire ({change})"
