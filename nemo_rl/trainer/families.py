"""Model families: which box of which Hugging Face tensor a box of a Megatron tensor is.

Pure geometry; one rule serves refits, loading and exporting. A rule is asked with the global key and global shape that
Megatron's `sharded_state_dict` gives. A key that it does not know is refused by name, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nemo_rl.refit.layout import TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.trainer.shape import ModelShape, UnsupportedModel, architecture_of, read_qwen

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements `source` of a Megatron tensor are the elements `region` of `fqn`, in the same order.

    Raises:
        ValueError: the two boxes differ in shape.
    """

    fqn: str
    source: Region
    region: Region

    def __post_init__(self) -> None:
        if self.source.sizes != self.region.sizes:
            raise ValueError(f"{self.fqn}: box {self.source} does not have the shape of {self.region}")

    def to_hf(self, part: Region) -> Region:
        """Where a part of `source` lies in `fqn`."""
        return part.moved(tuple(h - s for h, s in zip(self.region.offsets, self.source.offsets, strict=True)))


@dataclass(frozen=True, slots=True)
class Family:
    """Rules of one model architecture.

    Attributes:
        read: shape from a Hugging Face configuration; raises UnsupportedModel.
        tensors: shape of every tensor of a checkpoint.
        rule: boxes of one Megatron key; an empty list is padding, None an unknown key.
        droppable: names that a checkpoint may hold beside `tensors` without changing the model.
    """

    read: Callable[[Any], ModelShape]
    tensors: Callable[[ModelShape], dict[str, Shape]]
    rule: Callable[[ModelShape, str, Shape], list[Box] | None]
    droppable: Callable[[ModelShape], frozenset[str]]


def family_of(hf_config: Any) -> Family:
    """The family of a configuration. Raises UnsupportedModel naming the architecture and those that are known."""
    name = architecture_of(hf_config)
    if name not in FAMILIES:
        raise UnsupportedModel([f"architecture {name} has no family rule; known are {', '.join(sorted(FAMILIES))}"])
    return FAMILIES[name]


def table(shape: ModelShape, dtype: torch.dtype) -> TensorTable:
    """Every Hugging Face tensor of the model, in `dtype`."""
    tensors = _tensors(shape)
    return {fqn: TensorMeta(tensors[fqn], dtype) for fqn in natural_order(tensors)}


def droppable(shape: ModelShape) -> frozenset[str]:
    """Names that a checkpoint of the model may hold beside those of `table`."""
    return FAMILIES[shape.architecture].droppable(shape)


@lru_cache(maxsize=8)
def _tensors(shape: ModelShape) -> Mapping[str, Shape]:
    return FAMILIES[shape.architecture].tensors(shape)


def boxes(shape: ModelShape, key: str, size: Shape) -> list[Box]:
    """The correspondences of Megatron tensor `key` of global shape `size`.

    Elements that no box covers are vocabulary padding.

    Raises:
        ValueError: the key is unknown, or its size does not fit the model; both are named.
    """
    found = FAMILIES[shape.architecture].rule(shape, key, size)
    if found is None:
        raise ValueError(
            f"Megatron tensor {key} {size} is unknown to the rule of {shape.architecture}; extend the rule"
        )
    tensors = _tensors(shape)
    whole = {fqn: sum(b.region.volume for b in found if b.fqn == fqn) for fqn in {b.fqn for b in found}}
    wrong = [f for f, n in whole.items() if f not in tensors or n != Region.whole(tensors[f]).volume]
    wrong += [b.fqn for b in found if b.fqn in tensors and not b.region.fits(tensors[b.fqn])]
    covered = sum(whole.values()) == Region.whole(size).volume or key in _VOCABULARY
    if wrong or not covered or not all(b.source.fits(size) for b in found):
        expected = {fqn: tensors.get(fqn) for fqn in whole}
        raise ValueError(
            f"Megatron tensor {key} of shape {size} does not hold {expected} of {shape.architecture}; check the config"
        )
    return found


_VOCABULARY = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}

_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
"""Layer tensors that are one Hugging Face tensor whole."""


def _qwen_rule(shape: ModelShape, key: str, size: Shape) -> list[Box] | None:
    if key in _VOCABULARY:
        real = Region.whole((min(size[0], shape.vocab_size), *size[1:]))
        return [Box(_VOCABULARY[key], real, real)]
    if key == "decoder.final_layernorm.weight":
        return [_whole("model.norm.weight", size)]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
    if layer is None:
        return None
    prefix, name = f"model.layers.{layer[1]}.", layer[2]
    if name in _PLAIN:
        return [_whole(prefix + _PLAIN[name], size)]
    if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return _qkv(shape, prefix + "self_attn.", name.rsplit(".", 1)[1], size)
    expert = re.fullmatch(r"mlp\.experts\.experts\.(\d+)\.(.+)", name)
    if expert is not None:
        prefix, name = f"{prefix}mlp.experts.{expert[1]}.", expert[2]
    elif name.startswith("mlp.shared_experts."):
        prefix, name = f"{prefix}mlp.shared_expert.", name.removeprefix("mlp.shared_experts.")
    else:
        prefix, name = f"{prefix}mlp.", name.removeprefix("mlp.")
    if expert is not None and name == "linear_fc2.weight":
        return [_whole(prefix + "down_proj.weight", size)]
    return _gate_up(prefix, name, size)


def _whole(fqn: str, size: Shape) -> Box:
    return Box(fqn, Region.whole(size), Region.whole(size))


def _rows(fqn: str, source: int, target: int, count: int, rest: Shape) -> Box:
    """`count` rows from row `source` of the Megatron tensor and from row `target` of `fqn`."""
    zeros = (0,) * len(rest)
    return Box(fqn, Region((source, *zeros), (count, *rest)), Region((target, *zeros), (count, *rest)))


def _qkv(shape: ModelShape, prefix: str, kind: str, size: Shape) -> list[Box]:
    """Rows of `linear_qkv` go by query group: the group's query heads, its key head, its value head."""
    query, head = shape.heads_per_group * shape.head_dim, shape.head_dim
    out, row = [], 0
    for group in range(shape.num_kv_heads):
        for name, count in (("q_proj", query), ("k_proj", head), ("v_proj", head)):
            out.append(_rows(f"{prefix}{name}.{kind}", row, group * count, count, size[1:]))
            row += count
    return out


def _gate_up(prefix: str, name: str, size: Shape) -> list[Box] | None:
    """`linear_fc1` is the gate's rows, then the up projection's; Megatron gives it as two keys or as one."""
    if name == "linear_fc1.weight_w":
        return [_whole(prefix + "gate_proj.weight", size)]
    if name == "linear_fc1.weight_v":
        return [_whole(prefix + "up_proj.weight", size)]
    if name == "linear_fc1.weight":
        half = size[0] // 2
        names = ("gate_proj.weight", "up_proj.weight")
        return [_rows(prefix + n, i * half, 0, half, size[1:]) for i, n in enumerate(names)]
    return None


def _qwen_tensors(shape: ModelShape) -> dict[str, Shape]:
    hidden, query, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    out: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = (shape.vocab_size, hidden)
    for index, sparse in enumerate(shape.sparse_layers):
        layer = f"model.layers.{index}."
        out |= {f"{layer}{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            out[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if shape.qkv_bias:
                out[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        out[f"{layer}self_attn.o_proj.weight"] = (hidden, query)
        if shape.qk_norm:
            out |= {f"{layer}self_attn.{n}_norm.weight": (shape.head_dim,) for n in "qk"}
        out |= _qwen_sparse_mlp(shape, f"{layer}mlp.") if sparse else _mlp(f"{layer}mlp.", hidden, shape.ffn_size)
    return out


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
    return out | {f"{prefix}down_proj.weight": (hidden, width)}


def _qwen_sparse_mlp(shape: ModelShape, prefix: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}gate.weight": (shape.num_experts, shape.hidden_size)}
    for expert in range(shape.num_experts):
        out |= _mlp(f"{prefix}experts.{expert}.", shape.hidden_size, shape.expert_ffn_size)
    if shape.shared_ffn_size:
        out |= _mlp(f"{prefix}shared_expert.", shape.hidden_size, shape.shared_ffn_size)
        out[f"{prefix}shared_expert_gate.weight"] = (1, shape.hidden_size)
    return out


def _qwen_droppable(shape: ModelShape) -> frozenset[str]:
    """A tied model's `lm_head` is the embedding; some checkpoints store it twice."""
    return frozenset({"lm_head.weight"} if shape.tied_embeddings else ())


_QWEN = Family(read_qwen, _qwen_tensors, _qwen_rule, _qwen_droppable)

FAMILIES: Mapping[str, Family] = {
    "Qwen2ForCausalLM": _QWEN,
    "Qwen2MoeForCausalLM": _QWEN,
    "Qwen3ForCausalLM": _QWEN,
    "Qwen3MoeForCausalLM": _QWEN,
}
"""Hugging Face architecture -> its rules."""
