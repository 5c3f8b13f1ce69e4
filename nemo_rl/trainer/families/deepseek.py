"""DeepSeek-V3: latent attention, experts with a shared one, a sigmoid router with a correction bias, draft layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemo_rl.trainer.families.base import (
    HEAD,
    Box,
    Family,
    Shape,
    Weight,
    end_weights,
    expert_weights,
    gate_up,
    mlp_tensors,
    mlp_weights,
    vocabulary,
    whole,
)
from nemo_rl.trainer.shape import (
    LatentAttention,
    ModelShape,
    Router,
    UnsupportedModel,
    Yarn,
    architecture_of,
    cache_scales_of,
    quantization_of,
    rope_of,
    rope_parameters,
)

_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    # Transformer Engine fuses these norms with the layer behind them.
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}
"""Layer tensors that are one Hugging Face tensor whole."""

_DRAFT = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "final_layernorm.weight": "shared_head.norm.weight",
}
"""Tensors of a draft layer beside those of its transformer layer."""


def _rule(shape: ModelShape, key: str, size: Shape) -> list[Box] | None:
    drafts = [f"model.layers.{shape.num_layers + i}." for i in range(shape.num_draft_layers)]
    if key == "embedding.word_embeddings.weight":
        return _everywhere("model.embed_tokens.weight", [f"{d}embed_tokens.weight" for d in drafts], shape, size)
    if key == "output_layer.weight":
        return _everywhere("lm_head.weight", [f"{d}shared_head.head.weight" for d in drafts], shape, size)
    if key == "decoder.final_layernorm.weight":
        return [whole("model.norm.weight", size)]
    draft = re.fullmatch(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?(.+)", key)
    if draft is not None:
        prefix = f"model.layers.{shape.num_layers + int(draft[1])}."
        if draft[2] is None:
            return [whole(prefix + _DRAFT[draft[3]], size)] if draft[3] in _DRAFT else None
        return _layer_rule(prefix, draft[3], size)
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
    return None if layer is None else _layer_rule(f"model.layers.{layer[1]}.", layer[2], size)


def _everywhere(fqn: str, copies: list[str], shape: ModelShape, size: Shape) -> list[Box]:
    """Checkpoints hold the embedding and the output layer once more for each draft layer, which shares them."""
    return [vocabulary(name, shape, size) for name in (fqn, *copies)]


def _layer_rule(prefix: str, name: str, size: Shape) -> list[Box] | None:
    if name in _PLAIN:
        return [whole(prefix + _PLAIN[name], size)]
    expert = re.fullmatch(r"mlp\.experts\.experts\.(\d+)\.(.+)", name)
    if expert is not None:
        prefix, name = f"{prefix}mlp.experts.{expert[1]}.", expert[2]
        if name == "linear_fc2.weight":
            return [whole(prefix + "down_proj.weight", size)]
        return gate_up(prefix, name, size)
    if name.startswith("mlp.shared_experts."):
        return gate_up(f"{prefix}mlp.shared_experts.", name.removeprefix("mlp.shared_experts."), size)
    return gate_up(f"{prefix}mlp.", name.removeprefix("mlp."), size)


def _weights(shape: ModelShape, padded: int) -> Iterator[Weight]:
    yield from end_weights(shape, padded)
    for layer, sparse in enumerate(shape.sparse_layers):
        yield from _layer_weights(shape, f"decoder.layers.{layer}.", layer, sparse)
    hidden = shape.hidden_size
    for draft in range(shape.num_draft_layers):
        at = f"mtp.layers.{draft}."
        yield from (Weight(f"{at}{name}.weight", (hidden,), HEAD) for name in ("enorm", "hnorm", "final_layernorm"))
        yield Weight(f"{at}eh_proj.weight", (hidden, 2 * hidden), HEAD, 0)
        yield from _layer_weights(shape, f"{at}transformer_layer.", HEAD, sparse=True)


def _layer_weights(shape: ModelShape, at: str, layer: int, sparse: bool) -> Iterator[Weight]:
    hidden = shape.hidden_size
    yield Weight(f"{at}input_layernorm.weight", (hidden,), layer)
    for name, size, split in _attention(shape):
        yield Weight(f"{at}self_attention.{name}.weight", size, layer, split)
    yield Weight(f"{at}pre_mlp_layernorm.weight", (hidden,), layer)
    if not sparse:
        yield from mlp_weights(f"{at}mlp.", hidden, shape.ffn_size, layer)
        return
    yield Weight(f"{at}mlp.router.weight", (shape.num_experts, hidden), layer)
    if shape.router is not None:
        yield Weight(f"{at}mlp.router.expert_bias", (shape.num_experts,), layer)
    yield from expert_weights(shape, f"{at}mlp.", layer)
    if shape.shared_ffn_size:
        yield from mlp_weights(f"{at}mlp.shared_experts.", hidden, shape.shared_ffn_size, layer)


def _attention(shape: ModelShape) -> Iterator[tuple[str, Shape, int | None]]:
    """Megatron's name, size and split of every tensor of latent attention; every rank holds both down projections."""
    assert shape.latent is not None
    latent, hidden, heads = shape.latent, shape.hidden_size, shape.num_heads
    if latent.query_rank is None:
        yield "linear_q_proj", (heads * latent.query_dim, hidden), 0
    else:
        yield "linear_q_down_proj", (latent.query_rank, hidden), None
        yield "q_layernorm", (latent.query_rank,), None
        yield "linear_q_up_proj", (heads * latent.query_dim, latent.query_rank), 0
    yield "linear_kv_down_proj", (latent.kv_rank + latent.rope_dim, hidden), None
    yield "kv_layernorm", (latent.kv_rank,), None
    yield "linear_kv_up_proj", (heads * (latent.nope_dim + latent.value_dim), latent.kv_rank), 0
    yield "linear_proj", (hidden, heads * latent.value_dim), 1


def _tensors(shape: ModelShape) -> dict[str, Shape]:
    hidden, words = shape.hidden_size, (shape.vocab_size, shape.hidden_size)
    out: dict[str, Shape] = {"model.embed_tokens.weight": words, "model.norm.weight": (hidden,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = words
    drafts = range(shape.num_layers, shape.num_layers + shape.num_draft_layers)
    for index, sparse in enumerate((*shape.sparse_layers, *(True for _ in drafts))):
        at = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{name}.weight"] = (hidden,)
        for name, size, _ in _attention(shape):
            out[at + _PLAIN[f"self_attention.{name}.weight"]] = size
        out |= _sparse_mlp(shape, f"{at}mlp.") if sparse else mlp_tensors(f"{at}mlp.", hidden, shape.ffn_size)
    for index in drafts:
        at = f"model.layers.{index}."
        out |= {f"{at}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
        out |= {f"{at}eh_proj.weight": (hidden, 2 * hidden), f"{at}embed_tokens.weight": words}
        out[f"{at}shared_head.head.weight"] = words
    return out


def _sparse_mlp(shape: ModelShape, prefix: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}gate.weight": (shape.num_experts, shape.hidden_size)}
    if shape.router is not None:
        out[f"{prefix}gate.e_score_correction_bias"] = (shape.num_experts,)
    for expert in range(shape.num_experts):
        out |= mlp_tensors(f"{prefix}experts.{expert}.", shape.hidden_size, shape.expert_ffn_size)
    if shape.shared_ffn_size:
        out |= mlp_tensors(f"{prefix}shared_experts.", shape.hidden_size, shape.shared_ffn_size)
    return out


def _read(hf: Any) -> ModelShape:
    """Shape of a DeepSeek-V3 configuration. Raises UnsupportedModel with everything that the rule does not cover."""
    name = architecture_of(hf)
    bad = _unsupported(hf)
    if bad:
        raise UnsupportedModel([f"{name}: {text}" for text in bad])
    layers, dense = hf.num_hidden_layers, hf.first_k_dense_replace
    latent = LatentAttention(
        hf.q_lora_rank, hf.kv_lora_rank, hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim or hf.qk_nope_head_dim
    )
    return ModelShape(
        architecture=name,
        num_layers=layers,
        hidden_size=hf.hidden_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=latent.query_dim,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        rope_theta=rope_of(hf)[1],
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=False,
        qk_norm=True,
        sparse_layers=tuple(i >= dense for i in range(layers)),
        num_experts=hf.n_routed_experts,
        experts_per_token=hf.num_experts_per_tok,
        expert_ffn_size=hf.moe_intermediate_size,
        shared_ffn_size=(hf.n_shared_experts or 0) * hf.moe_intermediate_size,
        top_k_renormalized=bool(hf.norm_topk_prob),
        latent=latent,
        router=Router(hf.n_group or 1, hf.topk_group or 1, float(hf.routed_scaling_factor)),
        yarn=_yarn(rope_parameters(hf)) if rope_of(hf)[0] == "yarn" else None,
        num_draft_layers=getattr(hf, "num_nextn_predict_layers", 0) or 0,
        fp8=quantization_of(hf)[0],
    )


def _yarn(given: dict[str, Any]) -> Yarn:
    return Yarn(
        factor=float(given["factor"]),
        original_max_positions=int(given["original_max_position_embeddings"]),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        mscale=float(given.get("mscale") or 0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0),
    )


def _unsupported(hf: Any) -> list[str]:
    bad = []
    if hf.hidden_act != "silu":
        bad.append(f"hidden_act={hf.hidden_act!r} is not silu; choose a model with a gated silu MLP")
    if hf.attention_bias:
        bad.append("attention_bias=true is not covered by the family rule; choose a model without it")
    if rope_of(hf)[0] not in ("default", "yarn"):
        bad.append(f"rope_type={rope_of(hf)[0]!r} is not covered; choose a model with plain or yarn positions")
    if (getattr(hf, "moe_layer_freq", None) or 1) != 1:
        bad.append(f"moe_layer_freq={hf.moe_layer_freq}: sparse layers must follow each other; choose a model with 1")
    method = getattr(hf, "topk_method", None) or "noaux_tc"
    if method != "noaux_tc":
        bad.append(f"topk_method={method!r}: the router must be noaux_tc, with a correction bias")
    if hf.tie_word_embeddings and (getattr(hf, "num_nextn_predict_layers", 0) or 0):
        bad.append("tied embeddings with draft layers are not covered; set num_nextn_predict_layers=0")
    if cache_scales_of(hf):
        bad.append("kv_cache_scheme: scales are held of plain attention alone; remove it")
    return bad + quantization_of(hf)[1]


def _untrained(shape: ModelShape) -> list[str]:
    """Routers that Megatron-Core computes otherwise than the checkpoint's model."""
    assert shape.router is not None
    bad = []
    if not shape.top_k_renormalized and shape.experts_per_token > 1:
        bad.append("norm_topk_prob=false: Megatron's sigmoid router always renormalizes; choose a model with true")
    groups, top = shape.router.num_groups, shape.router.top_groups
    if groups > 1 and shape.experts_per_token != 2 * top:
        bad.append(
            f"num_experts_per_tok={shape.experts_per_token} with topk_group={top}: the model ranks groups by their two "
            f"best experts, Megatron by num_experts_per_tok / topk_group of them; they must be equal"
        )
    return bad


def _nothing(shape: ModelShape) -> frozenset[str]:
    return frozenset()


def _float32(fqn: str) -> bool:
    return fqn.endswith(".e_score_correction_bias")


DEEPSEEK = Family(_read, _tensors, _rule, _weights, _nothing, _float32, _untrained)
