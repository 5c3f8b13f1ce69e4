"""GRPO on GPUs as a user starts it: the example configurations with a small model, and what their refits bring."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.golden.families import FP8_CACHE

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu(1),
    pytest.mark.skipif(not all(map(find_spec, ("vllm", "megatron", "ray"))), reason="vLLM, Megatron or Ray is missing"),
]
SMALL = ["start_model.hidden_size=256", "start_model.intermediate_size=512", "start_model.num_hidden_layers=2"]
SMALL += ["start_model.num_attention_heads=4", "start_model.num_key_value_heads=2", "start_model.head_dim=64"]
SMALL += ["policy.generation.vllm_cfg.enforce_eager=true"]
# A size of its own, as vLLM's profile fails where others take or give back the GPU's memory meanwhile.
SMALL += [f"policy.generation.vllm_cfg.kv_cache_memory_bytes={256 << 20}"]
# Problems that such a model answers now and then: where no answer is rewarded no gradient is left, and refits bring the
# weights that are there.
SMALL += ["data.min_items=1", "data.max_items=3", "start_model.warmup_steps=100", "start_model.warmup_lr=2.0e-3"]
MOE = ["start_model.num_experts=8", "start_model.moe_intermediate_size=128"]
GRAPHS = ["policy.generation.vllm_cfg.enforce_eager=false"]
LIMIT_S, STOP_S = 280, 20


def run(config: str, folder: Path, *overrides: str, steps: int = 3) -> list[dict[str, Any]]:
    """Metrics of a run that must succeed; where it does not, what it said last."""
    places = [f"start_model.cache_dir={folder}/models", f"logger.log_dir={folder}", f"grpo.max_num_steps={steps}"]
    code = started([f"examples/configs/{config}.yaml", *SMALL, *places, *overrides], folder / "printed.txt")
    assert code == 0, f"the run ended with {code}\n{said(folder)}"
    rows = [json.loads(line) for line in (folder / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [r["weight_version"] for r in rows] == [*range(1, steps + 1)], said(folder)
    return rows


def started(arguments: list[str], printed: Path) -> int | str:
    """The exit code, or that it was stopped. Nothing of this process's own settings reaches the run."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NRL_") and k != "TORCHDYNAMO_DISABLE"}
    environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "examples/run_grpo.py", "--config", *arguments]
    with printed.open("w") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT)
        try:
            return child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"nothing within {LIMIT_S} s"
        finally:
            stop(child)


def stop(child: subprocess.Popen[bytes]) -> None:
    """As a user would, so that the actors end too; by force where that does not help."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def said(folder: Path) -> str:
    """The last of what a run printed and of its log."""
    files = [folder / "printed.txt", folder / "latest" / "run.log"]
    return "\n".join(f"--- {file.name}\n{file.read_text()[-5000:]}" for file in files if file.exists())


def assert_in_place(rows: list[dict[str, Any]], kl_error: float) -> None:
    """Every refit by `peer`, verified, nothing whole and nothing staged; engines answer by the trainers' weights."""
    for row in rows:
        assert row["refit_verified"] is True and row["refit_transport"] == "peer"
        assert row["refit_bulk_bytes"] > 1_000_000 and row["refit_misc_bytes"] == 0 == row["refit_staging_bytes"]
        assert 0 <= row["gen_kl_error"] < kl_error
        assert row["grad_norm"] > 0, "weights stayed what they were"


def test_one_gpu_for_both_sides(tmp_path: Path) -> None:
    assert_in_place(run("grpo_qwen3_1gpu", tmp_path), 1e-3)


def test_an_engine_of_cuda_graphs(tmp_path: Path) -> None:
    """Graphs read parameters where they lay when they were captured."""
    assert_in_place(run("grpo_qwen3_1gpu", tmp_path, *GRAPHS), 1e-3)


def test_scales_of_an_fp8_cache(tmp_path: Path) -> None:
    """The trainer measures scales of keys, values and queries in each step, and refits bring them."""
    from safetensors import safe_open

    model = calibrated_model(tmp_path)
    cached = [f"policy.model_name={model}", "policy.generation.vllm_cfg.kv_cache_dtype=fp8"]
    assert_in_place(run("grpo_qwen3_1gpu", tmp_path, *cached), 2e-2)
    with safe_open(model / "model.safetensors", "pt") as file:
        weights = len(file.keys())
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    planned = re.search(r"refit plan \w+: (\d+) tensors", (tmp_path / "latest" / "run.log").read_text())
    assert planned and int(planned[1]) == weights + 3 * layers, said(tmp_path)


def calibrated_model(folder: Path) -> Path:
    """A start model whose configuration says that its cache has scales; its files have none, and 1 stands for them."""
    from nemo_rl.config import load_config
    from nemo_rl.grpo.warmup import ensure_start_model
    from nemo_rl.topology import device_of

    places = [f"start_model.cache_dir={folder}/models"]
    config = load_config(ROOT / "examples" / "configs" / "grpo_qwen3_1gpu.yaml", [*SMALL, *places], {})
    model = shutil.copytree(ensure_start_model(config, device_of(config)), folder / "calibrated")
    settings = json.loads((model / "config.json").read_text()) | {"quantization_config": FP8_CACHE}
    (model / "config.json").write_text(json.dumps(settings))
    return model


def test_rollouts_one_step_ahead(tmp_path: Path) -> None:
    """An engine that answers two requests at a time is slower than training: refits come upon its requests."""
    ahead = ["grpo.async_grpo.enabled=true", "policy.generation.vllm_cfg.max_num_seqs=2"]
    rows = run("grpo_qwen3_1gpu", tmp_path, *ahead, steps=6)
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
@pytest.mark.parametrize(
    ("config", "more", "kl_error"),
    [("grpo_qwen3_moe_4gpu", MOE, 1e-2), ("grpo_qwen3_4gpu", GRAPHS, 1e-3)],
    ids=["experts", "graphs"],
)
def test_apart(config: str, more: list[str], kl_error: float, tmp_path: Path) -> None:
    """By name, as links decide which transport is the fastest for so small a model."""
    assert_in_place(run(config, tmp_path, *more, "policy.refit.transport=peer"), kl_error)


@pytest.mark.gpu(4)
def test_conventional_refits(tmp_path: Path) -> None:
    rows = run("grpo_qwen3_4gpu", tmp_path, "policy.nccl_xfer_refit=false")
    assert all(r["refit_transport"] == "broadcast" and r["refit_verified"] for r in rows)
    assert all(r["gen_kl_error"] < 1e-3 and r["grad_norm"] > 0 for r in rows)
