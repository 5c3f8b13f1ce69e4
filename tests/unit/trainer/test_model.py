"""Layouts that cannot train a model are refused with everything that is wrong, before Megatron is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.trainer.model import Parallel, check_parallel, model_shape, read_config
from tests.unit.trainer.models import make_config


@pytest.mark.parametrize(
    ("kind", "changes", "parallel"),
    [
        ("dense", {}, Parallel(1)),
        ("dense", {}, Parallel(2, tensor=2)),
        ("dense", {}, Parallel(6, tensor=2, pipeline=3)),
        ("dense", {}, Parallel(2, pipeline=2, pipeline_layers=(2, 1))),
        ("dense", {}, Parallel(2, pipeline=2, pipeline_layers=(3, 0))),
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
        (Parallel(2, virtual_pipeline=2), "virtual_pipeline_model_parallel_size=2 needs pipeline_model_parallel_size"),
        (Parallel(2, pipeline=2, virtual_pipeline=2), "virtual pipeline parallel size=4 does not divide the 3 layers"),
        (Parallel(2, context=2), "context_parallel_size=2: .* set it to 1"),
        (Parallel(2, tensor=0), "tensor_model_parallel_size=0 is not positive"),
    ],
)
def test_single_violations(parallel: Parallel, text: str) -> None:
    import re

    found = check_parallel(make_config("dense"), parallel)
    assert any(re.search(text, f) for f in found), found


def test_what_the_rules_do_not_cover_is_refused_all_at_once() -> None:
    config = make_config("dense", attention_bias=True, hidden_act="gelu")
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    found = check_parallel(config, Parallel(3, tensor=2))
    assert [any(word in f for f in found) for word in ("attention_bias", "hidden_act", "yarn", "3 trainer ranks")] == [
        True
    ] * 4


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


def test_checks_import_no_megatron() -> None:
    code = (
        "import sys; import nemo_rl.trainer.model, nemo_rl.trainer.families; "
        "sys.exit([m for m in sys.modules if m.split('.')[0] in ('megatron', 'ray', 'vllm')] != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
