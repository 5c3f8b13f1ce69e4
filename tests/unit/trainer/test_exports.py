"""Forms of a simulated trainer: what ranks hold still tiles every tensor, and stands where the form says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.refit.region import Region
from nemo_rl.trainer.exports import adapters_alone, stacked_experts, with_cache_scales
from nemo_rl.trainer.fsdp import simulate_fsdp
from nemo_rl.trainer.model import Parallel, check_parallel, model_shape, read_config
from nemo_rl.trainer.shape import BlockFp8, UnsupportedModel
from nemo_rl.trainer.simulated import SimulatedTrainer, simulate
from tests.golden.families import FAMILIES, checkpoint_table
from tests.unit.trainer.models import make_config
from tests.unit.trainer.test_simulated import assert_tiled

WITHOUT_RULE = {"gpt_oss"}  # families that Megatron trainers have no rule for; DTensors of them need none
EXPERTS = Parallel(4, tensor=2, pipeline=1, expert=2, expert_tensor=2)


def fp8_config(kind: str, rows: int = 8, columns: int = 8, **changes: Any) -> Any:
    quantization = {"quant_method": "fp8", "weight_block_size": [rows, columns], "modules_to_not_convert": ["lm_head"]}
    config = make_config(kind, **changes)
    config.quantization_config = quantization
    return config


def made(kind: str, parallel: Parallel, **changes: Any) -> SimulatedTrainer:
    return simulate(model_shape(make_config(kind, **changes)), parallel, torch.bfloat16)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_hold_the_same_elements(transposed: bool) -> None:
    plain = made("moe", EXPERTS)
    stacked = stacked_experts(plain, transposed=transposed)
    assert_tiled(stacked)
    at = "model.layers.2.mlp.experts"
    assert stacked.table[f"{at}.gate_up_proj"].shape == ((8, 64, 96) if transposed else (8, 96, 64))
    assert stacked.table[f"{at}.down_proj"].shape == ((8, 48, 64) if transposed else (8, 64, 48))
    assert not [fqn for fqn in stacked.table if re.search(r"experts\.\d", fqn)]
    full = {f: torch.randn(m.shape) for f, m in plain.table.items()}
    whole = {
        f"{at}.gate_up_proj": torch.stack(
            [torch.cat([full[f"{at}.{e}.{n}_proj.weight"] for n in ("gate", "up")]) for e in range(8)]
        ),
        f"{at}.down_proj": torch.stack([full[f"{at}.{e}.down_proj.weight"] for e in range(8)]),
    }
    for before, after in zip(plain.rows, stacked.rows, strict=True):
        for (fqn, region), (name, place) in zip(before, after, strict=True):
            if name in whole:
                tensor = whole[name].mT if transposed else whole[name]
                there = tensor[place.slices_in(Region.whole(tuple(tensor.shape)))][0]
                here = full[fqn][region.slices_in(Region.whole(tuple(full[fqn].shape)))]
                assert torch.equal(there.mT if transposed else there, here)


def test_cache_scales_are_held_with_the_attention_of_their_layer() -> None:
    trainer = with_cache_scales(made("dense", Parallel(4, tensor=2, pipeline=2, pipeline_layers=(1, 2))))
    held = [{fqn for fqn, _ in rows if fqn.endswith("_scale")} for rows in trainer.rows]
    assert held[0] == held[1] == {f"model.layers.0.self_attn.{kind}_scale" for kind in "kvq"}
    assert held[2] == held[3] == {f"model.layers.{i}.self_attn.{kind}_scale" for i in (1, 2) for kind in "kvq"}
    assert_tiled(trainer)
    meta = trainer.table["model.layers.2.self_attn.q_scale"]
    assert (meta.shape, meta.dtype) == ((1,), torch.float32)


def test_adapters_are_split_as_their_base_is_and_the_base_is_named_as_frozen() -> None:
    base = made("dense", Parallel(2, tensor=2))
    trainer = adapters_alone(base, 4, ["q_proj", "o_proj", "down_proj"], torch.float32)
    assert_tiled(trainer)
    at = "base_model.model.model.layers.1."
    rows = set(trainer.rows[1])
    assert (f"{at}self_attn.o_proj.lora_A.weight", Region((0, 64), (4, 64))) in rows
    assert (f"{at}self_attn.o_proj.lora_B.weight", Region((0, 0), (64, 4))) in rows
    assert (f"{at}self_attn.q_proj.lora_A.weight", Region((0, 0), (4, 64))) in rows
    assert (f"{at}self_attn.q_proj.lora_B.weight", Region((64, 0), (64, 4))) in rows
    assert {meta.dtype for meta in trainer.table.values()} == {torch.float32}
    assert len(trainer.table) == 2 * 3 * 3
    assert set(trainer.unused) == set(base.table) and "frozen" in trainer.unused["lm_head.weight"]
    with pytest.raises(ValueError, match=r"no projection of the model is named \.c_attn\.weight"):
        adapters_alone(base, 4, ["c_attn"])


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("dense", Parallel(2, tensor=2)),
        ("moe", EXPERTS),
        ("latent", Parallel(4, tensor=2, expert=2, pipeline=2, pipeline_layers=(2, 1))),
    ],
)
def test_block_scales_are_held_with_their_weights(kind: str, parallel: Parallel) -> None:
    trainer = simulate(model_shape(fp8_config(kind)), parallel, torch.bfloat16)
    assert_tiled(trainer)
    scaled = {fqn for fqn in trainer.table if fqn.endswith("_scale_inv")}
    assert {f.removesuffix("_scale_inv") for f in scaled} == {
        f for f, m in trainer.table.items() if m.dtype == torch.float8_e4m3fn
    }
    assert "lm_head.weight_scale_inv" not in scaled and "model.layers.0.self_attn.o_proj.weight_scale_inv" in scaled
    assert not [f for f in scaled if "norm" in f or "embed" in f or f.endswith("mlp.gate.weight_scale_inv")]
    for rows in trainer.rows:
        for fqn in scaled:
            weight = sum(region.volume for name, region in rows if name == fqn.removesuffix("_scale_inv"))
            scales = sum(region.volume for name, region in rows if name == fqn)
            assert (weight == 0) == (scales == 0) and scales * 8 * 8 >= weight


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in WITHOUT_RULE])
def test_tables_are_those_of_public_checkpoints(name: str, tmp_path: Path) -> None:
    FAMILIES[name](tmp_path)
    shape = model_shape(read_config(tmp_path))
    tensor = 1 if name == "nemotron_h_latent" else 2  # it has one group of state, which cannot be split
    sparse = dict(expert=2, expert_tensor=2 // tensor) if shape.is_moe else {}
    trainer = simulate(shape, Parallel(4, tensor=tensor, **sparse), torch.bfloat16)
    if name == "stacked_experts":
        trainer = stacked_experts(trainer)
    assert with_cache_scales(trainer) is trainer or name != "fp8_kv_scales"
    assert trainer.table == checkpoint_table(name)
    assert list(trainer.table) == list(checkpoint_table(name))
    assert_tiled(trainer)
    assert_tiled(simulate_fsdp(trainer.table, 3))


def test_modules_are_kept_by_whole_parts_of_their_names() -> None:
    kept = BlockFp8(8, 8, ("mlp.gate", "lm_head", "model.layers.1"))
    assert kept.covers("model.layers.0.mlp.gate_proj.weight") and kept.covers("model.layers.11.mlp.up_proj.weight")
    assert not kept.covers("model.layers.1.mlp.up_proj.weight")
    assert not kept.covers("model.layers.0.mlp.gate.weight") and not kept.covers("model.norm.weight")
    assert not kept.covers("model.layers.61.eh_proj.weight")


@pytest.mark.parametrize("name", sorted(WITHOUT_RULE))
def test_a_family_without_a_rule_is_refused_and_sharded_all_the_same(name: str, tmp_path: Path) -> None:
    FAMILIES[name](tmp_path)
    with pytest.raises(UnsupportedModel, match="has no family rule"):
        model_shape(read_config(tmp_path))
    assert_tiled(simulate_fsdp(checkpoint_table(name), 3))


def test_a_split_through_a_block_is_refused_and_so_is_training() -> None:
    with pytest.raises(ValueError, match=r"cuts blocks of \(64, 8\) that share a scale"):
        simulate(
            model_shape(fp8_config("dense", rows=64, num_key_value_heads=1)), Parallel(2, tensor=2), torch.bfloat16
        )
    assert any("FP8 weights are not trained" in p for p in check_parallel(fp8_config("dense"), Parallel(1)))
    other = make_config("dense")
    other.quantization_config = {"quant_method": "awq"}
    assert any("quantization 'awq'" in p and "unquantized" in p for p in check_parallel(other, Parallel(1)))
