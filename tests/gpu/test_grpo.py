"""GRPO on GPUs as a user starts it: the example configurations with a small model, and what their refits bring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not all(map(find_spec, ("vllm", "megatron", "ray"))), reason="vLLM, Megatron or Ray is missing"),
]
SMALL = ["start_model.hidden_size=256", "start_model.intermediate_size=512", "start_model.num_hidden_layers=2"]
SMALL += ["start_model.num_attention_heads=4", "start_model.num_key_value_heads=2", "start_model.head_dim=64"]
SMALL += ["start_model.warmup_steps=40", "policy.generation.vllm_cfg.enforce_eager=true"]
MOE = ["start_model.num_experts=8", "start_model.moe_intermediate_size=128"]


def run(config: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of a run of three steps that must succeed."""
    command = [sys.executable, "examples/run_grpo.py", "--config", f"examples/configs/{config}.yaml"]
    places = [f"start_model.cache_dir={folder}/models", f"logger.log_dir={folder}", "grpo.max_num_steps=3"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NRL_")}
    environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, *SMALL, *places, *overrides], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [r["weight_version"] for r in rows] == [1, 2, 3]
    return rows


def assert_in_place(rows: list[dict[str, Any]], kl_error: float) -> None:
    """Every refit by `peer`, verified, nothing whole and nothing staged; engines answer by the trainers' weights."""
    for row in rows:
        assert row["refit_verified"] is True and row["refit_transport"] == "peer"
        assert row["refit_bulk_bytes"] > 1_000_000 and row["refit_misc_bytes"] == 0 == row["refit_staging_bytes"]
        assert 0 <= row["gen_kl_error"] < kl_error and row["grad_norm"] > 0


def test_one_gpu_for_both_sides(tmp_path: Path) -> None:
    assert_in_place(run("grpo_qwen3_1gpu", tmp_path), 1e-3)


def test_rollouts_one_step_ahead(tmp_path: Path) -> None:
    """An engine that answers few requests at a time is slower than training: refits come upon its requests."""
    ahead = ["grpo.async_grpo.enabled=true", "policy.generation.vllm_cfg.max_num_seqs=8"]
    rows = run("grpo_qwen3_1gpu", tmp_path, *ahead)
    assert all(r["refit_verified"] and r["overlap_s"] > 0 and r["sample_age_max"] == 1 for r in rows[1:])
    assert any(r["mixed_version_fraction"] > 0 for r in rows)
    assert all(r["gen_kl_error"] is None or 0 <= r["gen_kl_error"] < 1e-3 for r in rows)
    for row in rows:
        parts = [s for name, s in row.items() if name.startswith("pause_") and name != "pause_to_resume_s"]
        assert sum(parts) == pytest.approx(row["pause_to_resume_s"])


@pytest.mark.gpu(2)
def test_an_engine_of_two_ranks_on_the_trainers_gpus(tmp_path: Path) -> None:
    shared = ["policy.generation.colocated.enabled=true", "cluster.gpus_per_node=2"]
    rows = run("grpo_qwen3_moe_4gpu", tmp_path, *MOE, *shared, "policy.generation.vllm_cfg.gpu_memory_utilization=0.3")
    assert_in_place(rows, 1e-2)


@pytest.mark.gpu(4)
def test_apart(tmp_path: Path) -> None:
    assert_in_place(run("grpo_qwen3_moe_4gpu", tmp_path, *MOE), 1e-2)


@pytest.mark.gpu(4)
def test_conventional_refits(tmp_path: Path) -> None:
    rows = run("grpo_qwen3_4gpu", tmp_path, "policy.nccl_xfer_refit=false")
    assert all(r["refit_transport"] == "broadcast" and r["refit_verified"] for r in rows)
    assert all(r["gen_kl_error"] < 1e-3 for r in rows)
