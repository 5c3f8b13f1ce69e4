"""Layouts of large models on large meshes, columnar and without weights: DeepSeek-V3 and Qwen3-30B-A3B by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from nemo_rl.refit.base import Declaration, World
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable, natural_order

Case = tuple[World, Mapping[int, Layout], Mapping[int, Declaration], TensorTable]

_ROW_PARALLEL = ("down_proj.weight", "o_proj.weight")
_WHOLE = ("norm.weight", "mlp.gate.weight", "e_score_correction_bias", "a_proj.weight", "a_proj_with_mqa.weight")


def deepseek_v3(num_layers: int = 61) -> TensorTable:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, 7168),
        "lm_head.weight": (129280, 7168),
        "model.norm.weight": (7168,),
    }
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}input_layernorm.weight": (7168,), f"{at}post_attention_layernorm.weight": (7168,)}
        shapes |= {
            f"{at}self_attn.q_a_proj.weight": (1536, 7168),
            f"{at}self_attn.q_a_layernorm.weight": (1536,),
            f"{at}self_attn.q_b_proj.weight": (128 * 192, 1536),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": (512 + 64, 7168),
            f"{at}self_attn.kv_a_layernorm.weight": (512,),
            f"{at}self_attn.kv_b_proj.weight": (128 * 256, 512),
            f"{at}self_attn.o_proj.weight": (7168, 128 * 128),
        }
        if layer < 3:
            shapes |= _gated(f"{at}mlp.", 7168, 18432)
            continue
        shapes |= {f"{at}mlp.gate.weight": (256, 7168), f"{at}mlp.gate.e_score_correction_bias": (256,)}
        shapes |= _gated(f"{at}mlp.shared_experts.", 7168, 2048)
        for expert in range(256):
            shapes |= _gated(f"{at}mlp.experts.{expert}.", 7168, 2048)
    return _table(shapes)


def qwen3_30b(num_layers: int = 48) -> TensorTable:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(num_layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}input_layernorm.weight": (2048,), f"{at}mlp.gate.weight": (128, 2048)}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (size, 2048) for n, size in (("q", 4096), ("k", 512), ("v", 512))}
        shapes |= {f"{at}self_attn.o_proj.weight": (2048, 4096)}
        for expert in range(128):
            shapes |= _gated(f"{at}mlp.experts.{expert}.", 2048, 768)
    return _table(shapes)


def _gated(at: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}gate_proj.weight": (ffn, hidden),
        f"{at}up_proj.weight": (ffn, hidden),
        f"{at}down_proj.weight": (hidden, ffn),
    }


def _table(shapes: Mapping[str, tuple[int, ...]]) -> TensorTable:
    return {name: TensorMeta(shapes[name], torch.bfloat16) for name in natural_order(shapes)}


class Columns:
    """The tensors of a table as arrays, and layouts of parts of them that share its names."""

    def __init__(self, table: TensorTable) -> None:
        self.names, self.metas = tuple(table), tuple(table.values())
        self.sizes = np.array([(*m.shape, 1)[:2] for m in self.metas], np.int64)
        self.layer = np.array([self._number(n, "layers.") for n in self.names])
        self.expert = np.array([self._number(n, "experts.") for n in self.names])
        self.dim = np.array([-1 if n.endswith(_WHOLE) else int(n.endswith(_ROW_PARALLEL)) for n in self.names])

    @staticmethod
    def _number(name: str, before: str) -> int:
        tail = name.partition(before)[2].partition(".")[0]
        return int(tail) if tail.isdigit() else -1

    def layout(
        self, held: np.ndarray, dim: np.ndarray, part: int, parts: int, unit: np.ndarray | None = None
    ) -> Layout:
        """Part `part` of `parts` along `dim` (-1: all) of the tensors `held`, in blocks as torch.chunk cuts them."""
        offsets, sizes, cut = np.zeros((len(held), 2), np.int64), self.sizes[held].copy(), np.flatnonzero(dim >= 0)
        whole = sizes[cut, dim[cut]]
        block = -(-whole // parts)
        offsets[cut, dim[cut]] = np.minimum(part * block, whole)
        sizes[cut, dim[cut]] = np.clip(whole - part * block, 0, block)
        units = np.full(len(held), -1, np.int32) if unit is None else unit[held].astype(np.int32)
        return Layout(self.names, self.metas, held.astype(np.int32), offsets, sizes, units)

    def pipeline_of_experts(self, stages: int, experts: int) -> dict[int, Layout]:
        """PP x EP: rank = stage * experts + e; everything but the experts is replicated inside a stage."""
        num_layers, num_experts = int(self.layer.max()) + 1, int(self.expert.max()) + 1
        first = np.array([n.startswith("model.embed") for n in self.names])
        stage = np.where(self.layer < 0, np.where(first, 0, stages - 1), self.layer * stages // num_layers)
        share = np.where(self.expert < 0, -1, self.expert * experts // num_experts)
        whole = np.full(len(self.names), -1)
        return {
            s * experts + e: self.layout(rows, whole[rows], 0, 1)
            for s in range(stages)
            for e in range(experts)
            for rows in [np.flatnonzero((stage == s) & ((share < 0) | (share == e)))]
        }

    def sharded(self, ranks: int) -> dict[int, Layout]:
        """FSDP: Shard(0) of every tensor."""
        rows, dim = np.arange(len(self.names)), np.zeros(len(self.names), np.int64)
        return {r: self.layout(rows, dim, r, ranks) for r in range(ranks)}

    def tensor_parallel(self, size: int, replicas: int, *, units: bool) -> list[Declaration]:
        """TP x DP generators; a landing unit is a layer's attention, its experts, or the rest of its MLP."""
        module = np.where(self.expert >= 0, 2, np.array([".mlp." in n for n in self.names]).astype(int))
        unit = np.where(self.layer < 0, -1, self.layer * 3 + module) if units else None
        rows = np.arange(len(self.names))
        made = [Declaration(self.layout(rows, self.dim, r, size, unit)) for r in range(size)]
        return made * replicas


def case(table: TensorTable, sources: Callable[[Columns], dict[int, Layout]], tp: int, dp: int, *, units: bool) -> Case:
    columns = Columns(table)
    held = sources(columns)
    declared = columns.tensor_parallel(tp, dp, units=units)
    world = World.of(len(held), len(declared))
    return world, held, dict(zip(world.generators, declared, strict=True)), table
