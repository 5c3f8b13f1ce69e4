"""Layouts that cannot train a model are refused with everything that is wrong, before Megatron is imported."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rl.config import ConfigError, load_config, to_yaml
from nemo_rl.topology import parallel_of
from nemo_rl.trainer.model import Parallel, check_files, check_parallel, model_shape, read_config
from tests.unit.trainer.models import make_config, make_model


@pytest.mark.parametrize(
    ("kind", "changes", "parallel"),
    [
        ("dense", {}, Parallel(1)),
        ("dense", {}, Parallel(2, tensor=2)),
        ("dense", {}, Parallel(6, tensor=2, pipeline=3)),
        ("dense", {}, Parallel(2, pipeline=2, pipeline_layers=(2, 1))),
        ("dense", {}, Parallel(2, pipeline=2, pipeline_layers=(3, 0))),
        ("dense", {}, Parallel(2, pipeline=2, first_layers=1)),
        ("dense", {}, Parallel(2, pipeline=2, count_embedding=True)),
        ("dense", {}, Parallel(5, pipeline=5, count_embedding=True, count_loss=True)),
        ("dense", {"num_hidden_layers": 4}, Parallel(2, pipeline=2, virtual_pipeline=2)),
        ("dense", {}, Parallel(4, tensor=4)),
        ("dense", {"vocab_size": 127}, Parallel(2, tensor=2)),
        ("biased", {}, Parallel(4, tensor=4)),
        ("moe", {}, Parallel(2, tensor=2, expert=2)),
        ("moe", {}, Parallel(2, tensor=2, expert_tensor=2)),
        ("moe", {}, Parallel(4, expert=4)),
        ("moe", {}, Parallel(4, tensor=2, expert=2, expert_tensor=2)),
        ("shared", {}, Parallel(2, tensor=2, expert=2)),
    ],
)
def test_layouts_that_work_have_no_violations(kind: str, changes: dict[str, Any], parallel: Parallel) -> None:
    assert check_parallel(make_config(kind, **changes), parallel) == []


def test_all_violations_come_at_once_each_with_a_remedy() -> None:
    config = make_config("moe", num_attention_heads=4, num_key_value_heads=2, intermediate_size=95)
    found = check_parallel(config, Parallel(7, tensor=3, pipeline=2, expert=3, expert_tensor=5))
    said = "\n".join(found)
    for text in (
        "7 trainer ranks are not a multiple of tensor x pipeline parallel size = 3 x 2 = 6",
        "7 trainer ranks are not a multiple of expert x expert-tensor x pipeline parallel size = 3 x 5 x 2 = 30",
        "tensor_model_parallel_size=3 does not divide the 4 attention heads; choose one of 1, 2, 4",
        "tensor_model_parallel_size=3 neither divides the 2 key/value heads nor is a multiple of them; choose",
        "tensor_model_parallel_size=3 does not divide the 95 columns of the MLP",
        "pipeline_model_parallel_size=2 does not divide the 3 layers; choose one of 1, 3, or give",
        "expert_model_parallel_size=3 does not divide the 8 experts; choose one of 1, 2, 4, 8",
        "expert_tensor_parallel_size=5 does not divide the 48 columns of an expert",
    ):
        assert text in said
    assert len(found) == 8


@pytest.mark.parametrize("expert_tensor", [1, 4])
def test_the_layout_with_wrong_expert_gradients_is_refused(expert_tensor: int) -> None:
    (text,) = check_parallel(make_config("moe"), Parallel(4, tensor=2, expert=1, expert_tensor=expert_tensor))
    assert "wrong expert gradients" in text and "expert_tensor_parallel_size=2" in text


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (
            Parallel(2, expert=2),
            "expert_model_parallel_size=2 but Qwen3ForCausalLM with this configuration has no experts",
        ),
        (Parallel(2, pipeline=2, pipeline_layers=(2, 2)), r"layers by stage \(2, 2\) are not 2 positive numbers"),
        (Parallel(3, pipeline=3, pipeline_layers=(1, 0, 2)), r"layers by stage \(1, 0, 2\) are not"),
        (Parallel(4, pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2)), "are not 4 positive numbers"),
        (Parallel(2, virtual_pipeline=2), "virtual_pipeline_model_parallel_size=2 .* there is one stage"),
        (Parallel(2, pipeline=2, virtual_pipeline=2), "virtual pipeline parallel size=4 does not divide the 3 layers"),
        (Parallel(2, pipeline=2, first_layers=1, count_loss=True), "exclude each other"),
        (
            Parallel(2, pipeline=2, pipeline_layers=(1, 2), first_layers=1),
            "pipeline_layers=.1, 2. says all of the stages",
        ),
        (Parallel(4, pipeline=4, first_layers=3), r"layers by stage \(3, 0, 0, 0\) are not 4 positive"),
        (Parallel(2, context=2), "context_parallel_size=2: .* set it to 1"),
        (Parallel(2, tensor=0), "tensor_model_parallel_size=0 is not positive"),
    ],
)
def test_single_violations(parallel: Parallel, text: str) -> None:
    found = check_parallel(make_config("dense"), parallel)
    assert any(re.search(text, f) for f in found), found


def test_what_the_rules_do_not_cover_is_refused_all_at_once() -> None:
    config = make_config("dense", attention_bias=True, hidden_act="gelu")
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    found = check_parallel(config, Parallel(3, tensor=2))
    assert [any(word in f for f in found) for word in ("attention_bias", "hidden_act", "yarn", "3 trainer ranks")] == [
        True
    ] * 4


@pytest.mark.parametrize(
    ("kind", "changes", "parallel", "text"),
    [
        (
            "latent",
            {"num_experts_per_tok": 2},
            Parallel(1),
            "num_experts_per_tok=2 with topk_group=2: .* must be equal",
        ),
        ("latent", {"norm_topk_prob": False}, Parallel(1), "norm_topk_prob=false: .* choose a model with true"),
        ("latent", {"moe_layer_freq": 2}, Parallel(1), "moe_layer_freq=2: .* choose a model with 1"),
        ("latent", {"topk_method": "greedy"}, Parallel(1), "topk_method='greedy': the router must be noaux_tc"),
        ("latent", {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}, Parallel(1), "set num_nextn_predict_"),
        ("latent", {"attention_bias": True}, Parallel(1), "attention_bias=true is not covered"),
        (
            "latent",
            {"n_shared_experts": 1, "moe_intermediate_size": 47},
            Parallel(2, tensor=2, expert=2),
            "the 47 columns",
        ),
        ("hybrid", {}, Parallel(1), "Mamba2 mixers need kernels that the trainer does not bring"),
        ("hybrid", {"n_groups": 1}, Parallel(2, tensor=2, expert=2), "the 1 groups of a Mamba2 mixer; choose one of 1"),
        ("hybrid", {"use_conv_bias": False}, Parallel(1), "use_conv_bias=False is not covered .* with True"),
        ("hybrid", {"num_nextn_predict_layers": 1}, Parallel(1), "draft layers are not covered"),
        ("hybrid", {}, Parallel(3, pipeline=3, virtual_pipeline=2), "set virtual_pipeline_model_parallel_size=1"),
        ("hybrid", {}, Parallel(4, pipeline=4, pipeline_layers=(1, 1, 3, 1)), "those between the first and the last"),
    ],
)
def test_what_a_family_does_not_cover_is_refused(
    kind: str, changes: dict[str, Any], parallel: Parallel, text: str
) -> None:
    found = check_parallel(make_config(kind, **changes), parallel)
    assert any(re.search(text, f) for f in found), found


def test_scales_of_a_cache_are_held_of_plain_attention_alone() -> None:
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    plain, latent = make_config("dense"), make_config("latent")
    plain.quantization_config = latent.quantization_config = scheme
    assert check_parallel(plain, Parallel(1)) == []
    assert model_shape(plain).cache_scales == "kvq"
    assert any("kv_cache_scheme" in f for f in check_parallel(latent, Parallel(1)))
    plain.quantization_config = {**scheme, "config_groups": {"group_0": {}}}
    assert any("'compressed-tensors' with weight_block_size=None" in f for f in check_parallel(plain, Parallel(1)))


def test_a_configuration_is_read_from_its_folder(tmp_path: Path) -> None:
    make_config("moe", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    shape = model_shape(read_config(tmp_path))
    assert (shape.architecture, shape.rope_theta, shape.num_experts) == ("Qwen3MoeForCausalLM", 5e5, 8)
    assert shape.sparse_layers == (True, False, True)
    with pytest.raises(ValueError, match="config.json is missing; point policy.model_name"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", ')
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path)


def test_every_key_of_the_layout_reaches_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("policy: {megatron_cfg: {pipeline_layers: [1, 2, 0, 3]}}\n")
    names = {
        "tensor_model_parallel_size": ("tensor", 2),
        "pipeline_model_parallel_size": ("pipeline", 3),
        "virtual_pipeline_model_parallel_size": ("virtual_pipeline", 4),
        "expert_model_parallel_size": ("expert", 5),
        "expert_tensor_parallel_size": ("expert_tensor", 6),
        "context_parallel_size": ("context", 7),
        "num_layers_in_first_pipeline_stage": ("first_layers", 8),
        "num_layers_in_last_pipeline_stage": ("last_layers", 9),
        "account_for_embedding_in_pipeline_split": ("count_embedding", True),
        "account_for_loss_in_pipeline_split": ("count_loss", True),
        "sequence_parallel": ("sequence_parallel", True),
    }
    config = load_config(tmp_path / "c.yaml", [f"policy.megatron_cfg.{k}={v}" for k, (_, v) in names.items()], {})
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml", [], {}) == config
    made = parallel_of(config, 11)
    assert made == Parallel(11, pipeline_layers=(1, 2, 0, 3), **dict(names.values()))  # type: ignore[arg-type]
    assert {field.name for field in dataclasses.fields(Parallel)} - {"world_size", "pipeline_layers"} == set(
        name for name, _ in names.values()
    )


@pytest.mark.parametrize("given", ["3", "[1,x]", "[1,[2]]"])
def test_layers_of_stages_are_a_list_of_numbers(tmp_path: Path, given: str) -> None:
    (tmp_path / "c.yaml").write_text("policy: {}\n")
    with pytest.raises(ConfigError, match=r"policy\.megatron_cfg\.pipeline_layers"):
        load_config(tmp_path / "c.yaml", [f"policy.megatron_cfg.pipeline_layers={given}"], {})


def test_checks_import_no_megatron() -> None:
    code = (
        "import sys; import nemo_rl.trainer.model, nemo_rl.trainer.families; "
        "sys.exit([m for m in sys.modules if m.split('.')[0] in ('megatron', 'ray', 'vllm')] != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_draft_layers_that_the_files_lack_are_one_violation(tmp_path: Path) -> None:
    config = make_config("latent", num_hidden_layers=2, num_nextn_predict_layers=1)
    make_model(config).save_pretrained(tmp_path)
    (said,) = check_files(tmp_path, model_shape(read_config(tmp_path)), torch.float32)
    assert "num_nextn_predict_layers=1" in said and "model.layers.2.*" in said and "=0 in config.json" in said
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_nextn_predict_layers": 0}))
    assert check_files(tmp_path, model_shape(read_config(tmp_path)), torch.float32) == []


def test_a_draft_layer_in_part_is_told_tensor_by_tensor(tmp_path: Path) -> None:
    config = make_config("latent", num_hidden_layers=2, num_nextn_predict_layers=1)
    make_model(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.enorm.weight"] = torch.ones(config.hidden_size)
    save_file(tensors, tmp_path / "model.safetensors")
    said = "\n".join(check_files(tmp_path, model_shape(read_config(tmp_path)), torch.float32))
    assert "tensors are missing: model.layers.2.eh_proj.weight" in said and "nextn" not in said
