"""A plan as a picture file: ribbons, bytes per rank and the matrix of pairs, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from nemo_rl.planview.flow import Band, Node, color, flow_of
from nemo_rl.planview.model import PlanView, RankView
from nemo_rl.planview.text import summary
from nemo_rl.planview.units import size

_RIGHT = 100.0  # of the ribbon drawing, in its own units


def draw(view: PlanView, path: FilePath) -> None:
    """Write `path` in the format of its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1.0))
    _ribbons(view, figure.add_subplot(grid[0, :]))
    _bars(view, figure.add_subplot(grid[1, 0]))
    _heat(view, figure, figure.add_subplot(grid[1, 1]))
    lines = [line for line in summary(view) if not line.startswith(("assumed", "note"))]
    figure.suptitle("\n".join([view.title, *lines[1:5]]), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=110)


def _ribbons(view: PlanView, axes: Any) -> None:
    from matplotlib.patches import PathPatch

    flow = flow_of(view)
    for band in flow.bands:
        axes.add_patch(PathPatch(_outline(band), facecolor=color(band.row), alpha=0.45, linewidth=0))
    _marks(axes, flow.trainers, view.trainers, -2.0, "right", colored=True)
    _marks(axes, flow.generators, view.generators, _RIGHT, "left", colored=False)
    axes.set(xlim=(-22, _RIGHT + 22), ylim=(flow.height, 0))
    axes.axis("off")


def _outline(band: Band) -> Any:
    from matplotlib.path import Path

    a, b, low, high, middle = band.left, band.right, band.left + band.width, band.right + band.width, _RIGHT / 2
    points = [(0, a), (middle, a), (middle, b), (_RIGHT, b), (_RIGHT, high), (middle, high), (middle, low), (0, low)]
    curve = Path.CURVE4
    codes = [Path.MOVETO, curve, curve, curve, Path.LINETO, curve, curve, curve]
    return Path([*points, (0, a)], [*codes, Path.CLOSEPOLY])


def _marks(axes: Any, nodes: Sequence[Node], ranks: Sequence[RankView], x: float, side: str, *, colored: bool) -> None:
    from matplotlib.patches import Rectangle

    for index, node in enumerate(nodes):
        fill = color(index) if colored else "#344054"
        axes.add_patch(Rectangle((x, node.top), 2.0, node.height, facecolor=fill))
        label = f"{node.group.label}  {size(sum(ranks[i].wire_bytes for i in node.group.members))}"
        place = x - 0.8 if side == "right" else x + 2.8
        axes.text(place, node.top + node.height / 2, label, ha=side, va="center", fontsize=8)


def _bars(view: PlanView, axes: Any) -> None:
    for ranks, sign, fill in ((view.trainers, 1, "#4c78a8"), (view.generators, -1, "#f58518")):
        heights = [sign * rank.wire_bytes / 1e9 for rank in ranks]
        axes.bar(range(len(ranks)), heights, width=0.85 if len(ranks) <= 64 else 1.0, color=fill)
    axes.axhline(0, color="#344054", linewidth=0.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="rank of its side", ylabel="GB   received (down), sent (up)", title="bytes per rank over links")
    axes.spines[["top", "right"]].set_visible(False)


def _heat(view: PlanView, figure: Any, axes: Any) -> None:
    shown = axes.imshow(np.where(view.matrix > 0, view.matrix / 1e9, np.nan), cmap="Blues", aspect="auto", vmin=0)
    axes.set(xlabel="generator", ylabel="trainer", title="GB by pair; white is nothing")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=axes)
