"""What a family rule is made of: boxes of tensors, Megatron's tensors by place and split, and the shapes all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_rl.refit.region import Region
from nemo_rl.trainer.shape import ModelShape

Shape = tuple[int, ...]

EMBEDDING, HEAD = -1, -2
"""Places of tensors that stand before the first layer and after the last one."""


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `source` of a Megatron tensor are the elements `region` of `fqn`, in the same order.

    Attributes:
        partial: other Megatron tensors hold the rest of `fqn`.

    Raises:
        ValueError: the two boxes differ in shape.
    """

    fqn: str
    source: Region
    region: Region
    partial: bool = False

    def __post_init__(self) -> None:
        if self.source.sizes != self.region.sizes:
            raise ValueError(f"{self.fqn}: box {self.source} does not have the shape of {self.region}")

    def to_hf(self, part: Region) -> Region:
        """Where a part of `source` lies in `fqn`."""
        return part.moved(tuple(h - s for h, s in zip(self.region.offsets, self.source.offsets, strict=True)))


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of Megatron's sharded state, whole, and how ranks share it.

    Attributes:
        layer: number of its layer in the whole model, or EMBEDDING or HEAD.
        split: dim that the ranks of a tensor-parallel group hold equal parts of; None where each holds it whole.
        expert: number of its expert in the whole model, split over the expert groups; None for other tensors.
    """

    key: str
    size: Shape
    layer: int
    split: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Rules of one model architecture.

    Attributes:
        read: shape from a Hugging Face configuration; raises UnsupportedModel.
        tensors: shape of every tensor of a checkpoint.
        rule: boxes of one Megatron key; an empty list is padding, None an unknown key.
        weights: Megatron's tensors of a model whose vocabulary is padded to the given number of rows.
        droppable: names that a checkpoint may hold beside `tensors` without changing the model.
        float32: whether a tensor stays in float32 whatever the model's dtype.
        untrained: what ranks can hold but the trainer does not run, each with a remedy.
    """

    read: Callable[[Any], ModelShape]
    tensors: Callable[[ModelShape], dict[str, Shape]]
    rule: Callable[[ModelShape, str, Shape], list[Box] | None]
    weights: Callable[[ModelShape, int], Iterator[Weight]]
    droppable: Callable[[ModelShape], frozenset[str]]
    float32: Callable[[str], bool] = lambda fqn: False
    untrained: Callable[[ModelShape], list[str]] = lambda shape: []


def whole(fqn: str, size: Shape) -> Box:
    """A Megatron tensor that is `fqn`."""
    return Box(fqn, Region.whole(size), Region.whole(size))


def rows(fqn: str, source: int, target: int, count: int, rest: Shape) -> Box:
    """`count` rows from row `source` of the Megatron tensor and from row `target` of `fqn`."""
    zeros = (0,) * len(rest)
    return Box(fqn, Region((source, *zeros), (count, *rest)), Region((target, *zeros), (count, *rest)))


def vocabulary(fqn: str, shape: ModelShape, size: Shape) -> Box:
    """The rows of a padded embedding that are tokens."""
    return whole(fqn, (min(size[0], shape.vocab_size), *size[1:]))


def qkv(shape: ModelShape, prefix: str, kind: str, size: Shape) -> list[Box]:
    """Rows of `linear_qkv` go by query group: the group's query heads, its key head, its value head."""
    query, head = shape.heads_per_group * shape.head_dim, shape.head_dim
    out, row = [], 0
    for group in range(shape.num_kv_heads):
        for name, count in (("q_proj", query), ("k_proj", head), ("v_proj", head)):
            out.append(rows(f"{prefix}{name}.{kind}", row, group * count, count, size[1:]))
            row += count
    return out


def gate_up(prefix: str, name: str, size: Shape) -> list[Box] | None:
    """`linear_fc1` is the gate's rows, then the up projection's; Megatron gives it as two keys or as one."""
    if name == "linear_fc1.weight_w":
        return [whole(prefix + "gate_proj.weight", size)]
    if name == "linear_fc1.weight_v":
        return [whole(prefix + "up_proj.weight", size)]
    if name == "linear_fc1.weight":
        half = size[0] // 2
        names = ("gate_proj.weight", "up_proj.weight")
        return [rows(prefix + n, i * half, 0, half, size[1:]) for i, n in enumerate(names)]
    return None


def mlp_tensors(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    """A gated MLP of a checkpoint."""
    out: dict[str, Shape] = {f"{prefix}{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
    return out | {f"{prefix}down_proj.weight": (hidden, width)}


def mlp_weights(prefix: str, hidden: int, width: int, layer: int, expert: int | None = None) -> Iterator[Weight]:
    """The same MLP of Megatron."""
    for part in "wv":
        yield Weight(f"{prefix}linear_fc1.weight_{part}", (width, hidden), layer, 0, expert)
    yield Weight(f"{prefix}linear_fc2.weight", (hidden, width), layer, 1, expert)


def expert_weights(shape: ModelShape, prefix: str, layer: int) -> Iterator[Weight]:
    """The gated experts of a layer of Megatron."""
    for expert in range(shape.num_experts):
        at = f"{prefix}experts.experts.{expert}."
        yield from mlp_weights(at, shape.hidden_size, shape.expert_ffn_size, layer, expert)


def end_weights(shape: ModelShape, padded: int, final_norm: str = "decoder.final_layernorm.weight") -> Iterator[Weight]:
    """Embedding, last norm and output layer; a tied output layer is the embedding again.

    Draft layers read what the norm gives, so that with them it stands with the last layer instead of with the head.
    """
    embedding = "embedding.word_embeddings.weight"
    yield Weight(embedding, (padded, shape.hidden_size), EMBEDDING, 0)
    yield Weight(final_norm, (shape.hidden_size,), shape.num_layers - 1 if shape.num_draft_layers else HEAD)
    output = embedding if shape.tied_embeddings else "output_layer.weight"
    yield Weight(output, (padded, shape.hidden_size), HEAD, 0)
