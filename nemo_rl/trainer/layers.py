"""Layers of Megatron-Core's GPT model from modules of Megatron and torch alone; no Transformer Engine, no Apex."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_rl.trainer.shape import ModelShape


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm whose gradient Megatron sums over the ranks of sequence parallelism.

    A mixture of experts under tensor parallelism needs sequence parallelism, which Megatron's own wrapper of torch's
    norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]


class CausalAttention(torch.nn.Module):
    """Torch's fused causal attention: no mask and no matrix of scores is kept, also without Transformer Engine.

    It may hold the scales of an FP8 cache of keys and values: buffers `k_scale`, `v_scale` and `q_scale`, each one
    float32 number that values are divided by.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self._scale = softmax_scale
        self._seen: dict[str, torch.Tensor] = {}

    def hold_cache_scales(self, kinds: str) -> None:
        """Hold a scale for each letter of `kinds`, 1 until it is calibrated."""
        for kind in kinds:
            self.register_buffer(f"{kind}_scale", torch.ones(1))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CausalAttention:
        """Scales stay float32 when the model is brought to another dtype."""
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name, buffer.float())
        return self

    def watch(self) -> None:
        """From here on, keep the largest magnitudes that attention sees."""
        self._seen = {name: torch.zeros_like(scale) for name, scale in self.named_buffers()}

    def calibrate(self, group: dist.ProcessGroup) -> None:
        """Set the scales by what was seen since `watch` on all ranks of `group`; each of them calls it."""
        for name, scale in self.named_buffers():
            dist.all_reduce(self._seen[name], op=dist.ReduceOp.MAX, group=group)
            largest = torch.finfo(torch.float8_e4m3fn).max
            scale.copy_((self._seen[name] / largest).clamp_min(torch.finfo(torch.float32).tiny))
        self._seen = {}

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`query` `[S, B, heads, D]`, `key` `[S, B, groups, D]`, `value` `[S, B, groups, E]` -> `[S, B, heads * E]`."""
        given = {"k_scale": key, "v_scale": value, "q_scale": query}
        for name, seen in self._seen.items():
            seen.copy_(torch.maximum(seen, given[name].detach().abs().amax().float()))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self._scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer that every tensor-parallel rank holds whole and applies to its part of the sequence."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[assignment]

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(inputs), None


class LatentSelfAttention(MLASelfAttention):
    """Latent attention whose projections to low ranks are whole on every rank, as with Transformer Engine.

    Megatron's own stand-in splits them over tensor-parallel ranks. The rotary part of the key that they give serves the
    heads of all ranks, but its gradient is then taken from the heads of one.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        rows = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, rows)


def block_spec(config: TransformerConfig, shape: ModelShape, chunk: int | None) -> TransformerBlockSubmodules:
    """Layers of this chunk: dense or sparse by their number in the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    mine = shape.sparse_layers[first : first + get_num_layers_to_build(config, vp_stage=chunk)]
    kinds = {sparse: _layer_spec(config, shape, sparse) for sparse in set(mine)}
    return TransformerBlockSubmodules(layer_specs=[kinds[sparse] for sparse in mine], layer_norm=RMSNorm)


def draft_spec(config: TransformerConfig, shape: ModelShape) -> MultiTokenPredictionBlockSubmodules:
    """Layers that predict tokens further ahead."""
    layer = get_mtp_layer_spec_for_backend(_layer_spec(config, shape, sparse=True), LocalSpecProvider())
    layer.submodules = dataclasses.replace(layer.submodules, enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * shape.num_draft_layers)


def _layer_spec(config: TransformerConfig, shape: ModelShape, sparse: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if sparse else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=shape.latent is not None,
        normalization="RMSNorm",
    )
    normed = ("q_layernorm", "k_layernorm" if shape.latent is None else "kv_layernorm")
    norms = dict.fromkeys(normed if config.qk_layernorm else (), RMSNorm)
    attention = dataclasses.replace(layer.submodules.self_attention.submodules, core_attention=CausalAttention, **norms)
    module = layer.submodules.self_attention.module if shape.latent is None else LatentSelfAttention
    layer.submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        self_attention=dataclasses.replace(layer.submodules.self_attention, module=module, submodules=attention),
    )
    return layer
