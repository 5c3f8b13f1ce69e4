"""Tiny members of every model family: configuration folders, and the tensors that a checkpoint of each holds.

Nothing here knows vLLM or Megatron. Sizes are small and odd on purpose: vocabularies that no number of ranks divides,
fewer key heads than ranks. Names and shapes are those of public checkpoints of the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_rl.refit.layout import TensorMeta, TensorTable, natural_order

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_DENSE: Config = {
    "vocab_size": 130,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN3: Config = {**_DENSE, "head_dim": 32, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_QWEN2: Config = {**_DENSE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3_MOE: Config = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_DEEPSEEK: Config = {
    **_DENSE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
_NEMOTRON_H: Config = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 130,
    "hidden_size": 64,
    "hybrid_override_pattern": "ME*-ME",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "mlp_hidden_act": "relu2",
    "max_position_embeddings": 128,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "n_groups": 4,
    "conv_kernel": 4,
    "expand": 2,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 96,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_GPT_OSS: Config = {
    **_DENSE,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_BLOCK = 128
_FP8_BLOCKS: Config = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [_BLOCK, _BLOCK],
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(3))],
}
FP8_CACHE: Config = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}
CONFIGS: Mapping[str, Config] = {
    "qwen3": _QWEN3,
    "qwen3_tied": {**_QWEN3, "tie_word_embeddings": True},
    "qwen2_bias": _QWEN2,
    "qwen3_moe": _QWEN3_MOE,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v3_no_q_lora": {**_DEEPSEEK, "q_lora_rank": None},
    "deepseek_mtp": {**_DEEPSEEK, "num_hidden_layers": 2, "num_nextn_predict_layers": 1},
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_latent": {**_NEMOTRON_H, "moe_latent_size": 48, "n_groups": 1},
    "stacked_experts": _QWEN3_MOE,
    "gpt_oss": _GPT_OSS,
    "block_fp8": {
        **_QWEN3_MOE,
        "hidden_size": 256,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 256,
        "quantization_config": _FP8_BLOCKS,
    },
    "fp8_kv_scales": {**_QWEN3, "quantization_config": FP8_CACHE},
}
"""Family -> its `config.json`."""


def _writer(config: Config) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    return write


FAMILIES: Mapping[str, Callable[[Path], None]] = {name: _writer(config) for name, config in CONFIGS.items()}
"""Family -> writes its `config.json` into a folder."""


def checkpoint_table(name: str) -> TensorTable:
    """What a checkpoint of the family holds: every name with its shape and dtype, in natural order."""
    config = CONFIGS[name]
    shapes = _RULES[str(config["model_type"])](config)
    if name == "stacked_experts":
        shapes = _stacked(shapes, int(config["num_experts"]))
    table = {fqn: TensorMeta(shape, _dtype(fqn)) for fqn, shape in shapes.items()}
    if name == "block_fp8":
        table = _in_fp8_blocks(table)
    if name == "fp8_kv_scales":
        for layer in range(config["num_hidden_layers"]):
            for scale in "qkv":
                table[f"model.layers.{layer}.self_attn.{scale}_scale"] = TensorMeta((1,), torch.float32)
    return {fqn: table[fqn] for fqn in natural_order(table)}


def random_tensors(table: TensorTable, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for every tensor of `table`: normal numbers, rounded to its dtype; scales are positive."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for fqn, meta in table.items():
        value = torch.randn(meta.shape, generator=generator)
        values[fqn] = (value.abs() + 0.1 if "scale" in fqn else value).to(meta.dtype)
    return values


def _dtype(fqn: str) -> torch.dtype:
    return torch.float32 if fqn.endswith("e_score_correction_bias") else torch.bfloat16


# ---- shapes of one family each


def _ends(config: Config) -> Shapes:
    embed = (config["vocab_size"], config["hidden_size"])
    ends: Shapes = {"model.embed_tokens.weight": embed, "model.norm.weight": embed[1:]}
    return ends if config["tie_word_embeddings"] else ends | {"lm_head.weight": embed}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _mlp(hidden: int, ffn: int, gated: bool = True) -> Shapes:
    up: Shapes = {"up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn)}
    return ({"gate_proj.weight": (ffn, hidden)} if gated else {}) | up


def _norms(hidden: int) -> Shapes:
    return {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _attention(config: Config, bias: bool = False, norms: bool = False) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    rows = {"q": heads * dim, "k": config["num_key_value_heads"] * dim, "v": config["num_key_value_heads"] * dim}
    shapes: Shapes = {f"{p}_proj.weight": (n, hidden) for p, n in rows.items()}
    shapes["o_proj.weight"] = (hidden, heads * dim)
    if bias:
        shapes |= {f"{p}_proj.bias": (n,) for p, n in rows.items()}
    return shapes | ({"q_norm.weight": (dim,), "k_norm.weight": (dim,)} if norms else {})


def _qwen(config: Config) -> Shapes:
    hidden, kind = config["hidden_size"], config["model_type"]
    shapes = _ends(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= _under(at, _norms(hidden))
        shapes |= _under(f"{at}.self_attn", _attention(config, bias=kind == "qwen2", norms=kind != "qwen2"))
        if kind != "qwen3_moe":
            shapes |= _under(f"{at}.mlp", _mlp(hidden, config["intermediate_size"]))
            continue
        shapes[f"{at}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            shapes |= _under(f"{at}.mlp.experts.{expert}", _mlp(hidden, config["moe_intermediate_size"]))
    return shapes


def _mla(config: Config) -> Shapes:
    hidden, heads, rank, kv_rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query: Shapes = {"q_proj.weight": (heads * (nope + rope), hidden)}
    if rank is not None:
        query = {"q_a_proj.weight": (rank, hidden), "q_a_layernorm.weight": (rank,)}
        query["q_b_proj.weight"] = (heads * (nope + rope), rank)
    return query | {
        "kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (nope + value), kv_rank),
        "o_proj.weight": (hidden, heads * value),
    }


def _deepseek(config: Config) -> Shapes:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    shapes = _ends(config)
    for layer in range(layers + config["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        shapes |= _under(at, _norms(hidden)) | _under(f"{at}.self_attn", _mla(config))
        if layer < config["first_k_dense_replace"]:
            shapes |= _under(f"{at}.mlp", _mlp(hidden, config["intermediate_size"]))
        else:
            shapes |= _under(f"{at}.mlp", _deepseek_moe(config))
        if layer >= layers:
            embed = (config["vocab_size"], hidden)
            head: Shapes = {"embed_tokens.weight": embed, "shared_head.head.weight": embed}
            head |= {f"{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
            shapes |= _under(at, head | {"eh_proj.weight": (hidden, 2 * hidden)})
    return shapes


def _deepseek_moe(config: Config) -> Shapes:
    hidden, ffn, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes: Shapes = {"gate.weight": (experts, hidden), "gate.e_score_correction_bias": (experts,)}
    shapes |= _under("shared_experts", _mlp(hidden, ffn * config["n_shared_experts"]))
    for expert in range(experts):
        shapes |= _under(f"experts.{expert}", _mlp(hidden, ffn))
    return shapes


def _nemotron_h(config: Config) -> Shapes:
    hidden = config["hidden_size"]
    embed = (config["vocab_size"], hidden)
    shapes: Shapes = {"backbone.embeddings.weight": embed, "backbone.norm_f.weight": embed[1:], "lm_head.weight": embed}
    for layer, kind in enumerate(config["hybrid_override_pattern"]):
        at = f"backbone.layers.{layer}"
        shapes[f"{at}.norm.weight"] = (hidden,)
        shapes |= _under(f"{at}.mixer", _NEMOTRON_MIXERS[kind](config))
    return shapes


def _mamba2(config: Config) -> Shapes:
    hidden, heads = config["hidden_size"], config["mamba_num_heads"]
    inner, groups = heads * config["mamba_head_dim"], 2 * config["n_groups"] * config["ssm_state_size"]
    return {
        "in_proj.weight": (2 * inner + groups + heads, hidden),
        "conv1d.weight": (inner + groups, 1, config["conv_kernel"]),
        "conv1d.bias": (inner + groups,),
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def _nemotron_moe(config: Config) -> Shapes:
    hidden, latent, experts = config["hidden_size"], config.get("moe_latent_size"), config["n_routed_experts"]
    shapes: Shapes = {"gate.weight": (experts, hidden), "gate.e_score_correction_bias": (experts,)}
    shapes |= _under("shared_experts", _mlp(hidden, config["moe_shared_expert_intermediate_size"], gated=False))
    if latent:
        shapes |= {"fc1_latent_proj.weight": (latent, hidden), "fc2_latent_proj.weight": (hidden, latent)}
    for expert in range(experts):
        shapes |= _under(f"experts.{expert}", _mlp(latent or hidden, config["moe_intermediate_size"], gated=False))
    return shapes


def _gpt_oss(config: Config) -> Shapes:
    """Experts are stacked the other way round: (experts, inputs, outputs), gate and up rows in turns."""
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = _ends(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= _under(at, _norms(hidden)) | _under(f"{at}.self_attn", _attention(config, bias=True))
        shapes[f"{at}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{at}.self_attn.sinks"] = (config["num_attention_heads"],)
        moe: Shapes = {"router.weight": (experts, hidden), "router.bias": (experts,)}
        moe |= {"experts.gate_up_proj": (experts, hidden, 2 * ffn), "experts.gate_up_proj_bias": (experts, 2 * ffn)}
        moe |= {"experts.down_proj": (experts, ffn, hidden), "experts.down_proj_bias": (experts, hidden)}
        shapes |= _under(f"{at}.mlp", moe)
    return shapes


_NEMOTRON_MIXERS: Mapping[str, Callable[[Config], Shapes]] = {
    "M": _mamba2,
    "E": _nemotron_moe,
    "*": _attention,
    "-": lambda config: _mlp(config["hidden_size"], config["intermediate_size"], gated=False),
}
_RULES: Mapping[str, Callable[[Config], Shapes]] = {
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "nemotron_h": _nemotron_h,
}


# ---- forms of a checkpoint


def _stacked(shapes: Shapes, experts: int) -> Shapes:
    """Experts as 3-D tensors: `gate_up_proj` (experts, 2 x ffn, hidden), `down_proj` (experts, hidden, ffn)."""
    out: Shapes = {}
    for fqn, shape in shapes.items():
        before, found, after = fqn.partition(".experts.")
        if not found:
            out[fqn] = shape
        elif after == "0.gate_proj.weight":
            out[f"{before}.experts.gate_up_proj"] = (experts, 2 * shape[0], shape[1])
        elif after == "0.down_proj.weight":
            out[f"{before}.experts.down_proj"] = (experts, *shape)
    return out


def _in_fp8_blocks(table: TensorTable) -> TensorTable:
    """Every projection as float8 with one float32 scale for a block of 128 x 128."""
    out: TensorTable = {}
    for fqn, meta in table.items():
        out[fqn] = meta
        if "_proj." in fqn:
            blocks = tuple(-(-n // _BLOCK) for n in meta.shape)
            out[fqn] = TensorMeta(meta.shape, torch.float8_e4m3fn)
            out[f"{fqn}_scale_inv"] = TensorMeta(blocks, torch.float32)
    return out
