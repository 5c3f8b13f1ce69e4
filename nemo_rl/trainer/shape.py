"""The numbers of a decoder-only transformer, as read from a Hugging Face configuration. No Megatron, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: queries (unless `query_rank` is None) and keys with values go through low ranks.

    Attributes:
        nope_dim, rope_dim: of a head's query and key, without and with rotary position.
    """

    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True, slots=True)
class Router:
    """How a sigmoid router chooses experts; see the configuration of DeepSeek-V3.

    Attributes:
        num_groups, top_groups: experts are chosen from `top_groups` of `num_groups` groups.
        scale: of the chosen experts' weights.
    """

    num_groups: int
    top_groups: int
    scale: float


@dataclass(frozen=True, slots=True)
class Hybrid:
    """A stack of layers of four kinds, each with one mixer; names as in NemotronH's configuration.

    Attributes:
        pattern: a letter for each layer: `M` a Mamba2 mixer, `*` attention, `-` an MLP, `E` a mixture of experts.
        num_heads, head_dim, num_groups, state_dim, conv_width: of a Mamba2 mixer.
        expert_latent_size: width in which experts work, between two projections; 0 for the hidden size.
    """

    pattern: str
    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    conv_width: int
    expert_latent_size: int = 0

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def in_proj_parts(self) -> dict[str, int]:
        """Rows of the parts of a mixer's input projection, in order."""
        group = self.num_groups * self.state_dim
        return {"z": self.inner_size, "x": self.inner_size, "B": group, "C": group, "dt": self.num_heads}

    @property
    def conv_parts(self) -> dict[str, int]:
        """Rows of the parts of a mixer's convolution, in order."""
        return {name: rows for name, rows in self.in_proj_parts.items() if name in "xBC"}


@dataclass(frozen=True, slots=True)
class Yarn:
    """Stretched rotary position embedding; names as in Hugging Face's `rope_parameters`."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """Linear weights in FP8, with a float32 scale for each block of `rows` x `columns`.

    Attributes:
        kept: modules that are not quantized, by consecutive parts of their names: `mlp.gate` is not `mlp.gate_proj`.
    """

    rows: int
    columns: int
    kept: tuple[str, ...] = ()

    def covers(self, fqn: str) -> bool:
        """Whether `fqn` is a linear weight in FP8: of a projection of a layer, never of a router or a draft's input."""
        named = fqn.endswith(_PROJECTIONS) and not fqn.endswith(".eh_proj.weight")
        return named and not any(f".{part}." in f".{fqn}" for part in self.kept)

    def blocks(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Blocks along each dim of a weight of `size`; the last ones may be short."""
        return -(-size[0] // self.rows), -(-size[1] // self.columns)


_PROJECTIONS = ("_proj.weight", "_proj_with_mqa.weight")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a family rule and the model builder need to know.

    Attributes:
        architecture: name of the Hugging Face model class.
        sparse_layers: for each layer, whether its MLP is a mixture of experts.
        ffn_size: width of a dense layer's MLP.
        expert_ffn_size, shared_ffn_size: width of an expert and of the shared expert; 0 where there is none.
        top_k_renormalized: the chosen experts' weights add up to 1.
        latent: where attention is latent; `head_dim` is then a query's and `num_kv_heads` is `num_heads`.
        router: where it is a sigmoid router with a correction bias; None for softmax.
        hybrid: where layers hold a single mixer each; MLPs and experts are then not gated.
        num_draft_layers: layers that predict tokens further ahead; they follow the others.
        cache_scales: letters of the FP8 KV cache's scales that the trainer calibrates: of `k`, `v` and `q`.
        fp8: where linear weights are FP8 with a scale for each block.
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
    latent: LatentAttention | None = None
    router: Router | None = None
    hybrid: Hybrid | None = None
    yarn: Yarn | None = None
    num_draft_layers: int = 0
    fp8: BlockFp8 | None = None
    cache_scales: str = ""

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


def architecture_of(hf: Any) -> str:
    """The model class that a configuration names. Raises UnsupportedModel where it names none or several."""
    names = list(getattr(hf, "architectures", None) or [])
    if len(names) != 1:
        raise UnsupportedModel([f"config.json names architectures {names}; it must name exactly one"])
    return str(names[0])


def rope_parameters(hf: Any) -> dict[str, Any]:
    """Where transformers 5 or transformers 4 keeps what is said of the rotary embedding."""
    return dict(getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {})


def rope_of(hf: Any) -> tuple[str, float]:
    """Kind and base of the rotary embedding."""
    given = rope_parameters(hf)
    theta = given.get("rope_theta") or getattr(hf, "rope_theta", None) or 10000.0
    return str(given.get("rope_type") or given.get("type") or "default"), float(theta)


def quantization_of(hf: Any) -> tuple[BlockFp8 | None, list[str]]:
    """How a checkpoint's weights are quantized, and what of it no family covers, with the remedy."""
    given = getattr(hf, "quantization_config", None)
    if not given:
        return None, []
    said = given if isinstance(given, dict) else given.to_dict()
    method, block = said.get("quant_method"), said.get("weight_block_size")
    if cache_scales_of(hf) and not said.get("config_groups"):
        return None, []
    if method != "fp8" or not block:
        text = f"quantization {method!r} with weight_block_size={block} is not covered; use the unquantized checkpoint"
        return None, [text]
    kept = said.get("modules_to_not_convert") or said.get("ignored_layers") or ()
    return BlockFp8(int(block[0]), int(block[1]), tuple(kept)), []


def cache_scales_of(hf: Any) -> str:
    """Letters of the scales of an FP8 KV cache that a checkpoint says to hold, as `ModelShape.cache_scales`."""
    given = getattr(hf, "quantization_config", None) or {}
    said = given if isinstance(given, dict) else given.to_dict()
    return "kvq" if said.get("kv_cache_scheme") else ""
