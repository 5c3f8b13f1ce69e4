"""Every model family at many ranks: following the trace gives, byte for byte, what vLLM's loader gives.

All ranks are traced one after the other in one process of their own; that process is this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.generator.preflight import PREFLIGHT_ENV
from nemo_rl.refit.trace import Trace
from tests.golden.families import CONFIGS, FAMILIES, checkpoint_table, random_tensors

ROOT = Path(__file__).parents[3]
PLAIN: list[dict[str, Any]] = [{}, {"tp": 2}, {"tp": 4}, {"pp": 2}]
EXPERTS: list[dict[str, Any]] = [
    {"tp": 2, "expert_parallel": True},
    {"dp": 3, "expert_parallel": True},
    {"dp": 2, "tp": 2, "pp": 2, "expert_parallel": True},
    {"dp": 2, "tp": 2},
]
REDUNDANT: dict[str, Any] = {"dp": 2, "tp": 2, "expert_parallel": True, "redundant_experts": 4}
ROUND_ROBIN: dict[str, Any] = {"tp": 4, "expert_parallel": True, "placement": "round_robin"}
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [*PLAIN, {"pp": 3, "stage_layers": (0, 2, 1)}],
    "qwen3_tied": PLAIN,
    "qwen2_bias": PLAIN,
    "fp8_kv_scales": [*PLAIN, {"kv_cache_dtype": "fp8"}],
    "qwen3_moe": [*PLAIN, *EXPERTS, REDUNDANT, {"tp": 2, "quantization": "fp8"}],
    "deepseek_v3": [*PLAIN, *EXPERTS, REDUNDANT, ROUND_ROBIN],
    "deepseek_v3_no_q_lora": PLAIN,
    "deepseek_mtp": [{"draft": True}, {"draft": True, "tp": 2}, {"tp": 2}],
    "nemotron_h": [*PLAIN, *EXPERTS, REDUNDANT],
    "nemotron_h_latent": PLAIN + EXPERTS[:1],
    "stacked_experts": PLAIN + EXPERTS,
    "gpt_oss": [*PLAIN, EXPERTS[0]],
    "block_fp8": [*PLAIN, *EXPERTS[:2], REDUNDANT],
}
COMPUTED = {
    "nemotron_h": {".A_log": ".A through cast", ".gate.weight": ".gate.weight through cast"},
    "nemotron_h_latent": {".A_log": ".A through cast", ".gate.weight": ".gate.weight through cast"},
    "gpt_oss": {".down_proj_bias": "zero_"},
    "block_fp8": {"weight_scale_inv": "aten::"},
}
"""Family -> end of a tensor's name -> words of the reason why it cannot travel in bulk."""


def ranks_of(layout: dict[str, Any]) -> Iterator[int]:
    """First and last rank, and one of the middle."""
    count = layout.get("dp", 1) * layout.get("pp", 1) * layout.get("tp", 1)
    yield from sorted({0, count // 2, count - 1})


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("vllm")
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), str(tmp_path_factory.mktemp("models"))],
        env={**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_no_family_is_left_out() -> None:
    assert LAYOUTS.keys() == FAMILIES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"fp8_kv_scales", "gpt_oss", "stacked_experts"}))
def test_trainers_export_what_the_checkpoint_holds(family: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from transformers import AutoConfig

    from nemo_rl.trainer import families
    from nemo_rl.trainer.model import model_shape

    FAMILIES[family](tmp_path)
    exported = families.table(model_shape(AutoConfig.from_pretrained(tmp_path)), torch.bfloat16)
    assert exported == checkpoint_table(family)


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_following_the_trace_equals_the_loader(reports: dict[str, Any], family: str) -> None:
    for layout in LAYOUTS[family]:
        for rank in ranks_of(layout):
            report = reports[f"{family} {layout} {rank}"]
            assert report["problems"] == [] and report["differing"] == [], (layout, rank)
            assert report["rows"] > 0 and report["moved_bytes"] + report["padding_bytes"] <= report["num_bytes"]


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_almost_every_byte_is_bulk(reports: dict[str, Any], family: str) -> None:
    known = COMPUTED.get(family, {})
    for layout in LAYOUTS[family]:
        for rank in ranks_of(layout):
            report = reports[f"{family} {layout} {rank}"]
            assert report["misc_share"] < 0.005
            for fqn, reason in report["misc"].items():
                assert any(fqn.endswith(end) and words in reason for end, words in known.items()), (fqn, reason)


def test_experts_lie_where_the_engine_places_them(reports: dict[str, Any]) -> None:
    """Eight experts over three ranks, over four in turn, and twelve physical ones over four."""
    assert [reports[f"deepseek_v3 {EXPERTS[1]} {r}"]["experts"] for r in (0, 1, 2)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [reports[f"deepseek_v3 {ROUND_ROBIN} {r}"]["experts"] for r in (0, 2, 3)] == [[0, 4], [2, 6], [3, 7]]
    spread = [reports[f"qwen3_moe {REDUNDANT} {r}"]["experts"] for r in (0, 2, 3)]
    assert spread == [[0, 1, 2], [0, 6, 7], [1, 2, 3]]


def test_an_expert_in_two_slots_of_a_rank_is_copied_to_both(reports: dict[str, Any]) -> None:
    crowded = reports["crowded"]
    assert crowded["problems"] == [] and crowded["differing"] == []
    assert crowded["copies of expert 0"] == 2 and crowded["copies of expert 7"] == 1


def test_experts_that_a_balancer_moved_stop_a_refit(reports: dict[str, Any]) -> None:
    first, last = (f"model.layers.{layer}.mlp.experts" for layer in (0, 2))
    told = "experts 1, 4 are not in the slots that the loader fills"
    assert reports["balanced"] == {
        "no balancer": [],
        "as loaded": [],
        "moved": [f"{first}: {told}", f"{last}: {told}"],
        "declared": [f"{first}: {told}", f"{last}: {told}"],
        "begun": f"version 2 cannot begin; stop balancing experts: {first}: {told}; {last}: {told}",
    }


def test_slots_that_the_loader_forgets_are_named(reports: dict[str, Any]) -> None:
    """vLLM fills redundant slots from single experts, but not from stacked ones: ranks 2 and 3 of 4 would lack some."""
    slot = 64 * 32 * 2
    for rank, range_ in ((1, None), (2, f"{2 * slot}:{3 * slot}"), (3, f"0:{3 * slot}")):
        told = [p for p in reports["forgotten"][str(rank)] if p.startswith("model.layers.1.") and "w2_weight" in p]
        what = "nothing is written" if rank == 3 else f"bytes {range_} of {3 * slot} written by no tensor"
        assert len(told) == (rank != 1) and all(what in text for text in told), told


def test_stages_hold_their_own_layers_alone(reports: dict[str, Any]) -> None:
    first, last = (reports[f"qwen3 {PLAIN[3]} {rank}"]["params"] for rank in (0, 1))
    assert any("embed_tokens" in name for name in first) and any("lm_head" in name for name in last)
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1"}
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"2"} and "model.norm.weight" in last


def test_planted_faults_are_seen(reports: dict[str, Any]) -> None:
    planted = reports["planted"]
    w2 = "model.layers.1.mlp.experts.routed_experts.w2_weight"
    assert planted["a row left out"] == [w2]
    assert planted["two experts swapped"] == [w2]
    assert planted["one element aside"] == [w2]
    size = 8 * 64 * 32 * 2
    assert planted["an expert missing"] == [
        "model.layers.1.mlp.experts.routed_experts.w2_weight: "
        f"bytes {3 * size // 8}:{4 * size // 8} of {size} written by no tensor"
    ]
    assert planted["stacked and single"] == [f"{w2}: bytes 0:{size} of {size} written more than once"]


def test_ranks_that_are_not_there_are_refused(reports: dict[str, Any]) -> None:
    assert reports["refused"] == {
        "rank 2": "rank 2 of an engine with 2 ranks (dp 1, pp 1, tp 2)",
        "redundant": "redundant experts need expert_parallel over several ranks",
        "precision": "precision is float32 or bfloat16, got int8",
        "draft": "a draft model lies whole on the last stage; describe it with pp 1",
        "stages": "stage_layers (2, 2) are 4 layers, but the model has 3",
    }


def test_a_rank_leaves_nothing_behind(reports: dict[str, Any]) -> None:
    """Not even one that vLLM refuses while its model is built: five key heads over two ranks."""
    assert reports["left behind"] == [] and "AssertionError" in reports["refused while built"]


# ---- the program


def all_reports(folder: Path) -> dict[str, Any]:
    from nemo_rl.generator.twin import EngineSpec
    from tests.golden.oracle import judge

    out: dict[str, Any] = {}
    refused_while_built(folder)
    before = borrowed()  # what vLLM's own imports change lies behind
    out["refused while built"] = refused_while_built(folder)
    for family, layouts in LAYOUTS.items():
        FAMILIES[family](folder / family)
        table = checkpoint_table(family)
        values = random_tensors(table)
        for layout in layouts:
            spec = EngineSpec(str(folder / family), **layout)
            for rank in ranks_of(layout):
                verdict = judge(spec, rank, table, values)
                out[f"{family} {layout} {rank}"] = {
                    **{k: getattr(verdict, k) for k in ("num_bytes", "moved_bytes", "padding_bytes", "misc_share")},
                    "differing": verdict.differing,
                    "problems": verdict.trace.problems,
                    "misc": dict(verdict.trace.misc),
                    "rows": len(verdict.trace.rows),
                    "params": sorted({row.param for row in verdict.trace.rows}),
                    "experts": experts_of(verdict.trace),
                }
    out["forgotten"], out["balanced"] = forgotten(folder), balanced(folder)
    out["left behind"] = [name for name, value in borrowed().items() if before[name] is not value]
    return out | {"crowded": crowded(folder), "planted": planted(folder), "refused": refused(folder)}


def borrowed() -> dict[str, object]:
    """What tracing replaces for a while."""
    import torch.distributed as dist
    from vllm.distributed import parallel_state, utils
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.fused_moe import config, expert_map_manager
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized
    from vllm.model_executor.models import utils as model_utils

    owners = (dist, parallel_state, utils, linear, config, expert_map_manager, fp8, unquantized)
    held = {f"{owner.__name__}.{name}": value for owner in owners for name, value in vars(owner).items()}
    held = {name: value for name, value in held.items() if callable(value)}
    held["post init"] = config.FusedMoEConfig.__post_init__
    held["missing layers"] = model_utils._model_to_pp_missing_layer_names
    held["rotary"] = rotary_embedding._ROPE_DICT
    return held | {"hook": sys.excepthook, "group": dist.is_initialized(), "tp": parallel_state._TP}


def refused_while_built(folder: Path) -> str:
    from nemo_rl.generator.twin import EngineSpec, trace_rank

    FAMILIES["qwen3"](folder / "odd")
    config = json.loads((folder / "odd" / "config.json").read_text())
    (folder / "odd" / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 5}))
    with pytest.raises(Exception) as caught:  # noqa: B017 - vLLM asserts
        trace_rank(EngineSpec(str(folder / "odd"), tp=2), 0, {})
    return caught.typename


def experts_of(trace: Trace) -> list[int]:
    down = (row.fqn.split(".") for row in trace.rows if row.fqn.endswith("down_proj.weight"))
    return sorted({int(name[name.index("experts") + 1]) for name in down if "experts" in name})


def crowded(folder: Path) -> dict[str, Any]:
    """Two ranks with 14 slots each for 8 experts: most are twice on a rank."""
    from nemo_rl.generator.twin import EngineSpec
    from tests.golden.oracle import judge

    table = checkpoint_table("qwen3_moe")
    spec = EngineSpec(str(folder / "qwen3_moe"), tp=2, expert_parallel=True, redundant_experts=20)
    verdict = judge(spec, 0, table, random_tensors(table, seed=1))
    copies = [row.fqn for row in verdict.trace.rows]
    return {
        "problems": verdict.trace.problems,
        "differing": verdict.differing,
        **{f"copies of expert {e}": copies.count(f"model.layers.0.mlp.experts.{e}.down_proj.weight") for e in (0, 7)},
    }


def forgotten(folder: Path) -> dict[int, Any]:
    from nemo_rl.generator.twin import EngineSpec, trace_rank

    spec = EngineSpec(str(folder / "stacked_experts"), **REDUNDANT)
    return {rank: trace_rank(spec, rank, checkpoint_table("stacked_experts")).problems for rank in (1, 2, 3)}


def balanced(folder: Path) -> dict[str, Any]:
    """Two balanced layers, whose experts 1 and 4 change slots."""
    from nemo_rl.generator.landing import VllmLanding
    from nemo_rl.generator.placement import moved_experts
    from nemo_rl.generator.ranks import as_rank
    from nemo_rl.generator.twin import EngineSpec, build_twin

    table = checkpoint_table("qwen3_moe")
    with as_rank(EngineSpec(str(folder / "qwen3_moe"), **REDUNDANT), 0) as config:
        model = build_twin(config, "cpu")
        landing = VllmLanding(model, config, config.model_config)
        out: dict[str, Any] = {"no balancer": moved_experts(model)}
        slots = torch.tensor([[e, e + 8 if e < 4 else -1, -1] for e in range(8)])
        states = [layer.mlp.experts.router.eplb_state for layer in model.model.layers]
        states[0].logical_to_physical_map, states[2].logical_to_physical_map = slots, slots.clone()
        out["as loaded"] = moved_experts(model)
        landing.declare(table)
        landing.begin(1)
        landing.commit(1)
        for state in (states[0], states[2]):
            state.logical_to_physical_map[1, 1], state.logical_to_physical_map[4, 0] = 4, 9
        out["moved"] = moved_experts(model)
        out["declared"] = [p for p in landing.declare(table).problems if "slots" in p]
        with pytest.raises(RuntimeError) as caught:
            landing.begin(2)
        return out | {"begun": str(caught.value)}


def planted(folder: Path) -> dict[str, Any]:
    from nemo_rl.generator.twin import EngineSpec, load_rank, trace_rank
    from tests.golden.oracle import differences, follow

    spec, table = EngineSpec(str(folder / "qwen3_moe")), checkpoint_table("qwen3_moe")
    values = random_tensors(table)
    trace, wanted = trace_rank(spec, 0, table), load_rank(spec, 0, values.items())
    at = "model.layers.1.mlp.experts"
    a, b = (next(r for r in trace.rows if r.fqn == f"{at}.{e}.down_proj.weight") for e in (0, 3))

    def with_rows(*instead: Any) -> list[str]:
        kept = [row for row in trace.rows if row not in (a, b)]
        return list(differences(wanted, follow(spec, 0, replace(trace, rows=(*kept, *instead)), values)))

    missing = {fqn: meta for fqn, meta in table.items() if fqn != b.fqn}
    doubled = table | {f"{at}.down_proj": replace(table[a.fqn], shape=(8, *table[a.fqn].shape))}
    return {
        "a row left out": with_rows(a),
        "two experts swapped": with_rows(replace(a, fqn=b.fqn), replace(b, fqn=a.fqn)),
        "one element aside": with_rows(a, replace(b, storage_offset=b.storage_offset + 1)),
        "an expert missing": trace_rank(spec, 0, missing).problems,
        "stacked and single": trace_rank(spec, 0, doubled).problems,
    }


def refused(folder: Path) -> dict[str, str]:
    from nemo_rl.generator.twin import EngineSpec, trace_rank

    def words(ask: Callable[[], object]) -> str:
        with pytest.raises(ValueError) as caught:
            ask()
        return str(caught.value).partition(", got EngineSpec")[0]

    path = str(folder / "qwen3")
    return {
        "rank 2": words(lambda: trace_rank(EngineSpec(path, tp=2), 2, {})),
        "redundant": words(lambda: EngineSpec(path, tp=2, redundant_experts=2)),
        "precision": words(lambda: EngineSpec(path, precision="int8")),
        "draft": words(lambda: EngineSpec(path, pp=2, draft=True)),
        "stages": words(lambda: trace_rank(EngineSpec(path, pp=2, stage_layers=(2, 2)), 0, {})),
    }


if __name__ == "__main__":
    answer = json.dumps(all_reports(Path(sys.argv[1])))
    sys.stdout.write(answer + "\n")
