"""Adapters on every rank of several tensor-parallel sizes: landing equals what vLLM's own code makes of the tensors.

vLLM keeps state per process; the ranks are looked at in one process of their own, which is this file as a program.
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

from nemo_rl.generator.options import AdapterConfig
from nemo_rl.generator.preflight import PREFLIGHT_ENV
from nemo_rl.refit.layout import TensorMeta, TensorTable
from nemo_rl.refit.region import Region
from tests.unit.generator.test_twin import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MODELS, ROOT

RANK = 4
SIZES = {
    "q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "gate_proj": (HIDDEN, FFN),
    "up_proj": (HIDDEN, FFN),
    "down_proj": (FFN, HIDDEN),
}
AT = "base_model.model.model.layers.1.self_attn."


def adapter_table(rank: int = RANK) -> TensorTable:
    table = {}
    for layer in range(2):
        for target, (size_in, size_out) in SIZES.items():
            part = "self_attn" if target[0] in "qvo" else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            table[f"{name}.lora_A.weight"] = TensorMeta((rank, size_in), torch.float32)
            table[f"{name}.lora_B.weight"] = TensorMeta((size_out, rank), torch.float32)
    return table


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODELS["dense"]))
    environ = {**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("alpha", [RANK, 10.0])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_landing_equals_the_engines_own_loading(reports: dict[str, Any], tp: int, alpha: float) -> None:
    for rank in range(tp):
        report = reports[f"{tp} {rank} {alpha}"]
        assert report["problems"] == [] and report["misc"] == []
        assert report["differing"] == [] and report["zero"] == ["k_proj"]
        assert report["units"] == (0 if alpha == RANK else 2 * len(SIZES))


def test_ranks_get_their_parts(reports: dict[str, Any]) -> None:
    rows = reports["4 3 10.0"]["rows"]
    assert [f"{AT}v_proj.lora_B.weight", [16, 0], [16, 4]] in rows  # two key heads over four ranks
    assert [f"{AT}o_proj.lora_A.weight", [0, 48], [4, 16]] in rows
    assert [f"{AT}o_proj.lora_B.weight", [0, 0], [64, 4]] in rows


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("half is missing", "stopped after"),
        ("layer is missing", "layers.1.self_attn.o_proj.lora_a_stacked.0: only a constant is written"),
        ("weight of the base", "stopped after"),
        ("other rank", f"is not that of an adapter of rank {RANK}"),
        ("layer that is none", "layers.7.self_attn.o_proj.lora_A.weight: the engine's adapter code puts it nowhere"),
        ("unknown target", "target 'score': the engine has no adapter layer"),
        ("random base", "the base has random weights"),
    ],
)
def test_faults_are_problems(reports: dict[str, Any], fault: str, words: str) -> None:
    assert reports[fault] and any(words in text for text in reports[fault])


def test_progress_is_checked(reports: dict[str, Any]) -> None:
    assert "not landed and scaled: adapters in place" in reports["nothing landed"]
    assert "lora_b_stacked.0" in reports["not scaled"]
    assert "was opened before" in reports["opened twice"]
    assert "tensors did not come" in reports["misc lacking"]
    assert "has no slot" in reports["place lost"]


# ---- the program


def ranks(path: str) -> dict[str, Any]:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from nemo_rl.generator.adapter import serve_adapter
    from nemo_rl.generator.ranks import EngineSpec, as_rank
    from nemo_rl.generator.twin import build_twin

    out: dict[str, Any] = {}
    for tp, rank in [(size, rank) for size in (1, 2, 4) for rank in range(size)]:
        with as_rank(EngineSpec(path, tp, precision="float32"), rank) as config:
            config.lora_config = LoRAConfig(max_lora_rank=8, max_cpu_loras=1, target_modules=list(SIZES))
            config.lora_config.verify_with_model_config(config.model_config)
            workers = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), {})
            workers.create_lora_manager(build_twin(config, "cpu"), config)
            serve_adapter(workers, AdapterConfig(RANK, 1.0, tuple(SIZES)))
            for alpha in (RANK, 10.0):
                out[f"{tp} {rank} {alpha}"] = report_of(workers, AdapterConfig(RANK, alpha, tuple(SIZES)))
            if tp == 1:
                out |= faults(workers)
    return out


def report_of(workers: Any, config: AdapterConfig) -> dict[str, Any]:
    """Land random tensors through units over garbage, and load them by vLLM's own code."""
    from nemo_rl.generator.adapter import AdapterLanding, projection_of, replace_adapter, stacked_tensors

    manager, table = workers._adapter_manager, adapter_table()
    values = {name: torch.randn(meta.shape) for name, meta in table.items()}
    for tensor in stacked_tensors(manager).values():
        tensor.normal_()
    landing = AdapterLanding(workers, config, {"base": "frozen"})
    declared = landing.declare(table)
    landing.begin(1)
    for unit in sorted(set(declared.layout.unit.tolist())):
        fill(landing, declared.layout, unit, values)
        landing.close(unit)
    landing.finish()
    landing.commit(1)
    got = {name: tensor.clone() for name, tensor in stacked_tensors(manager).items()}
    replace_adapter(workers, config, {name: tensor.clone() for name, tensor in values.items()})
    want = stacked_tensors(manager)
    rows = [(declared.layout.fqn(i), declared.layout.region(i)) for i in range(len(declared.layout))]
    return {
        "problems": declared.problems,
        "misc": sorted(declared.misc),
        "differing": [name for name in want if not torch.equal(want[name], got[name])],
        "zero": sorted({projection_of(manager, name) for name, tensor in want.items() if not tensor.any()}),
        "units": len(set(declared.layout.unit.tolist()) - {-1}),
        "rows": [[name, list(region.offsets), list(region.sizes)] for name, region in rows],
    }


def fill(landing: Any, layout: Any, unit: int, values: dict[str, torch.Tensor]) -> None:
    for row, view in landing.open(unit).items():
        full = values[layout.fqn(row)]
        view.copy_(full[layout.region(row).slices_in(Region.whole(tuple(full.shape)))])


def faults(workers: Any) -> dict[str, Any]:
    from nemo_rl.generator.adapter import AdapterLanding

    config, table = AdapterConfig(RANK, 10.0, tuple(SIZES)), adapter_table()

    def problems(table: TensorTable, config: AdapterConfig = config, base: Any = ("base",)) -> list[str]:
        return list(AdapterLanding(workers, config, dict.fromkeys(base, "frozen")).declare(table).problems)

    without = {name: meta for name, meta in table.items() if not name.startswith(f"{AT}o_proj")}
    half, more = {**without, f"{AT}o_proj.lora_A.weight": table[f"{AT}o_proj.lora_A.weight"]}, dict(table)
    for kind in "AB":
        more[f"{AT.replace('1', '7')}o_proj.lora_{kind}.weight"] = table[f"{AT}o_proj.lora_{kind}.weight"]
    out: dict[str, Any] = {
        "half is missing": problems(half),
        "layer is missing": problems(without),
        "weight of the base": problems({**table, "model.norm.weight": TensorMeta((HIDDEN,), torch.float32)}),
        "other rank": problems(adapter_table(8)),
        "layer that is none": problems(more),
        "unknown target": problems(table, AdapterConfig(RANK, 10.0, (*SIZES, "score"))),
        "random base": problems(table, base=()),
    }
    return out | progress(workers, config, table)


def progress(workers: Any, config: AdapterConfig, table: TensorTable) -> dict[str, str]:
    from nemo_rl.generator.adapter import AdapterLanding

    def said(call: Any, dtype: torch.dtype = torch.float32) -> str:
        landing = AdapterLanding(workers, config, {"base": "frozen"})
        landing.declare({name: TensorMeta(meta.shape, dtype) for name, meta in table.items()})
        landing.begin(1)
        try:
            call(landing)
        except RuntimeError as error:
            return str(error)
        return ""

    def scale_none(landing: Any) -> None:
        landing.open(-1)
        landing.close(-1)
        landing.finish()

    def lose_place(landing: Any) -> None:
        workers.remove_adapter(1)
        landing.finish()

    return {
        "nothing landed": said(lambda landing: landing.finish()),
        "not scaled": said(scale_none),
        "opened twice": said(lambda landing: [landing.open(0) for _ in range(2)]),
        "misc lacking": said(lambda landing: landing.load_misc([]), torch.float64),
        "place lost": said(lose_place),
    }


if __name__ == "__main__":
    answer = json.dumps(ranks(sys.argv[1]))
    sys.stdout.write(answer + "\n")
