"""What every rank of a Megatron trainer holds, by rule: no Megatron, no process, no weights.

Enumerates the tensors that Megatron's `sharded_state_dict` gives, cuts them as its parallel groups do, and asks the
family rule for the boxes, as `MegatronSource` does of a live model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from nemo_rl.refit.layout import Layout, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.families import EMBEDDING, HEAD, Weight
from nemo_rl.trainer.model import Parallel, check_layout, padded_vocabulary
from nemo_rl.trainer.pipeline import stage_layers
from nemo_rl.trainer.shape import ModelShape

Rows = tuple[tuple[str, Region], ...]
"""(fqn, box) of everything that one rank holds; replicas share the value."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A rank's place in both of Megatron's meshes, which order ranks tp-cp-dp-pp and etp-ep-edp-pp, first fastest."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int

    @classmethod
    def of(cls, rank: int, parallel: Parallel) -> Coordinate:
        """Raises ValueError where the world has no such rank."""
        if not 0 <= rank < parallel.world_size:
            raise ValueError(f"rank {rank} is not one of the {parallel.world_size} trainer ranks")
        rest, tensor = divmod(rank, parallel.tensor)
        rest, context = divmod(rest, parallel.context)
        pipeline, data = divmod(rest, parallel.data)
        rest, expert_tensor = divmod(rank, parallel.expert_tensor)
        rest, expert = divmod(rest, parallel.expert)
        expert_data = rest % (parallel.world_size // (parallel.expert_tensor * parallel.expert * parallel.pipeline))
        return cls(tensor, context, data, pipeline, expert_tensor, expert, expert_data)


@dataclass(frozen=True)
class SimulatedTrainer:
    """Every rank of a trainer.

    Attributes:
        table: every Hugging Face tensor that is exported.
        rows: by rank, what it holds.
        unused: tensors that are held but not exported, with the reason.
    """

    table: TensorTable
    rows: tuple[Rows, ...]
    unused: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _layouts(self) -> dict[int, Layout]:
        made: dict[int, Layout] = {}
        for rows in self.rows:
            if id(rows) not in made:
                made[id(rows)] = Layout.from_regions(rows, self.table)
        return {rank: made[id(rows)] for rank, rows in enumerate(self.rows)}

    def layouts(self) -> dict[int, Layout]:
        """By rank, its layout; replicas share one."""
        return dict(self._layouts)


def simulate(shape: ModelShape, parallel: Parallel, dtype: torch.dtype) -> SimulatedTrainer:
    """All ranks of a trainer of `shape` with weights in `dtype`.

    Raises:
        ValueError: the layout cannot hold the model; everything that is wrong. Or it cuts blocks of FP8 weights.
    """
    problems = check_layout(shape, parallel)
    if problems:
        raise ValueError("no such trainer: " + "; ".join(problems))
    held = _Shards(shape, parallel)
    made: dict[tuple[int, ...], Rows] = {}
    rows = []
    for rank in range(parallel.world_size):
        at = Coordinate.of(rank, parallel)
        key = (at.pipeline, at.tensor, at.expert, at.expert_tensor)
        if key not in made:
            made[key] = held.rows(at)
        rows.append(made[key])
    return SimulatedTrainer(families.table(shape, dtype), tuple(rows))


class _Shards:
    """Rows of every shard, made once: tensors go by (stage, tensor rank), experts by (expert, expert-tensor rank)."""

    def __init__(self, shape: ModelShape, parallel: Parallel) -> None:
        self._shape, self._parallel = shape, parallel
        self._dense: defaultdict[int, list[Weight]] = defaultdict(list)
        self._experts: defaultdict[tuple[int, int], list[Weight]] = defaultdict(list)
        stages = stage_of_layer(shape, parallel)
        num_local = max(shape.num_experts // parallel.expert, 1)
        for weight in families.weights(shape, padded_vocabulary(shape, parallel)):
            stage = stages[weight.layer]
            if weight.expert is None:
                self._dense[stage].append(weight)
            else:
                self._experts[stage, weight.expert // num_local].append(weight)
        self._made: dict[tuple[int, ...], list[tuple[str, Region]]] = {}

    def rows(self, at: Coordinate) -> Rows:
        """Of one rank; a box that it holds twice (a tied output layer beside the embedding) once."""
        dense = self._cut(self._dense[at.pipeline], at.tensor, self._parallel.tensor, (0, at.pipeline))
        ranks = (1, at.pipeline, at.expert)
        experts = self._experts[at.pipeline, at.expert]
        return tuple(dict.fromkeys(dense + self._cut(experts, at.expert_tensor, self._parallel.expert_tensor, ranks)))

    def _cut(self, weights: list[Weight], index: int, count: int, key: tuple[int, ...]) -> list[tuple[str, Region]]:
        """Part `index` of `count` of every weight."""
        key = (*key, index)
        if key not in self._made:
            self._made[key] = [row for weight in weights for row in self._part(weight, index, count)]
        return self._made[key]

    def _part(self, weight: Weight, index: int, count: int) -> Iterator[tuple[str, Region]]:
        found = families.boxes(self._shape, weight.key, weight.size)
        rows = [(fqn, region) for fqn, region, _ in families.parts(found, chunk_of(weight, index, count))]
        yield from rows
        fp8 = self._shape.fp8
        if fp8 is not None:
            for fqn, region in _joined([row for row in rows if fp8.covers(row[0])]):
                yield families.scale_of(fqn), families.scale_region(self._shape, fqn, region)


def _joined(rows: list[tuple[str, Region]]) -> list[tuple[str, Region]]:
    """Boxes of one tensor that continue each other along dim 0 (heads of several query groups) as one box."""
    out: list[tuple[str, Region]] = []
    for fqn, region in sorted(rows, key=lambda row: (row[0], row[1].offsets)):
        if out and out[-1][0] == fqn and out[-1][1].ends[0] == region.offsets[0]:
            before = out.pop()[1]
            region = Region(before.offsets, (before.sizes[0] + region.sizes[0], *before.sizes[1:]))
        out.append((fqn, region))
    return out


def chunk_of(weight: Weight, index: int, count: int) -> Region:
    """Part `index` of `count` equal parts of a weight, or all of one that is not split."""
    region = Region.whole(weight.size)
    if weight.split is None:
        return region
    size, offsets, sizes = weight.size[weight.split] // count, list(region.offsets), list(region.sizes)
    offsets[weight.split], sizes[weight.split] = index * size, size
    return Region(tuple(offsets), tuple(sizes))


def stage_of_layer(shape: ModelShape, parallel: Parallel) -> dict[int, int]:
    """Layer, EMBEDDING or HEAD -> pipeline stage."""
    stages = {EMBEDDING: 0, HEAD: parallel.pipeline - 1}
    split = parallel.chunks(shape.num_layers)
    for stage in range(parallel.pipeline):
        stages |= {layer: stage for part in stage_layers(split, parallel.pipeline, stage) for layer in part}
    return stages
