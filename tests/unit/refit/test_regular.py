"""Layouts said in DTensor's words: they must lead back to the same regions."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nemo_rl.refit.dtensor import layout_on_mesh
from nemo_rl.refit.layout import Layout, TensorMeta
from nemo_rl.refit.region import Region
from nemo_rl.refit.regular import describe_layouts

SHAPE = (13, 12)


def on_mesh(axes, placements, shape=SHAPE, name="w"):
    table = {name: TensorMeta(shape, torch.float32)}
    coordinates = itertools.product(*map(range, axes.values()))
    return {
        rank: layout_on_mesh(table, {name: placements}, tuple(axes.values()), at) for rank, at in enumerate(coordinates)
    }


def by_rows(ranges, shape=SHAPE, name="w"):
    """One rank for each entry: a (first, end) of dim 0, a list of them, or None for a rank without the tensor."""
    table = {name: TensorMeta(shape, torch.float32)}
    rows = [[] if r is None else r if isinstance(r, list) else [r] for r in ranges]
    return {
        rank: Layout.from_regions([(name, Region((a, 0), (b - a, shape[1]))) for a, b in found], table)
        for rank, found in enumerate(rows)
    }


def words(layouts, *meshes):
    (line,) = describe_layouts(layouts, meshes)
    return line.split(": ", 1)[1]


PLACES = [Replicate(), Shard(0), Shard(1)]


@pytest.mark.parametrize("placements", list(itertools.product(PLACES, repeat=2)))
def test_what_torch_places_is_said_in_torchs_words(placements):
    axes = {"dp": 2, "tp": 3}
    said = words(on_mesh(axes, placements), axes)
    names = [repr(place).replace("dim=", "").replace("()", "") for place in placements]
    assert said == f"dp {names[0]}, tp {names[1]}"


def test_fsdp_over_tensor_parallelism_is_strided():
    axes = {"fsdp": 2, "tp": 2}
    layouts = on_mesh(axes, (_StridedShard(0, split_factor=2), Shard(0)), shape=(16, 8))
    assert words(layouts, axes) == "fsdp _StridedShard(0), tp Shard(0)"


@pytest.mark.parametrize(
    ("ranges", "text"),
    [
        ([(0, 5), (5, 9), (9, 13), None], "irregular"),
        ([(0, 4), (4, 8), (8, 12), (12, 13)], "tp Shard(0)"),
        ([(0, 1), (1, 8), (8, 12), (12, 13)], "tp Shard(0) uneven"),
        ([(0, 7), (0, 7), (7, 13), (7, 13)], "tp Shard(0) by 2"),
        ([(0, 5), (0, 5), (5, 13), (5, 13)], "tp Shard(0) uneven by 2"),
        ([(0, 5), (5, 13), (5, 13), (5, 13)], "irregular"),
        ([None, None, (0, 13), None], "tp one"),
        ([None, None, (0, 12), None], "irregular"),
        ([None, (0, 13), (0, 13), None], "tp 2 of 4"),
        ([None, (0, 6), (6, 13), None], "irregular"),
        ([(0, 4), (4, 8), (8, 12), (11, 13)], "irregular"),
        ([(8, 12), (4, 8), (0, 4), (12, 13)], "irregular"),
        ([[(0, 2), (2, 4)], (4, 8), (8, 12), (12, 13)], "tp Shard(0)"),
        ([[(0, 2), (3, 4)], (4, 8), (8, 12), (12, 13)], "irregular"),
    ],
)
def test_regular_and_irregular_rows(ranges, text):
    assert words(by_rows(ranges), {"pp": 1, "tp": 4}) == text


def test_an_expert_is_described_on_the_expert_mesh():
    layouts = by_rows([None, None, (0, 13), None])
    assert words(layouts, {"pp": 2, "dp": 1, "tp": 2}, {"pp": 2, "ep": 2}) == "pp one, ep one"
    layouts = by_rows([None, None, (0, 7), (7, 13)])
    assert words(layouts, {"pp": 2, "tp": 2}, {"pp": 2, "ep": 2}) == "pp one, tp Shard(0)"


def test_alike_tensors_share_a_line():
    table = {f"layers.{i}.w": TensorMeta((4,), torch.bfloat16) for i in range(3)}
    whole = {0: Layout.from_regions([(f, Region((0,), (4,))) for f in table], table)}
    assert describe_layouts(whole, [{"tp": 1}]) == ["layers.*.w [4] bfloat16 x 3: one rank"]


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match=re.escape("mesh {'tp': 3} does not have 4 ranks")):
        describe_layouts(by_rows([(0, 13)] * 4), [{"tp": 3}])


def test_scalars_are_replicated():
    assert words(on_mesh({"tp": 2}, (Replicate(),), shape=()), {"tp": 2}) == "tp Replicate"
