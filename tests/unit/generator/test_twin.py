"""Real vLLM models on the meta device: the trace of every rank equals what the loader writes into real parameters.

The traces run in one process of their own, as vLLM keeps state per process; that process is this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.generator.preflight import PREFLIGHT_ENV, check_loader_apart, request_text
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.refit.layout import TensorMeta, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import Trace

ROOT = Path(__file__).parents[3]
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EXPERTS = 64, 4, 2, 16, 96, 130, 4
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
QWEN3 = {**COMMON, "head_dim": HEAD_DIM, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MOE: dict[str, Any] = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": FFN,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**QWEN3, "tie_word_embeddings": False},
    "tied": {**QWEN3, "tie_word_embeddings": True},
    "bias": {**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
    "moe": {**MOE, "tie_word_embeddings": False},
}


def table_of(kind: str, dtype: torch.dtype = torch.float32) -> TensorTable:
    """The tensors of a checkpoint of that model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if kind != "tied":
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(kind).items()}
    return {name: TensorMeta(shape, dtype) for name, shape in shapes.items()}


def layer_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    heads = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (n, HIDDEN) for p, n in heads.items()}
    shapes["self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
    shapes |= {f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    if kind == "bias":
        shapes |= {f"self_attn.{p}_proj.bias": (n,) for p, n in heads.items()}
    else:
        shapes |= {f"self_attn.{p}_norm.weight": (HEAD_DIM,) for p in "qk"}
    if kind == "moe":
        shapes["mlp.gate.weight"] = (EXPERTS, HIDDEN)
    for where in [f"mlp.experts.{e}" for e in range(EXPERTS)] if kind == "moe" else ["mlp"]:
        shapes |= {f"{where}.{p}_proj.weight": (FFN, HIDDEN) for p in ("gate", "up")}
        shapes[f"{where}.down_proj.weight"] = (HIDDEN, FFN)
    return shapes


def write_models(folder: Path) -> None:
    for kind, config in MODELS.items():
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def reports(models: Path) -> dict[str, Any]:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(models)],
        env={**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", list(MODELS))
def test_replay_equals_the_loader(reports: dict[str, Any], kind: str, tp: int) -> None:
    for rank in range(tp):
        report = reports[f"{kind} {tp} {rank}"]
        assert report["problems"] == [] and report["misc"] == {}
        assert report["differing"] == []
        assert report["moved_bytes"] + report["padding_bytes"] == report["bytes"] > 0


def test_rows_of_a_rank(reports: dict[str, Any]) -> None:
    rows = reports["dense 4 3"]["rows"]
    at = "model.layers.1.self_attn."
    # Two key heads over four ranks: ranks 2 and 3 both hold the second.
    assert [f"{at}k_proj.weight", [16, 0], [16, 64], f"{at}qkv_proj.weight", 16 * 64, [64, 1]] in rows
    assert [f"{at}o_proj.weight", [0, 48], [64, 16], f"{at}o_proj.weight", 0, [16, 1]] in rows
    assert reports["dense 4 3"]["padding_bytes"] == 2 * 48 * 64 * 4  # 130 tokens padded to 192: nothing for rank 3


def test_precision_other_than_the_table_is_misc(reports: dict[str, Any]) -> None:
    report = reports["bfloat16"]
    assert report["problems"] == [] and report["rows"] == 0
    assert report["misc"] == sorted(table_of("dense"))
    assert "cast from torch.float32 to torch.bfloat16" in report["reason"]


def test_planted_faults_are_named(reports: dict[str, Any]) -> None:
    missing, unknown = reports["missing"], reports["unknown"]
    assert missing == ["model.layers.0.self_attn.qkv_proj.weight: bytes 24576:32768 of 32768 written by no tensor"]
    assert len(unknown) == 1 and "stopped after model.layers.0.self_attn.r_proj.weight" in unknown[0]


def test_nothing_is_left_behind(reports: dict[str, Any]) -> None:
    assert reports["left behind"] == []


def test_twin_beside_a_live_model_leaves_it_alone(reports: dict[str, Any]) -> None:
    assert reports["beside"] == {"layers_kept": True, "params_kept": True, "problems": []}


def test_preflight_as_a_program(models: Path) -> None:
    pytest.importorskip("vllm")
    table = table_of("dense", torch.bfloat16)
    del table["model.layers.1.mlp.up_proj.weight"]
    spec = EngineSpec(str(models / "dense"), 2, quantization="fp8_per_channel")
    problems = check_loader_apart(spec, table, {**os.environ, "PYTHONPATH": str(ROOT)})
    text = "model.layers.1.mlp.gate_up_proj.weight: bytes 6144:12288 of 12288 written by no tensor"
    assert problems == [f"generator rank {r} of 2: {text}" for r in (0, 1)]


def test_preflight_request_names_the_whole_engine() -> None:
    spec = EngineSpec("m", 2, 2, precision="float32", quantization="fp8_per_channel", stage_layers=(1, 3))
    assert EngineSpec(**json.loads(request_text(spec, {}))["engine"]) == spec


def test_preflight_that_cannot_answer_is_a_problem(models: Path) -> None:
    late = check_loader_apart(EngineSpec(str(models / "dense")), {}, os.environ, timeout_s=0.01)
    assert len(late) == 1 and "0.01 s" in late[0]


# ---- the program


def report_of(config: Any, trace: Trace, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load `values` into a real instance by vLLM and into another by the trace, and compare their bytes."""
    from vllm.config import set_current_vllm_config

    from nemo_rl.generator.twin import build_twin

    wanted, got = build_twin(config, "cpu"), build_twin(config, "cpu")
    for p in (*wanted.parameters(), *got.parameters()):
        p.data.fill_(float("nan"))
    with set_current_vllm_config(config):
        wanted.load_weights(iter(values.items()))  # type: ignore[operator]
    params = dict(got.named_parameters(remove_duplicate=False))
    for row in trace.rows:
        at = params[row.param].data.as_strided(row.region.sizes, row.stride, row.storage_offset)
        at.copy_(values[row.fqn][row.region.slices_in(Region.whole(tuple(values[row.fqn].shape)))])
    for name, ranges in trace.padding.items():
        for first, end in ranges:
            params[name].data.view(-1).view(torch.uint8)[first:end] = 0
    live = wanted.named_parameters(remove_duplicate=False)
    return {
        "problems": trace.problems,
        "misc": trace.misc,
        "rows": [[r.fqn, r.region.offsets, r.region.sizes, r.param, r.storage_offset, r.stride] for r in trace.rows],
        "differing": [
            n for n, p in live if not torch.equal(p.view(-1).view(torch.uint8), params[n].view(-1).view(torch.uint8))
        ],
        "moved_bytes": sum(r.region.volume * 4 for r in trace.rows),
        "padding_bytes": sum(end - first for ranges in trace.padding.values() for first, end in ranges),
        "bytes": sum(p.numel() * p.itemsize for p in got.parameters()),
    }


def all_reports(folder: Path) -> dict[str, Any]:
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    from nemo_rl.generator.ranks import as_rank
    from nemo_rl.generator.twin import build_twin, trace_rank, trace_twin

    before = {k: v for o in (dist, parallel_state) for k, v in vars(o).items() if callable(v)}
    out: dict[str, Any] = {}
    for kind in MODELS:
        table = table_of(kind)
        values = {name: torch.randn(meta.shape) for name, meta in table.items()}
        for tp in (1, 2, 4):
            spec = EngineSpec(str(folder / kind), tp, precision="float32")
            for rank in range(tp):
                with as_rank(spec, rank) as config:
                    trace = trace_twin(build_twin(config), config, table)
                    out[f"{kind} {tp} {rank}"] = report_of(config, trace, values)
    path, table = str(folder / "dense"), table_of("dense")
    one = EngineSpec(path, precision="float32")
    cast = trace_rank(EngineSpec(path, tp=2, precision="bfloat16"), 0, table)
    out["bfloat16"] = {"problems": cast.problems, "misc": sorted(cast.misc), "rows": len(cast.rows)}
    out["bfloat16"]["reason"] = cast.misc["model.norm.weight"]
    missing = {n: m for n, m in table.items() if n != "model.layers.0.self_attn.v_proj.weight"}
    unknown = {"model.layers.0.self_attn.r_proj.weight": TensorMeta((4,), torch.float32), **table}
    out["missing"] = trace_rank(one, 0, missing).problems
    out["unknown"] = trace_rank(one, 0, unknown).problems
    out["beside"] = beside_a_live_model(path, table)
    after = {k: v for o in (dist, parallel_state) for k, v in vars(o).items() if callable(v)}
    out["left behind"] = [k for k, v in before.items() if after.get(k) is not v] + ["group"] * dist.is_initialized()
    return out


def beside_a_live_model(path: str, table: TensorTable) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    from nemo_rl.generator.ranks import as_rank
    from nemo_rl.generator.twin import build_twin, trace_twin

    with as_rank(EngineSpec(path, precision="float32"), 0) as config:
        with set_current_vllm_config(config):
            live = initialize_model(vllm_config=config, model_config=config.model_config)
        layers = dict(config.compilation_config.static_forward_context)
        state = {n: t.clone() for n, t in [*live.named_parameters(), *live.named_buffers()]}
        problems = trace_twin(build_twin(config), config, table).problems
        kept = config.compilation_config.static_forward_context == layers and bool(layers)
        held = [*live.named_parameters(), *live.named_buffers()]
        same = all(torch.equal(t.view(-1).view(torch.uint8), state[n].view(-1).view(torch.uint8)) for n, t in held)
    return {"layers_kept": kept, "params_kept": same, "problems": problems}


if __name__ == "__main__":
    answer = json.dumps(all_reports(Path(sys.argv[1])))
    sys.stdout.write(answer + "\n")
