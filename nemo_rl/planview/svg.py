"""The drawings of a plan as SVG text: ribbons between ranks, a heat map of pairs, bars of bytes per rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from nemo_rl.planview.flow import Band, Flow, Node, color, flow_of
from nemo_rl.planview.groups import Group, between, groups_of
from nemo_rl.planview.model import PlanView, RankView
from nemo_rl.planview.png import data_uri
from nemo_rl.planview.units import size

HEAT_CELLS = 48
"""Ranks a side up to which the heat map has one element, with a tooltip, for each pair."""

WIDTH = 1120
_NODE = 14


def _svg(height: float, content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{mark}>{escape(text)}</text>'


# ---- ribbons


def ribbons(view: PlanView) -> str:
    """A node for each rank or group of ranks, as high as its bytes, and a band for each pair that exchanges bytes."""
    flow = flow_of(view)
    if not flow.bands:
        return '<p class="hint">No byte travels from shard to shard.</p>'
    left, right = _room(flow.trainers), WIDTH - _room(flow.generators)
    parts = [_band(flow, band, left, right) for band in flow.bands]
    parts += _node_marks(flow.trainers, view.trainers, left - _NODE, left - _NODE - 8, "end", "trainer")
    parts += _node_marks(flow.generators, view.generators, right, right + _NODE + 8, "start", "generator")
    return _svg(flow.height, "".join(parts), "bytes from trainers to generators")


def _room(nodes: Sequence[Node]) -> float:
    """For the labels of a side, beside its nodes."""
    return 110.0 + 6.6 * max(len(node.group.label) for node in nodes)


def _band(flow: Flow, band: Band, x0: float, x1: float) -> str:
    middle = (x0 + x1) / 2
    a, b, width = band.left, band.right, band.width
    path = (
        f"M{x0:.1f} {a:.2f}C{middle:.1f} {a:.2f} {middle:.1f} {b:.2f} {x1:.1f} {b:.2f}"
        f"V{b + width:.2f}C{middle:.1f} {b + width:.2f} {middle:.1f} {a + width:.2f} {x0:.1f} {a + width:.2f}Z"
    )
    source, target = flow.trainers[band.row].group.label, flow.generators[band.column].group.label
    tip = _tip(f"trainer {source} → generator {target}: {size(band.num_bytes)}")
    return f'<path class="band" d="{path}" fill="{color(band.row)}">{tip}</path>'


def _node_marks(
    nodes: Sequence[Node], ranks: Sequence[RankView], x: float, label_x: float, anchor: str, side: str
) -> Iterator[str]:
    for index, node in enumerate(nodes):
        members = [ranks[i] for i in node.group.members]
        wire = [m.wire_bytes for m in members]
        fill, verb = (color(index), "sends") if side == "trainer" else ("var(--node)", "receives")
        tip = f"{side} {node.group.label}: {verb} {size(sum(wire))} over links"
        if len(members) > 1:
            tip += f"; {len(members)} ranks, {size(min(wire))} to {size(max(wire))} each"
        tip += f"; holds {size(sum(m.held_bytes for m in members))} of weights"
        label = f"{node.group.label}  {size(sum(wire))}"
        yield (
            f'<g class="node"><rect x="{x:.1f}" y="{node.top:.2f}" width="{_NODE}" height="{node.height:.2f}" rx="2" '
            f'fill="{fill}"/>{_text(label_x, node.top + node.height / 2 + 4, label, anchor)}{_tip(tip)}</g>'
        )


# ---- heat map


def heat(view: PlanView) -> str:
    """Bytes of each pair of ranks; on large meshes of groups, and a picture of all pairs."""
    if max(view.matrix.shape) <= HEAT_CELLS:
        return _cells(view.matrix, _single(view.trainers), _single(view.generators))
    rows, columns = groups_of(view.trainers, HEAT_CELLS), groups_of(view.generators, HEAT_CELLS)
    picture = (
        f'<figure><img class="heat" alt="bytes of every pair of ranks" src="{data_uri(_pixels(view.matrix))}"/>'
        f"<figcaption>every pair: {len(view.trainers)} trainers down, {len(view.generators)} generators across; "
        f"darkest {size(int(view.matrix.max()))}</figcaption></figure>"
    )
    return _cells(between(view.matrix, rows, columns), rows, columns) + picture


def _single(ranks: Sequence[RankView]) -> list[Group]:
    return groups_of(ranks, len(ranks))


def _cells(cells: np.ndarray, rows: Sequence[Group], columns: Sequence[Group]) -> str:
    side = min(72.0, 800.0 / max(cells.shape))
    left, top, most = 150.0, 24.0 + 6.0 * max(len(c.label) for c in columns), max(int(cells.max()), 1)
    parts = []
    for i, row in enumerate(rows):
        y = top + side * i
        parts.append(_text(left - 8, y + side / 2 + 4, row.label, "end"))
        for j, column in enumerate(columns):
            tip = _tip(f"trainer {row.label} → generator {column.label}: {size(int(cells[i, j]))}")
            parts.append(_cell(left + side * j, y, side - 1, int(cells[i, j]), most, tip))
    for j, column in enumerate(columns):
        at = f"translate({left + side * (j + 0.5) + 4:.1f} {top - 8:.1f}) rotate(-60)"
        parts.append(f'<g transform="{at}">{_text(0, 0, column.label)}</g>')
    bottom = top + side * len(rows)
    parts.append(_text(left, bottom + 20, f"darkest: {size(most)}", kind="hint"))
    return _svg(bottom + 30, "".join(parts), "bytes by pair")


def _cell(x: float, y: float, side: float, num_bytes: int, most: int, tip: str) -> str:
    """A square as dark as its bytes; with its number where there is room."""
    share = num_bytes / most
    fill = f'fill="var(--heat)" fill-opacity="{0.12 + 0.88 * share:.3f}"' if share else 'fill="var(--empty)"'
    box = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
    text = _text(x + side / 2, y + side / 2 + 4, size(num_bytes), "middle", "dark" if share > 0.5 else "")
    return f'<g class="cell"><rect {box} {fill}/>{text if side >= 56 and num_bytes else ""}{tip}</g>'


def _pixels(matrix: np.ndarray) -> np.ndarray:
    """Opacity by bytes, on a root scale that keeps small ones visible."""
    out = np.zeros((*matrix.shape, 4), np.uint8)
    out[..., :3] = (76, 120, 168)
    out[..., 3] = (255 * np.sqrt(matrix / max(int(matrix.max()), 1))).astype(np.uint8)
    return out


# ---- bars


def bars(view: PlanView) -> str:
    """Bytes over links of every rank: trainers up, generators down, on one scale."""
    most = max([r.wire_bytes for r in (*view.trainers, *view.generators)]) or 1
    half = 120.0
    parts = [
        _text(82, half - 4, "trainers send", "end"),
        _text(82, half + 34, "generators", "end"),
        _text(82, half + 48, "receive", "end"),
    ]
    parts += _side_bars(view.trainers, half, -half / most, "trainer")
    parts += _side_bars(view.generators, half + 20, half / most, "generator")
    return _svg(2 * half + 24, "".join(parts), "bytes by rank")


def _side_bars(ranks: Sequence[RankView], base: float, scale: float, side: str) -> Iterator[str]:
    """`scale` is in points a byte, negative for bars that grow upwards."""
    left, right = 90.0, WIDTH - 20.0
    step = min((right - left) / len(ranks), 60.0)
    width = 0.8 * step
    for i, rank in enumerate(ranks):
        high = abs(scale) * rank.wire_bytes
        y = base - high if scale < 0 else base
        fill = "#4c78a8" if side == "trainer" else "#f58518"
        tip = _tip(f"{rank.describe()}, node {rank.node}: {size(rank.wire_bytes)}")
        box = f'x="{left + step * i:.2f}" y="{y:.2f}" width="{width:.2f}" height="{high:.2f}"'
        yield f'<rect class="cell" {box} fill="{fill}">{tip}</rect>'
    mean = sum(r.wire_bytes for r in ranks) / len(ranks)
    y, tip = base + scale * mean, _tip(f"mean of {side}s: {size(mean)}")
    end = left + step * len(ranks)
    yield f'<line class="mean" x1="{left:.1f}" x2="{end:.1f}" y1="{y:.2f}" y2="{y:.2f}">{tip}</line>'
