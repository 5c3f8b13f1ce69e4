"""Tiny random Hugging Face models, and what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    NemotronHConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    dtype="float32",
)
LATENT: dict[str, Any] = dict(
    moe_intermediate_size=48,
    num_experts_per_tok=4,
    n_shared_experts=1,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    first_k_dense_replace=1,
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    num_key_value_heads=4,
    num_nextn_predict_layers=0,
)
HYBRID: dict[str, Any] = dict(
    hybrid_override_pattern="ME*-ME",
    head_dim=32,
    mlp_hidden_act="relu2",
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_groups=4,
    ssm_state_size=16,
    conv_kernel=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    moe_shared_expert_intermediate_size=80,
)
EXPERTS: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)


def make_config(kind: str, **changes: Any) -> PretrainedConfig:
    """`dense` (Qwen3), `moe` (Qwen3-MoE, the middle layer dense), `biased` (Qwen2, tied), `shared` (Qwen2-MoE)
    `latent` (DeepSeek-V3, the first layer dense) `stretched` (the same with yarn
    positions) or `hybrid` (NemotronH)."""
    if kind == "dense":
        return _named(Qwen3Config(**{**SIZES, "head_dim": 32, **changes}), "Qwen3ForCausalLM")
    if kind == "moe":
        sizes = {**SIZES, **EXPERTS, "head_dim": 32, "norm_topk_prob": True, "mlp_only_layers": [1]}
        return _named(Qwen3MoeConfig(**{**sizes, **changes}), "Qwen3MoeForCausalLM")
    if kind == "biased":
        sizes = {**SIZES, "vocab_size": 127, "num_key_value_heads": 1, "tie_word_embeddings": True}
        return _named(Qwen2Config(**{**sizes, **changes}), "Qwen2ForCausalLM")
    if kind == "latent":
        return _named(DeepseekV3Config(**{**SIZES, **LATENT, **changes}), "DeepseekV3ForCausalLM")
    if kind == "stretched":
        stretched = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
        stretched |= dict(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
        sizes = {"q_lora_rank": None, "rope_parameters": stretched, "n_group": 1, "topk_group": 1}
        return make_config("latent", **{**sizes, **changes})
    if kind == "hybrid":
        return _named(NemotronHConfig(**{**SIZES, **HYBRID, **changes}), "NemotronHForCausalLM")
    assert kind == "shared", kind
    sizes = {**SIZES, **EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 80}
    return _named(Qwen2MoeConfig(**{**sizes, **changes}), "Qwen2MoeForCausalLM")


def _named(config: PretrainedConfig, architecture: str) -> PretrainedConfig:
    config.architectures = [architecture]
    return config


def make_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A model whose norms and biases are random too: a missing one would show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05))
            if "norm" in name:
                parameter += 1.0
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def token_batch(rows: int, length: int, vocab_size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids `[rows, length]`, and a mask of the tokens that count."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, length), generator=rng)
    mask = torch.ones(rows, length)
    for row in range(rows):
        end = length - 2 * row % (length // 2)
        ids[row, end:], mask[row, end:] = 0, 0.0
    mask[:, :2] = 0.0
    return ids, mask


def save_reference(
    rank: int, meet: str, kind: str, changes: dict[str, Any], folder: str, rows: int, length: int
) -> str:
    """In a child: save a model to `folder`, and beside it `reference.pt` with what transformers computes.

    `loss` is the mean cross-entropy over the mask; `grads` its gradients by checkpoint name.
    """
    config = make_config(kind, **changes)
    model = make_model(config)
    model.save_pretrained(folder)
    (Path(folder) / "tokenizer.json").write_text("{}")
    ids, mask = token_batch(rows, length, config.vocab_size)
    logits = model(ids).logits
    logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))
    loss = -(logprobs * mask).sum() / mask.sum()
    loss.backward()
    said = dict(ids=ids, mask=mask, logits=logits.detach(), logprobs=logprobs.detach(), loss=loss.item())
    torch.save({**said, "grads": _by_checkpoint_name(model)}, Path(folder) / "reference.pt")
    return folder


def _by_checkpoint_name(model: Any) -> dict[str, torch.Tensor]:
    """Gradients under the names of the files, where experts stand one by one."""
    out = {}
    for name, parameter in model.named_parameters():
        prefix, _, last = name.rpartition(".")
        for expert in range(parameter.shape[0] if prefix.endswith("experts") else 0):
            part = parameter.grad[expert]
            if last == "gate_up_proj":
                gate, up = part.chunk(2, 0)
                out |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
            else:
                out[f"{prefix}.{expert}.{last}.weight"] = part
        if not prefix.endswith("experts"):
            out[name] = parameter.grad
    return out


def logits_of(rank: int, meet: str, folder: str, ids: torch.Tensor) -> torch.Tensor:
    """In a child: logits that transformers computes with the checkpoint in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        return model(ids).logits


def caches_of(rank: int, meet: str, folder: str) -> dict[str, float]:
    """In a child: the largest magnitude in each layer's cache of keys and of values, under the names of their scales.

    `reference.pt` has the tokens, padding among them.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        cache = model(torch.load(Path(folder) / "reference.pt")["ids"], use_cache=True).past_key_values
    at = "model.layers.{}.self_attn.{}_scale"
    keys = {at.format(i, "k"): float(layer.keys.abs().max()) for i, layer in enumerate(cache.layers)}
    return keys | {at.format(i, "v"): float(layer.values.abs().max()) for i, layer in enumerate(cache.layers)}
