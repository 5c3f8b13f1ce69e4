"""The numbers of a decoder-only transformer, as read from a Hugging Face configuration. No Megatron, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a family rule and the model builder need to know.

    Attributes:
        architecture: name of the Hugging Face model class.
        sparse_layers: for each layer, whether its MLP is a mixture of experts.
        ffn_size: width of a dense layer's MLP.
        expert_ffn_size, shared_ffn_size: width of an expert and of the shared expert; 0 where there is none.
        top_k_renormalized: the chosen experts' weights add up to 1.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    sparse_layers: tuple[bool, ...]
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    top_k_renormalized: bool = True

    @property
    def is_moe(self) -> bool:
        return any(self.sparse_layers)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class UnsupportedModel(ValueError):
    """A Hugging Face configuration that no family rule covers; `violations` says everything that is not."""

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(violations))


def read_qwen(hf: Any) -> ModelShape:
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
        rope_theta=_rope(hf)[1],
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
    )


def architecture_of(hf: Any) -> str:
    """The model class that a configuration names. Raises UnsupportedModel where it names none or several."""
    names = list(getattr(hf, "architectures", None) or [])
    if len(names) != 1:
        raise UnsupportedModel([f"config.json names architectures {names}; it must name exactly one"])
    return str(names[0])


def _sparse_layers(hf: Any) -> tuple[bool, ...]:
    dense = set(hf.mlp_only_layers or [])
    step = hf.decoder_sparse_step
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(hf.num_hidden_layers))


def _rope(hf: Any) -> tuple[str, float]:
    """Kind and base of the rotary embedding, where transformers 5 or transformers 4 keeps them."""
    given = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    theta = given.get("rope_theta") or getattr(hf, "rope_theta", None) or 10000.0
    return str(given.get("rope_type") or given.get("type") or "default"), float(theta)


def _unsupported(hf: Any) -> list[str]:
    bad = []
    if hf.hidden_act != "silu":
        bad.append(f"hidden_act={hf.hidden_act!r} is not silu; choose a model with a gated silu MLP")
    if getattr(hf, "use_sliding_window", False):
        bad.append("use_sliding_window=true is not trained here; set it to false where contexts are short enough")
    if getattr(hf, "attention_bias", False):
        bad.append("attention_bias=true is not covered by the family rule; choose a model without it")
    if _rope(hf)[0] != "default":
        bad.append(
            f"rope_type={_rope(hf)[0]!r} is not trained here; remove rope_scaling where contexts are short enough"
        )
    if getattr(hf, "quantization_config", None):
        bad.append("the checkpoint is quantized; use the unquantized one")
    if getattr(hf, "num_experts", 0) and hf.num_experts_per_tok == 1 and hf.norm_topk_prob:
        bad.append(
            "num_experts_per_tok=1 with norm_topk_prob=true has no gradient to the router; set norm_topk_prob=false"
        )
    return bad
