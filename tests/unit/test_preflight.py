"""Refusals before any actor starts: every violation at once, each with the key and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_rl import preflight
from nemo_rl.config import load_config
from nemo_rl.grpo.data import save_tokenizer
from nemo_rl.grpo.warmup import start_model_config

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
TP, EP = "policy.megatron_cfg.tensor_model_parallel_size", "policy.megatron_cfg.expert_model_parallel_size"
GENERATORS = "policy.generation.colocated.resources.gpus_per_node"


@pytest.fixture(autouse=True)
def without_loader_and_with_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loader is asked in a process of its own, which its own tests cover; and machines of tests may lack GPUs."""
    monkeypatch.setattr(preflight, "check_loader", lambda *_: [])
    monkeypatch.setattr(preflight, "gpus_here", lambda: True)
    yield


def violations(*overrides: str, kind: str = "") -> list[str]:
    return preflight.validate(load_config(CONFIGS / f"grpo_qwen3_{kind}tiny_cpu.yaml", overrides, {}))


AHEAD, RECOMPUTE = ["grpo.async_grpo.enabled=true"], "grpo.async_grpo.recompute_kv_cache_after_weight_updates"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_pass(path: Path) -> None:
    assert preflight.validate(load_config(path, [], {})) == []


def test_one_step_ahead() -> None:
    assert violations(*AHEAD) == [] == violations(*AHEAD, f"{RECOMPUTE}=true")
    older = ["grpo.refit_every=3", "grpo.async_grpo.max_trajectory_age_steps=3"]
    assert violations(*AHEAD, *older) == [] == violations("grpo.refit_every=3")


def test_multicast_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    (said,) = violations()
    assert said.startswith("NCCL_NVLS_ENABLE=1:") and "set it to 0" in said


def test_gpus_that_are_not_there_are_refused_where_the_run_would_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gpus_here", lambda: False)
    (said,) = violations("cluster.device=cuda")
    assert said.startswith("cluster.device=cuda: torch finds no GPU on this machine")
    assert violations("cluster.device=cuda", "cluster.address=head:6379") == [] == violations()


def test_one_device_for_both_sides() -> None:
    shared = ["policy.generation.colocated.enabled=true", "cluster.device=cuda"]
    assert violations(*shared) == [] == violations(*shared, "policy.refit.transport=peer")
    (said,) = violations(*shared, "policy.refit.transport=nccl")
    assert "set policy.refit.transport=peer" in said


@pytest.mark.parametrize(
    ("device", "transport", "texts"),
    [
        ("cpu", "nccl", ["moves cuda tensors, and ranks compute on cpu", "choose auto, peer or gloo"]),
        ("cpu", "m2n", ["moves cuda tensors"]),
        ("cuda", "gloo", ["moves cpu tensors, and ranks compute on cuda", "choose auto, peer or nccl"]),
        ("cuda", "peer", ["maps memory of ranks on one host; choose auto or nccl"]),
        ("cpu", "peer", ["maps memory of ranks on one host; choose auto or gloo"]),
    ],
)
def test_transports_that_cannot_move_what_is_there(device: str, transport: str, texts: list[str]) -> None:
    nodes = ["cluster.address=auto", "cluster.gpus_per_node=2", "cluster.num_nodes=2"]
    (said,) = violations(*nodes, f"cluster.device={device}", f"policy.refit.transport={transport}")
    assert said.startswith(f"policy.refit.transport={transport}") and all(text in said for text in texts)
    conventional = "policy.nccl_xfer_refit=false"  # what the other key names is not used then
    assert violations(*nodes, f"cluster.device={device}", f"policy.refit.transport={transport}", conventional) == []


@pytest.mark.parametrize(
    ("overrides", "kind", "texts"),
    [
        ([f"{TP}=8", "cluster.gpus_per_node=10"], "", [f"{TP.split('.')[-1]}=8 does not divide the 4 attention heads"]),
        ([f"{TP}=4", "start_model.intermediate_size=130", "cluster.gpus_per_node=6"], "", ["columns of the MLP"]),
        ([f"{EP}=3", f"{TP}=1", "cluster.gpus_per_node=5"], "moe_", [f"{EP.split('.')[-1]}=3 does not divide the 8"]),
        ([f"{EP}=1"], "moe_", ["gives wrong expert gradients", "set expert_model_parallel_size > 1"]),
        (["cluster.gpus_per_node=3"], "", ["more ranks than resources", "raise cluster.gpus_per_node"]),
        (["policy.generation.vllm_cfg.precision=fp4"], "", ["fp4: unknown; choose float32 or bfloat16"]),
        (["policy.precision=half"], "", ["policy.precision=half: unknown"]),
        (
            ["policy.generation.colocated.enabled=true", "cluster.device=cuda", "policy.nccl_xfer_refit=false"],
            "",
            ["with transport 'broadcast': NCCL takes one rank a GPU"],
        ),
        (["policy.train_global_batch_size=100"], "", ["does not divide the 256 samples of a step"]),
        (["policy.train_micro_batch_size=100"], "", ["policy.train_micro_batch_size=100 does not divide the 256"]),
        (["policy.generation.max_new_tokens=30"], "", ["max_model_len=32", "policy.max_total_sequence_length=32"]),
        (["policy.generation.max_new_tokens=4"], "", ["the longest answers have 9 tokens"]),
        (["data.task=sum"], "", ["data.task=sum: unknown; choose add or sort"]),
        (["policy.model_name=/nowhere"], "", ["/nowhere/config.json is missing"]),
        (["grpo.refit_every=0", "policy.generation.vllm_cfg.load_format=dummy"], "", ["random weights for ever"]),
        (
            [*AHEAD, "grpo.refit_every=2"],
            "",
            ["samples would be 2 steps old", "age_steps=1 refuses them"],
        ),
        (
            [*AHEAD, "grpo.async_grpo.max_trajectory_age_steps=0"],
            "",
            ["age_steps=0: samples are a step old"],
        ),
        (
            [*AHEAD, "grpo.async_grpo.in_flight_weight_updates=false", f"{RECOMPUTE}=true"],
            "",
            [f"{RECOMPUTE}=true: nothing is in flight"],
        ),
        (
            [*AHEAD, "loss_fn.use_importance_sampling_correction=false"],
            "",
            ["samples of older weights need the correction"],
        ),
        (
            [*AHEAD, "policy.generation.vllm_cfg.kv_cache_dtype=fp8"],
            "",
            ["by the scales of other weights", f"set {RECOMPUTE}=true"],
        ),
        (["policy.refit.bucket_bytes=0"], "", ["policy.refit.bucket_bytes=0: must be at least 1024"]),
        (
            ["policy.refit.transport=nccl", "policy.refit.bucket_bytes=268435457"],
            "",
            ["policy.refit.bucket_bytes=268435457: must be at most 268435456"],
        ),
        (
            ["policy.refit.num_streams=1000", "policy.refit.deadline_s=1e15"],
            "",
            [
                "policy.refit.num_streams=1000: must be at most 64",
                "deadline_s=1000000000000000.0: must be at most 1000000",
            ],
        ),
        ([f"{TP}=0"], "", [f"{TP}=0: at least 1 is needed"]),
        (["start_model.num_key_value_heads=3"], "", ["does not divide start_model.num_attention_heads=4"]),
    ],
)
def test_each_violation(overrides: list[str], kind: str, texts: list[str]) -> None:
    said = "\n".join(violations(*overrides, kind=kind))
    assert all(text in said for text in texts), said


def test_all_violations_at_once() -> None:
    said = "\n".join(
        violations(
            f"{TP}=8",
            "policy.generation.vllm_cfg.precision=fp4",
            "policy.generation.vllm_cfg.load_format=fast",
            "grpo.refit_every=-1",
            "policy.train_global_batch_size=100",
        )
    )
    expected = ["more ranks than resources", "does not divide the 4 attention heads", "fp4", "load_format=fast"]
    expected += ["grpo.refit_every=-1", "does not divide the 256 samples"]
    assert all(text in said for text in expected), said


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    settings = load_config(CONFIGS / "grpo_qwen3_tiny_cpu.yaml", [], {}).start_model
    AutoModelForCausalLM.from_config(start_model_config(settings, 32)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def test_checkpoint_that_is_whole(checkpoint: Path) -> None:
    assert violations(f"policy.model_name={checkpoint}") == []


def test_checkpoint_that_is_not(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (checkpoint / "tokenizer.json").unlink()
    said = "\n".join(violations(f"policy.model_name={checkpoint}"))
    assert "model.safetensors: truncated" in said and "tokenizer.json is missing" in said
    weights.unlink()
    assert "no *.safetensors file" in "\n".join(violations(f"policy.model_name={checkpoint}"))


def test_a_run_does_not_overwrite_another(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (said,) = violations(f"logger.log_dir={tmp_path}", "logger.run_name=mine")
    assert said.startswith("logger.run_name=mine:") and "choose another name" in said
