"""Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nemo_rl.trainer.families.base import (
    Box,
    Family,
    Shape,
    Weight,
    end_weights,
    expert_weights,
    gate_up,
    mlp_tensors,
    mlp_weights,
    qkv,
    vocabulary,
    whole,
)
from nemo_rl.trainer.shape import (
    ModelShape,
    UnsupportedModel,
    architecture_of,
    cache_scales_of,
    quantization_of,
    rope_of,
)

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


def _rule(shape: ModelShape, key: str, size: Shape) -> list[Box] | None:
    if key in _VOCABULARY:
        return [vocabulary(_VOCABULARY[key], shape, size)]
    if key == "decoder.final_layernorm.weight":
        return [whole("model.norm.weight", size)]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
    if layer is None:
        return None
    prefix, name = f"model.layers.{layer[1]}.", layer[2]
    if name in _PLAIN:
        return [whole(prefix + _PLAIN[name], size)]
    scale = re.fullmatch(r"self_attention\.core_attention\.([kvq])_scale", name)
    if scale is not None and scale[1] in shape.cache_scales:
        return [whole(f"{prefix}self_attn.{scale[1]}_scale", size)]
    if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return qkv(shape, prefix + "self_attn.", name.rsplit(".", 1)[1], size)
    expert = re.fullmatch(r"mlp\.experts\.experts\.(\d+)\.(.+)", name)
    if expert is not None:
        prefix, name = f"{prefix}mlp.experts.{expert[1]}.", expert[2]
    elif name.startswith("mlp.shared_experts."):
        prefix, name = f"{prefix}mlp.shared_expert.", name.removeprefix("mlp.shared_experts.")
    else:
        prefix, name = f"{prefix}mlp.", name.removeprefix("mlp.")
    if expert is not None and name == "linear_fc2.weight":
        return [whole(prefix + "down_proj.weight", size)]
    return gate_up(prefix, name, size)


def _weights(shape: ModelShape, padded: int) -> Iterator[Weight]:
    yield from end_weights(shape, padded)
    hidden = shape.hidden_size
    for layer, sparse in enumerate(shape.sparse_layers):
        at = f"decoder.layers.{layer}."
        yield from _attention_weights(shape, f"{at}self_attention.", layer)
        if not sparse:
            yield Weight(f"{at}mlp.linear_fc1.layer_norm_weight", (hidden,), layer)
            yield from mlp_weights(f"{at}mlp.", hidden, shape.ffn_size, layer)
            continue
        yield Weight(f"{at}pre_mlp_layernorm.weight", (hidden,), layer)
        yield Weight(f"{at}mlp.router.weight", (shape.num_experts, hidden), layer)
        yield from expert_weights(shape, f"{at}mlp.", layer)
        if shape.shared_ffn_size:
            yield from mlp_weights(f"{at}mlp.shared_experts.", hidden, shape.shared_ffn_size, layer)
            yield Weight(f"{at}mlp.shared_experts.gate_weight", (1, hidden), layer)


def _attention_weights(shape: ModelShape, prefix: str, layer: int) -> Iterator[Weight]:
    hidden = shape.hidden_size
    yield Weight(f"{prefix}linear_qkv.layer_norm_weight", (hidden,), layer)
    yield Weight(f"{prefix}linear_qkv.weight", (shape.qkv_rows, hidden), layer, 0)
    if shape.qkv_bias:
        yield Weight(f"{prefix}linear_qkv.bias", (shape.qkv_rows,), layer, 0)
    yield Weight(f"{prefix}linear_proj.weight", (hidden, shape.num_heads * shape.head_dim), layer, 1)
    if shape.qk_norm:
        for name in "qk":
            yield Weight(f"{prefix}{name}_layernorm.weight", (shape.head_dim,), layer)
    for kind in shape.cache_scales:
        yield Weight(f"{prefix}core_attention.{kind}_scale", (1,), layer)


def _tensors(shape: ModelShape) -> dict[str, Shape]:
    hidden, query, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    out: dict[str, Shape] = {"model.embed_tokens.weight": (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = (shape.vocab_size, hidden)
    for index, sparse in enumerate(shape.sparse_layers):
        layer = f"model.layers.{index}."
        out |= {f"{layer}{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, count in (("q", query), ("k", kv), ("v", kv)):
            out[f"{layer}self_attn.{name}_proj.weight"] = (count, hidden)
            if shape.qkv_bias:
                out[f"{layer}self_attn.{name}_proj.bias"] = (count,)
        out[f"{layer}self_attn.o_proj.weight"] = (hidden, query)
        if shape.qk_norm:
            out |= {f"{layer}self_attn.{n}_norm.weight": (shape.head_dim,) for n in "qk"}
        out |= {f"{layer}self_attn.{kind}_scale": (1,) for kind in shape.cache_scales}
        mlp = f"{layer}mlp."
        out |= _sparse_mlp(shape, mlp) if sparse else mlp_tensors(mlp, hidden, shape.ffn_size)
    return out


def _sparse_mlp(shape: ModelShape, prefix: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {f"{prefix}gate.weight": (shape.num_experts, shape.hidden_size)}
    for expert in range(shape.num_experts):
        out |= mlp_tensors(f"{prefix}experts.{expert}.", shape.hidden_size, shape.expert_ffn_size)
    if shape.shared_ffn_size:
        out |= mlp_tensors(f"{prefix}shared_expert.", shape.hidden_size, shape.shared_ffn_size)
        out[f"{prefix}shared_expert_gate.weight"] = (1, shape.hidden_size)
    return out


def _droppable(shape: ModelShape) -> frozenset[str]:
    """A tied model's `lm_head` is the embedding; some checkpoints store it twice. An export may hold cache scales."""
    scales = {f"model.layers.{i}.self_attn.{kind}_scale" for i in range(shape.num_layers) for kind in "kvq"}
    return frozenset(scales | ({"lm_head.weight"} if shape.tied_embeddings else set()))


def _float32(fqn: str) -> bool:
    return fqn.endswith("_scale")


def _read(hf: Any) -> ModelShape:
    """Shape of a Qwen2, Qwen2-MoE, Qwen3 or Qwen3-MoE configuration.

    Raises:
        UnsupportedModel: it asks for what the rule or the builder does not do; all of it at once.
    """
    name = architecture_of(hf)
    bad = _unsupported(hf)
    if bad:
        raise UnsupportedModel([f"{name}: {text}" for text in bad])
    qwen2, moe = name.startswith("Qwen2"), "Moe" in name
    layers, heads = hf.num_hidden_layers, hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    return ModelShape(
        architecture=name,
        num_layers=layers,
        hidden_size=hf.hidden_size,
        num_heads=heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        rope_theta=rope_of(hf)[1],
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=bool(getattr(hf, "qkv_bias", True)) if qwen2 else False,
        qk_norm=not qwen2,
        sparse_layers=_sparse_layers(hf) if moe else (False,) * layers,
        num_experts=hf.num_experts if moe else 0,
        experts_per_token=hf.num_experts_per_tok if moe else 0,
        expert_ffn_size=hf.moe_intermediate_size if moe else 0,
        shared_ffn_size=hf.shared_expert_intermediate_size if moe and qwen2 else 0,
        top_k_renormalized=bool(hf.norm_topk_prob) if moe else True,
        fp8=quantization_of(hf)[0],
        cache_scales=cache_scales_of(hf),
    )


def _sparse_layers(hf: Any) -> tuple[bool, ...]:
    dense = set(hf.mlp_only_layers or [])
    step = hf.decoder_sparse_step
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(hf.num_hidden_layers))


def _unsupported(hf: Any) -> list[str]:
    bad = []
    if hf.hidden_act != "silu":
        bad.append(f"hidden_act={hf.hidden_act!r} is not silu; choose a model with a gated silu MLP")
    if getattr(hf, "use_sliding_window", False):
        bad.append("use_sliding_window=true is not trained here; set it to false where contexts are short enough")
    if getattr(hf, "attention_bias", False):
        bad.append("attention_bias=true is not covered by the family rule; choose a model without it")
    if rope_of(hf)[0] != "default":
        bad.append(
            f"rope_type={rope_of(hf)[0]!r} is not trained here; remove rope_scaling where contexts are short enough"
        )
    if getattr(hf, "num_experts", 0) and hf.num_experts_per_tok == 1 and hf.norm_topk_prob:
        bad.append(
            "num_experts_per_tok=1 with norm_topk_prob=true has no gradient to the router; set norm_topk_prob=false"
        )
    return bad + quantization_of(hf)[1]


QWEN = Family(_read, _tensors, _rule, _weights, _droppable, _float32)
