"""Plans made of plain layouts, and their views."""

from __future__ import annotations

import torch

from nemo_rl.planview.model import Place, PlanView, view_plan
from nemo_rl.planview.predict import Links
from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.plan import RefitPlan
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region

COMPUTED = "the loader computes b from it by aten::exp"
LINKS = Links(node_gb_per_s=100.0, network_gb_per_s=10.0, latency_us=5.0)


def table_of(rows: int, num_layers: int = 2) -> TensorTable:
    names = [f"layers.{i}.w" for i in range(num_layers)] + ["bias", "frozen"]
    shapes = {name: (rows, 4) if name.startswith("layers") else (3,) for name in names}
    return {name: TensorMeta(shapes[name], torch.float32) for name in natural_order(names)}


def split(table: TensorTable, index: int, count: int) -> Layout:
    """Part `index` of `count` of the rows of every layer's tensor, and the other tensors whole."""
    rows = []
    for name, meta in table.items():
        region = Region.whole(meta.shape)
        if name.startswith("layers"):
            size = meta.shape[0] // count
            region = Region((index * size, 0), (size, meta.shape[1]))
        rows.append((name, region))
    return Layout.from_regions(rows, table)


def plan_of(trainers: int, generators: int, *, rows: int = 48, misc: bool = True) -> RefitPlan:
    """Layers by rows on both sides; `bias` is misc, nobody takes `frozen`."""
    table = table_of(rows)
    taken = {name: meta for name, meta in table.items() if name != "frozen" and not (misc and name == "bias")}
    reasons = {"bias": COMPUTED} if misc else {}
    world = World.of(trainers, generators)
    sources = {r: split(table, r, trainers) for r in world.trainers}
    declarations = {r: Declaration(split(taken, i, generators), reasons) for i, r in enumerate(world.generators)}
    return plan_refit(world, sources, declarations, table, bucket_bytes=1024)


def view_of(trainers: int, generators: int, *, per_node: int = 8, **choices) -> PlanView:
    plan = plan_of(trainers, generators, **choices)
    table = table_of(choices.get("rows", 48))
    places = [
        [Place({"tp": i}, (first + i) // per_node, split(table, i, count).num_bytes) for i in range(count)]
        for first, count in ((0, trainers), (trainers, generators))
    ]
    lines = {"trainer": ("layers.*.w [48, 4] float32 x 2: tp Shard(0)",)}
    return view_plan(plan, f"rows <{trainers} -> {generators}>", *places, LINKS, layouts=lines, notes=["a note"])
