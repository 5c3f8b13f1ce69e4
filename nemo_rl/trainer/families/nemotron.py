"""NemotronH: Mamba2 mixers, attention, squared-ReLU MLPs and mixtures of experts, one to a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from nemo_rl.trainer.families.base import Box, Family, Shape, Weight, end_weights, qkv, rows, vocabulary, whole
from nemo_rl.trainer.shape import (
    Hybrid,
    ModelShape,
    Router,
    UnsupportedModel,
    architecture_of,
    cache_scales_of,
    quantization_of,
    rope_of,
)

_ENDS = {"embedding.word_embeddings.weight": "backbone.embeddings.weight", "output_layer.weight": "lm_head.weight"}

_PLAIN = {
    **dict.fromkeys(
        (
            "norm.weight",
            "input_layernorm.weight",
            "pre_mlp_layernorm.weight",
            # Transformer Engine fuses the norm with the layer behind it.
            "mixer.in_proj.layer_norm_weight",
            "self_attention.linear_qkv.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",
        ),
        "norm.weight",
    ),
    **{f"mixer.{n}": f"mixer.{n}" for n in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")},
    "self_attention.linear_proj.weight": "mixer.o_proj.weight",
    "mlp.linear_fc1.weight": "mixer.up_proj.weight",
    "mlp.linear_fc2.weight": "mixer.down_proj.weight",
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
    "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
    "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
}
"""Layer tensors that are one Hugging Face tensor whole."""

_EXPERT = {"linear_fc1.weight": "up_proj.weight", "linear_fc2.weight": "down_proj.weight"}


def _rule(shape: ModelShape, key: str, size: Shape) -> list[Box] | None:
    if key in _ENDS:
        return [vocabulary(_ENDS[key], shape, size)]
    if key == "decoder.final_norm.weight":
        return [whole("backbone.norm_f.weight", size)]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
    if layer is None:
        return None
    prefix, name = f"backbone.layers.{layer[1]}.", layer[2]
    if name in _PLAIN:
        return [whole(prefix + _PLAIN[name], size)]
    if name == "self_attention.linear_qkv.weight":
        return qkv(shape, f"{prefix}mixer.", "weight", size)
    expert = re.fullmatch(r"mlp\.experts\.experts\.(\d+)\.(.+)", name)
    if expert is not None and expert[2] in _EXPERT:
        return [whole(f"{prefix}mixer.experts.{expert[1]}.{_EXPERT[expert[2]]}", size)]
    part = re.fullmatch(r"mixer\.(in_proj\.weight|conv1d\.weight|conv1d\.bias)\.(\w+)", name)
    return None if part is None else _part(shape, f"{prefix}mixer.{part[1]}", part[2], size)


def _part(shape: ModelShape, fqn: str, name: str, size: Shape) -> list[Box] | None:
    """Rows of one part of a projection that Megatron holds in parts, for each rank has its share of every part."""
    assert shape.hybrid is not None
    parts = shape.hybrid.in_proj_parts if fqn.endswith("in_proj.weight") else shape.hybrid.conv_parts
    starts = dict(zip(parts, (0, *accumulate(parts.values())), strict=False))
    if parts.get(name) != size[0]:
        return None
    box = rows(fqn, 0, starts[name], size[0], size[1:])
    return [Box(fqn, box.source, box.region, partial=True)]


def _weights(shape: ModelShape, padded: int) -> Iterator[Weight]:
    assert shape.hybrid is not None
    yield from end_weights(shape, padded, "decoder.final_norm.weight")
    kinds = {"M": _mamba_weights, "*": _attention_weights, "-": _mlp_weights, "E": _expert_weights}
    for layer, kind in enumerate(shape.hybrid.pattern):
        yield from kinds[kind](shape, f"decoder.layers.{layer}.", layer)


def _mamba_weights(shape: ModelShape, at: str, layer: int) -> Iterator[Weight]:
    assert shape.hybrid is not None
    mixer, hidden = shape.hybrid, shape.hidden_size
    yield Weight(f"{at}norm.weight", (hidden,), layer)
    for name, count in mixer.in_proj_parts.items():
        yield Weight(f"{at}mixer.in_proj.weight.{name}", (count, hidden), layer, 0)
    for name, count in mixer.conv_parts.items():
        yield Weight(f"{at}mixer.conv1d.weight.{name}", (count, 1, mixer.conv_width), layer, 0)
        yield Weight(f"{at}mixer.conv1d.bias.{name}", (count,), layer, 0)
    yield from (Weight(f"{at}mixer.{name}", (mixer.num_heads,), layer, 0) for name in ("A_log", "D", "dt_bias"))
    yield Weight(f"{at}mixer.norm.weight", (mixer.inner_size,), layer, 0)
    yield Weight(f"{at}mixer.out_proj.weight", (hidden, mixer.inner_size), layer, 1)


def _attention_weights(shape: ModelShape, at: str, layer: int) -> Iterator[Weight]:
    hidden = shape.hidden_size
    yield Weight(f"{at}input_layernorm.weight", (hidden,), layer)
    yield Weight(f"{at}self_attention.linear_qkv.weight", (shape.qkv_rows, hidden), layer, 0)
    yield Weight(f"{at}self_attention.linear_proj.weight", (hidden, shape.num_heads * shape.head_dim), layer, 1)


def _mlp_weights(shape: ModelShape, at: str, layer: int) -> Iterator[Weight]:
    yield Weight(f"{at}pre_mlp_layernorm.weight", (shape.hidden_size,), layer)
    yield from _two(f"{at}mlp.", shape.hidden_size, shape.ffn_size, layer)


def _expert_weights(shape: ModelShape, at: str, layer: int) -> Iterator[Weight]:
    assert shape.hybrid is not None
    hidden, latent, at_mlp = shape.hidden_size, shape.hybrid.expert_latent_size, f"{at}mlp."
    yield Weight(f"{at}pre_mlp_layernorm.weight", (hidden,), layer)
    yield Weight(f"{at_mlp}router.weight", (shape.num_experts, hidden), layer)
    yield Weight(f"{at_mlp}router.expert_bias", (shape.num_experts,), layer)
    if latent:
        yield Weight(f"{at_mlp}fc1_latent_proj.weight", (latent, hidden), layer)
        yield Weight(f"{at_mlp}fc2_latent_proj.weight", (hidden, latent), layer)
    for expert in range(shape.num_experts):
        yield from _two(f"{at_mlp}experts.experts.{expert}.", latent or hidden, shape.expert_ffn_size, layer, expert)
    if shape.shared_ffn_size:
        yield from _two(f"{at_mlp}shared_experts.", hidden, shape.shared_ffn_size, layer)


def _two(prefix: str, hidden: int, width: int, layer: int, expert: int | None = None) -> Iterator[Weight]:
    """An MLP that is not gated."""
    yield Weight(f"{prefix}linear_fc1.weight", (width, hidden), layer, 0, expert)
    yield Weight(f"{prefix}linear_fc2.weight", (hidden, width), layer, 1, expert)


def _tensors(shape: ModelShape) -> dict[str, Shape]:
    assert shape.hybrid is not None
    words = (shape.vocab_size, shape.hidden_size)
    out: dict[str, Shape] = {"backbone.embeddings.weight": words, "backbone.norm_f.weight": (shape.hidden_size,)}
    if not shape.tied_embeddings:
        out["lm_head.weight"] = words
    kinds = {"M": _mamba_tensors, "*": _attention_tensors, "-": _mlp_tensors, "E": _expert_tensors}
    for layer, kind in enumerate(shape.hybrid.pattern):
        at = f"backbone.layers.{layer}."
        out[f"{at}norm.weight"] = (shape.hidden_size,)
        out |= {f"{at}mixer.{name}": size for name, size in kinds[kind](shape).items()}
    return out


def _mamba_tensors(shape: ModelShape) -> dict[str, Shape]:
    assert shape.hybrid is not None
    mixer, convolved = shape.hybrid, sum(shape.hybrid.conv_parts.values())
    return {
        "in_proj.weight": (sum(mixer.in_proj_parts.values()), shape.hidden_size),
        "conv1d.weight": (convolved, 1, mixer.conv_width),
        "conv1d.bias": (convolved,),
        **{name: (mixer.num_heads,) for name in ("A_log", "D", "dt_bias")},
        "norm.weight": (mixer.inner_size,),
        "out_proj.weight": (shape.hidden_size, mixer.inner_size),
    }


def _attention_tensors(shape: ModelShape) -> dict[str, Shape]:
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {f"{n}_proj.weight": (r, shape.hidden_size) for n, r in (("q", query), ("k", kv), ("v", kv))}
    return {**sizes, "o_proj.weight": (shape.hidden_size, query)}


def _mlp_tensors(shape: ModelShape) -> dict[str, Shape]:
    return _up_down("", shape.hidden_size, shape.ffn_size)


def _expert_tensors(shape: ModelShape) -> dict[str, Shape]:
    assert shape.hybrid is not None
    hidden, latent = shape.hidden_size, shape.hybrid.expert_latent_size
    out: dict[str, Shape] = {"gate.weight": (shape.num_experts, hidden)}
    out["gate.e_score_correction_bias"] = (shape.num_experts,)
    if latent:
        out |= {"fc1_latent_proj.weight": (latent, hidden), "fc2_latent_proj.weight": (hidden, latent)}
    for expert in range(shape.num_experts):
        out |= _up_down(f"experts.{expert}.", latent or hidden, shape.expert_ffn_size)
    return out | (_up_down("shared_experts.", hidden, shape.shared_ffn_size) if shape.shared_ffn_size else {})


def _up_down(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {f"{prefix}up_proj.weight": (width, hidden), f"{prefix}down_proj.weight": (hidden, width)}


def _read(hf: Any) -> ModelShape:
    """Shape of a NemotronH configuration. Raises UnsupportedModel with everything that the rule does not cover."""
    name = architecture_of(hf)
    bad = _unsupported(hf)
    if bad:
        raise UnsupportedModel([f"{name}: {text}" for text in bad])
    pattern = hf.hybrid_override_pattern
    sparse = "E" in pattern
    return ModelShape(
        architecture=name,
        num_layers=len(pattern),
        hidden_size=hf.hidden_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
        ffn_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        rope_theta=rope_of(hf)[1],
        norm_eps=hf.layer_norm_epsilon,
        tied_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=False,
        qk_norm=False,
        sparse_layers=tuple(kind == "E" for kind in pattern),
        num_experts=hf.n_routed_experts if sparse else 0,
        experts_per_token=hf.num_experts_per_tok if sparse else 0,
        expert_ffn_size=hf.moe_intermediate_size if sparse else 0,
        shared_ffn_size=(hf.n_shared_experts or 0) * hf.moe_shared_expert_intermediate_size if sparse else 0,
        top_k_renormalized=bool(hf.norm_topk_prob),
        router=Router(hf.n_group or 1, hf.topk_group or 1, float(hf.routed_scaling_factor)) if sparse else None,
        hybrid=Hybrid(
            pattern,
            hf.mamba_num_heads,
            hf.mamba_head_dim,
            hf.n_groups,
            hf.ssm_state_size,
            hf.conv_kernel,
            getattr(hf, "moe_latent_size", None) or 0,
        ),
        fp8=quantization_of(hf)[0],
    )


def _unsupported(hf: Any) -> list[str]:
    bad = [
        f"{key}={getattr(hf, key)!r} is not covered by the family rule; choose a model with {wanted!r}"
        for key, wanted in {
            "mlp_hidden_act": "relu2",
            "attention_bias": False,
            "mlp_bias": False,
            "mamba_proj_bias": False,
            "use_bias": False,
            "use_conv_bias": True,
        }.items()
        if getattr(hf, key) != wanted
    ]
    if getattr(hf, "num_nextn_predict_layers", 0):
        bad.append("draft layers are not covered by the family rule; set num_nextn_predict_layers=0")
    if cache_scales_of(hf):
        bad.append("kv_cache_scheme: scales are held of plain attention alone; remove it")
    return bad + quantization_of(hf)[1]


def _untrained(shape: ModelShape) -> list[str]:
    return ["Mamba2 mixers need kernels that the trainer does not bring; choose a model without them"]


def _nothing(shape: ModelShape) -> frozenset[str]:
    return frozenset()


def _float32(fqn: str) -> bool:
    return fqn.endswith(".e_score_correction_bias")


NEMOTRON = Family(_read, _tensors, _rule, _weights, _nothing, _float32, _untrained)
