"""The family rules against tensors fused by hand: every element of every Hugging Face tensor exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.model import model_shape
from nemo_rl.trainer.shape import ModelShape, UnsupportedModel
from tests.unit.trainer.models import make_config, make_model

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("dense", {}, 128),
    ("dense", {"num_key_value_heads": 4}, 128),
    ("dense", {"num_key_value_heads": 1, "vocab_size": 125, "num_hidden_layers": 2}, 128),
    ("dense", {"tie_word_embeddings": True}, 128),
    ("moe", {}, 128),
    ("moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}, 128),
    ("biased", {}, 128),
    ("shared", {}, 130),
]


def megatron_shapes(shape: ModelShape, vocabulary: int, fused: bool) -> dict[str, tuple[int, ...]]:
    """Global keys and shapes as Megatron's documentation of its modules has them, written down independently."""
    hidden = shape.hidden_size
    out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocabulary, hidden)}
    if not shape.tied_embeddings:
        out["output_layer.weight"] = (vocabulary, hidden)
    out["decoder.final_layernorm.weight"] = (hidden,)
    for index, sparse in enumerate(shape.sparse_layers):
        at = f"decoder.layers.{index}"
        qkv = shape.num_heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim
        out[f"{at}.self_attention.linear_qkv.weight"] = (qkv, hidden)
        if shape.qkv_bias:
            out[f"{at}.self_attention.linear_qkv.bias"] = (qkv,)
        out[f"{at}.self_attention.linear_qkv.layer_norm_weight"] = (hidden,)
        out[f"{at}.self_attention.linear_proj.weight"] = (hidden, shape.num_heads * shape.head_dim)
        if shape.qk_norm:
            out[f"{at}.self_attention.q_layernorm.weight"] = (shape.head_dim,)
            out[f"{at}.self_attention.k_layernorm.weight"] = (shape.head_dim,)
        out[f"{at}.mlp.linear_fc1.layer_norm_weight"] = (hidden,)
        mlps = {f"{at}.mlp": shape.ffn_size}
        if sparse:
            out[f"{at}.mlp.router.weight"] = (shape.num_experts, hidden)
            mlps = {f"{at}.mlp.experts.experts.{e}": shape.expert_ffn_size for e in range(shape.num_experts)}
            if shape.shared_ffn_size:
                mlps[f"{at}.mlp.shared_experts"] = shape.shared_ffn_size
                out[f"{at}.mlp.shared_experts.gate_weight"] = (1, hidden)
        for prefix, width in mlps.items():
            out[f"{prefix}.linear_fc2.weight"] = (hidden, width)
            for suffix in [""] if fused else ["_w", "_v"]:
                out[f"{prefix}.linear_fc1.weight{suffix}"] = (2 * width if fused else width, hidden)
    return out


@pytest.mark.parametrize("fused", [False, True], ids=["gate and up apart", "gate and up fused"])
@pytest.mark.parametrize(("kind", "changes", "vocabulary"), CASES)
def test_every_element_corresponds_to_exactly_one(
    kind: str, changes: dict[str, Any], vocabulary: int, fused: bool
) -> None:
    shape = model_shape(make_config(kind, **changes))
    table = families.table(shape, torch.float32)
    hits = {fqn: torch.zeros(meta.shape, dtype=torch.int32) for fqn, meta in table.items()}
    for key, size in megatron_shapes(shape, vocabulary, fused).items():
        taken = torch.zeros(size, dtype=torch.int32)
        for box in families.boxes(shape, key, size):
            assert box.source.sizes == box.region.sizes
            taken[box.source.slices_in(Region.whole(size))] += 1
            hits[box.fqn][box.region.slices_in(Region.whole(table[box.fqn].shape))] += 1
        padding = vocabulary > shape.vocab_size and size[0] == vocabulary
        real = taken[: shape.vocab_size] if padding else taken
        assert bool((real == 1).all()), key
        assert int(taken.sum()) == real.numel(), f"{key}: padding must map to nothing"
    assert {fqn for fqn, count in hits.items() if not bool((count == 1).all())} == set()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_groups_are_interleaved_as_megatron_fuses_them(kv_heads: int) -> None:
    shape = model_shape(make_config("dense", num_key_value_heads=kv_heads))
    heads, dim, hidden = shape.num_heads, shape.head_dim, shape.hidden_size
    q, k, v = (torch.randn(n * dim, hidden) for n in (heads, kv_heads, kv_heads))
    groups = (q.view(kv_heads, -1, dim, hidden), k.view(kv_heads, 1, dim, hidden), v.view(kv_heads, 1, dim, hidden))
    fused = torch.cat(groups, 1).reshape(-1, hidden)
    whole = {f"model.layers.1.self_attn.{n}_proj.weight": t for n, t in zip("qkv", (q, k, v), strict=True)}
    boxes = families.boxes(shape, "decoder.layers.1.self_attention.linear_qkv.weight", tuple(fused.shape))
    for box in boxes:
        there = whole[box.fqn][box.region.slices_in(Region.whole(tuple(whole[box.fqn].shape)))]
        assert torch.equal(fused[box.source.slices_in(Region.whole(tuple(fused.shape)))], there)


def test_a_part_of_a_box_moves_with_it() -> None:
    shape = model_shape(make_config("dense"))
    boxes = families.boxes(shape, "decoder.layers.0.self_attention.linear_qkv.weight", (256, 64))
    key = next(b for b in boxes if b.fqn.endswith("k_proj.weight") and b.region.offsets[0] == 32)
    part = key.source.intersect(Region((200, 8), (6, 16)))
    assert part is not None
    assert key.to_hf(part) == Region((32 + part.offsets[0] - key.source.offsets[0], 8), part.sizes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dense", {}),
        ("biased", {}),
        ("moe", {}),
        ("shared", {}),
        ("latent", {}),
        ("stretched", {}),
        ("hybrid", {}),
        ("hybrid", {"moe_latent_size": 24}),
    ],
)
def test_the_table_is_the_checkpoint_that_transformers_saves(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = make_config(kind, **changes)
    make_model(config).save_pretrained(tmp_path)
    saved = {n: (tuple(t.shape), t.dtype) for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()}
    table = families.table(model_shape(config), torch.float32)
    assert {n: (m.shape, m.dtype) for n, m in table.items()} == saved


def test_what_stays_in_float32() -> None:
    for kind in ("latent", "hybrid"):
        table = families.table(model_shape(make_config(kind)), torch.bfloat16)
        whole = {n for n, m in table.items() if m.dtype == torch.float32}
        assert whole == {n for n in table if n.endswith("gate.e_score_correction_bias")} and whole


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.mlp.router.expert_bias",
        "decoder.layers.0.self_attention.linear_qkv.weight_w",
        "decoder.layers.0.mixer.in_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "vision.patch.weight",
    ],
)
def test_an_unknown_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*unknown to the rule of Qwen3MoeForCausalLM"):
        families.boxes(model_shape(make_config("moe")), key, (8, 64))


@pytest.mark.parametrize(
    ("key", "size"),
    [
        ("decoder.layers.0.self_attention.linear_proj.weight", (64, 64)),
        ("decoder.layers.0.self_attention.linear_qkv.weight", (512, 64)),
        ("decoder.layers.7.mlp.linear_fc2.weight", (64, 96)),
        ("decoder.layers.0.mlp.linear_fc1.weight", (191, 64)),
        ("embedding.word_embeddings.weight", (128, 65)),
    ],
)
def test_a_shape_that_does_not_fit_the_model_is_refused_by_name(key: str, size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"Megatron tensor {key}"):
        families.boxes(model_shape(make_config("dense")), key, size)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    config = make_config("dense")
    config.architectures = ["MambaForCausalLM"]
    with pytest.raises(
        UnsupportedModel, match="MambaForCausalLM has no family rule; known are DeepseekV3ForCausalLM, "
    ):
        model_shape(config)
