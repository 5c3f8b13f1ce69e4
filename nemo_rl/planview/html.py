"""A plan as one HTML file without outside resources or scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from nemo_rl.planview.flow import MAX_NODES
from nemo_rl.planview.model import PlanView, Reason
from nemo_rl.planview.svg import bars, heat, ribbons
from nemo_rl.planview.text import summary
from nemo_rl.planview.units import seconds, size


def render(view: PlanView) -> str:
    """The whole document; the same view gives the same text."""
    grouped = max(len(view.trainers), len(view.generators)) > MAX_NODES
    unit = "a group of ranks" if grouped else "a rank"
    sections = (
        _section(
            "Who sends to whom",
            f"Trainers left, generators right. A band is as wide as its bytes; point at a band or {unit}.",
            ribbons(view),
        ),
        _section("Pair by pair", "Trainers down, generators across; darker is more.", heat(view)),
        _section("Bytes per rank", "Over links, in bulk; the dashed line is the mean of the side.", bars(view)),
        _section("Travels whole (misc)", "", _reasons(view.misc, "Nothing: every tensor goes shard to shard.")),
        _section("Unused", "", _reasons(view.unused, "Nothing: generators take every tensor.")),
        *(_section(f"Layout of the {side}", "", _lines(lines)) for side, lines in view.layouts.items()),
        _section("Summary and assumptions", "", _lines(summary(view))),
    )
    title = escape(view.title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><style>{_STYLE}</style></head>\n'
        f"<body><header><h1>{title}</h1>{_cards(view)}</header>\n{''.join(sections)}</body></html>\n"
    )


def _section(title: str, hint: str, content: str) -> str:
    note = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>\n"


def _cards(view: PlanView) -> str:
    p = view.prediction
    cards = (
        ("bulk", size(view.bulk_bytes), f"{100 * view.bulk_share:.2f}% shard to shard"),
        ("misc", size(view.misc_bytes), f"{sum(r.count for r in view.misc)} whole tensors"),
        ("bottleneck", size(p.bottleneck_bytes), p.bottleneck),
        ("predicted time", seconds(p.total_s), f"the bottleneck is busy for {seconds(p.bulk_s)}"),
        ("rounds", str(view.num_rounds), f"{view.num_messages} messages"),
        ("buffers a rank", size(p.staging_bytes), f"and {size(p.misc_staging_bytes)} for misc"),
    )
    return '<div class="cards">' + "".join(_card(*card) for card in cards) + "</div>"


def _card(name: str, value: str, note: str) -> str:
    return f'<div class="card"><b>{escape(name)}</b><span>{escape(value)}</span><i>{escape(note)}</i></div>'


def _lines(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _reasons(reasons: Sequence[Reason], nothing: str) -> str:
    if not reasons:
        return f'<p class="hint">{escape(nothing)}</p>'
    rows = "".join(
        f"<tr><td>{r.count}</td><td>{size(r.num_bytes)}</td><td>{escape(r.reason)}</td><td>{escape(r.first)}</td></tr>"
        for r in reasons
    )
    return f"<table><tr><th>tensors</th><th>bytes</th><th>reason</th><th>first of them</th></tr>{rows}</table>"


_STYLE = """
:root{--ink:#1d2430;--soft:#667085;--page:#f6f7f9;--card:#fff;--line:#e4e7ec;--node:#344054;--heat:#1f5fa8;--empty:#eef0f3}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--page:#12161c;--card:#1b212a;--line:#2b3340;
--node:#cbd5e1;--heat:#6cb0ff;--empty:#232b36}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1220px;padding:28px 24px 60px;background:var(--page);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:22px;margin:0 0 16px}h2{font-size:16px;margin:0 0 4px}
.hint{color:var(--soft);fill:var(--soft);font-size:13px;margin:0 0 10px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin-bottom:16px}
.card,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:12px 14px;display:flex;flex-direction:column}.card b{font-size:12px;font-weight:500;color:var(--soft)}
.card span{font-size:22px;font-weight:600}.card i{font-style:normal;font-size:12px;color:var(--soft)}
section{padding:18px 20px;margin-bottom:16px;overflow-x:auto}svg{width:100%;height:auto;display:block}
svg text{font-size:12px;fill:var(--ink)}svg text.hint{fill:var(--soft)}svg text.dark{fill:var(--card)}
.band{fill-opacity:.42;transition:fill-opacity .12s}.band:hover{fill-opacity:.9}
.cell:hover{stroke:var(--ink);stroke-width:1.2}.node:hover rect{stroke:var(--ink);stroke-width:1.5}
.mean{stroke:var(--ink);stroke-dasharray:5 4;stroke-width:1;opacity:.6}
figure{margin:14px 0 0}figcaption{font-size:13px;color:var(--soft);margin-top:6px}
.heat{width:min(100%,768px);image-rendering:pixelated;border:1px solid var(--line)}
table{border-collapse:collapse;width:100%;font-size:13px}th{text-align:left;color:var(--soft);font-weight:500}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
ul{margin:0;padding-left:18px;font-size:13px}li{margin:2px 0;overflow-wrap:anywhere}
"""
