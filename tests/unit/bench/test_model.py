"""The benchmark times the real layouts: trainers hold what Megatron holds, generators what vLLM's loaders fill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.generator.preflight import PREFLIGHT_ENV
from nemo_rl.refit.base import World
from nemo_rl.refit.planner import plan_refit
from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.layout import MegatronSource
from nemo_rl.trainer.model import Parallel, model_shape
from nemo_rl.trainer.shape import ModelShape
from nemo_rl.trainer.simulated import simulate
from scripts.bench.cases import CASES, MODELS, SMALL, Case, Engines
from scripts.bench.model import (
    DTYPE,
    BenchLanding,
    BenchSource,
    Placed,
    Store,
    generator_rows,
    trainer_bytes,
    trainer_rows,
)
from tests.unit.trainer.ranks import run_ranks
from tests.unit.trainer.real import _build, playing

ROOT = Path(__file__).parents[3]
CPU, META = torch.device("cpu"), torch.device("meta")
MESHES = {
    "MoE": [
        Parallel(2, expert=2),
        Parallel(2, tensor=2, expert=2),
        Parallel(2, tensor=2, expert_tensor=2),
        Parallel(3, pipeline=3),
    ],
    "dense": [Parallel(2, tensor=2), Parallel(2, pipeline=2), Parallel(1)],
}
TRAINERS = [(f"small {kind}", parallel) for kind, meshes in MESHES.items() for parallel in meshes]
ENGINES = [("small MoE", 2), ("small MoE", 1), ("small dense", 2), ("small dense", 1)]
Place = tuple[str, Region, int, tuple[int, ...], int]
"""Tensor, box, first element in its storage, strides, elements of the storage."""


def place(fqn: str, region: Region, view: torch.Tensor) -> Place:
    elements = view.untyped_storage().nbytes() // view.element_size()
    return fqn, region, view.storage_offset(), view.stride(), elements


def config_of(shape: ModelShape) -> dict[str, Any]:
    """As a checkpoint's config.json."""
    moe = {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_ffn_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return {
        "architectures": [shape.architecture],
        "model_type": "qwen3_moe" if shape.is_moe else "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_size,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16",
        **(moe if shape.is_moe else {}),
    }


# ---- models


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_that_a_configuration_of_them_is_read_as(name: str) -> None:
    from transformers import Qwen3Config, Qwen3MoeConfig

    said = config_of(MODELS[name])
    read = model_shape((Qwen3MoeConfig if MODELS[name].is_moe else Qwen3Config)(**said))
    assert read == MODELS[name]


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-30B-A3B", 30.53), ("Qwen3-4B", 4.02), ("Qwen3-0.6B", 0.596)])
def test_models_have_their_published_number_of_parameters(name: str, billions: float) -> None:
    elements = sum(meta.num_bytes // 2 for meta in families.table(MODELS[name], DTYPE).values())
    assert elements / 1e9 == pytest.approx(billions, rel=2e-3)


# ---- trainers


@pytest.mark.parametrize(("name", "parallel"), TRAINERS)
def test_trainers_hold_what_the_rule_says(name: str, parallel: Parallel) -> None:
    found = simulate(MODELS[name], parallel, DTYPE)
    for rank in range(parallel.world_size):
        rows = trainer_rows(MODELS[name], parallel, rank, Store(META))
        assert sorted((f, r.offsets, r.sizes) for f, r, _ in rows) == sorted(
            (f, r.offsets, r.sizes) for f, r in found.rows[rank]
        )


def real_places(rank: int, meet: str, cases: Sequence[tuple[ModelShape, Parallel]]) -> list[list[list[Place]]]:
    """In a child: for each case and rank, where a built Megatron model holds its boxes."""
    out: list[list[list[Place]]] = []
    for shape, parallel in cases:
        out.append([])
        for played in range(parallel.world_size):
            with playing(played, shape, parallel):
                source = MegatronSource(_build(shape, parallel, torch.float32), shape, torch.float32)
                out[-1].append([place(h.fqn, h.region, h.view) for h in source.holdings()])
    return out


def test_trainers_hold_it_as_megatron_does() -> None:
    """Same boxes at the same places of parameters of the same size, and no others."""
    real = run_ranks(real_places, 1, [(MODELS[name], parallel) for name, parallel in TRAINERS])[0]
    for (name, parallel), ranks in zip(TRAINERS, real, strict=True):
        for rank, places in enumerate(ranks):
            rows = trainer_rows(MODELS[name], parallel, rank, Store(CPU))
            mine = {(p[0], p[1]): p for p in (place(*row) for row in rows)}
            assert mine == {(p[0], p[1]): p for p in places}, (name, parallel, rank)


@pytest.mark.parametrize("one_buffer", [False, True])
@pytest.mark.parametrize(("name", "parallel"), TRAINERS)
def test_a_trainers_memory_is_its_rows(name: str, parallel: Parallel, one_buffer: bool) -> None:
    """Every element of every parameter belongs to one row, and a buffer has room for all."""
    for rank in range(parallel.world_size):
        room = trainer_bytes(MODELS[name], parallel, rank) if one_buffer else 0
        store = Store(CPU, room)
        assert_filled_once(trainer_rows(MODELS[name], parallel, rank, store), store)
        if one_buffer:
            assert len({t.untyped_storage().data_ptr() for t in store.parameters.values()}) == 1


def assert_filled_once(rows: Sequence[Placed], store: Store) -> None:
    for tensor in store.parameters.values():
        tensor.zero_()
    for _, _, view in rows:
        view.add_(1)
    assert all(bool((tensor == 1).all()) for tensor in store.parameters.values())


# ---- generators


def traced(folder: str) -> None:
    """As a program, in a process without distributed state: what vLLM's own loaders do on each rank of `ENGINES`."""
    from nemo_rl.generator.ranks import EngineSpec
    from nemo_rl.generator.twin import trace_rank

    said = []
    for number, (name, tp) in enumerate(ENGINES):
        table = families.table(MODELS[name], DTYPE)
        for rank in range(tp):
            trace = trace_rank(EngineSpec(f"{folder}/{number}", tp=tp), rank, table)
            assert not trace.misc and not trace.problems and not trace.padding
            rows = [
                [row.fqn, row.region.offsets, row.region.sizes, row.param, row.storage_offset, row.stride]
                for row in trace.rows
            ]
            said.append(rows)
    sys.stderr.write("ANSWER " + json.dumps(said) + "\n")


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("models")
    for number, (name, _) in enumerate(ENGINES):
        (folder / str(number)).mkdir()
        (folder / str(number) / "config.json").write_text(json.dumps(config_of(MODELS[name])))
    environ = {**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ANSWER ")]
    assert done.returncode == 0 and lines, done.stderr[-2000:]
    found: list[Any] = json.loads(lines[-1].removeprefix("ANSWER "))
    return found


def test_generators_hold_what_vllms_loaders_fill(loaders: list[Any]) -> None:
    """Same boxes at the same places of parameters of the same names, but for a module that some versions have more."""
    ranks = [(name, tp, rank) for name, tp in ENGINES for rank in range(tp)]
    for (name, tp, rank), rows in zip(ranks, loaders, strict=True):
        store = Store(CPU)
        mine = generator_rows(MODELS[name], Engines(tp), rank, store)
        names = {tensor.untyped_storage().data_ptr(): param for param, tensor in store.parameters.items()}
        found = [
            [
                fqn,
                list(r.offsets),
                list(r.sizes),
                names[v.untyped_storage().data_ptr()],
                v.storage_offset(),
                list(v.stride()),
            ]
            for fqn, r, v in mine
        ]
        for row in rows:
            row[3] = row[3].replace(".experts.routed_experts.", ".experts.")
        assert sorted(found) == sorted(rows), (name, tp, rank)


@pytest.mark.parametrize(("name", "tp"), ENGINES)
def test_a_generators_memory_is_its_rows(name: str, tp: int) -> None:
    for rank in range(tp):
        store = Store(CPU)
        assert_filled_once(generator_rows(MODELS[name], Engines(tp), rank, store), store)


def test_replicas_hold_the_same() -> None:
    rows = [generator_rows(MODELS["small MoE"], Engines(2, 2), rank, Store(META)) for rank in range(4)]
    boxes = [[(f, r) for f, r, _ in each] for each in rows]
    assert boxes[0] == boxes[2] and boxes[1] == boxes[3] and boxes[0] != boxes[1]


# ---- the two ends


@pytest.mark.parametrize("case", CASES + SMALL, ids=lambda case: case.name)
def test_every_case_has_a_plan_that_is_proven(case: Case) -> None:
    """On small models of the same kind, in the same layouts."""
    shape = MODELS["small MoE" if case.shape.is_moe else "small dense"]
    table, world = families.table(shape, DTYPE), World.of(case.trainers.world_size, case.engines.num_ranks)
    sources = simulate(shape, case.trainers, DTYPE).layouts()
    landings = {}
    for rank in world.generators:
        rows = generator_rows(shape, case.engines, rank - len(world.trainers), Store(META))
        landings[rank] = BenchLanding(table, rows, Store(META)).declare(table)
    plan = plan_refit(world, sources, landings, table, bucket_bytes=1 << 20)
    assert not plan.misc_fqns and plan.required_bytes == sum(said.layout.num_bytes for said in landings.values())


def test_a_landing_tells_right_from_wrong() -> None:
    shape, table = MODELS["small MoE"], families.table(MODELS["small MoE"], DTYPE)
    store = Store(CPU)
    landing = BenchLanding(table, generator_rows(shape, Engines(2), 1, store), store)
    source = BenchSource(table, trainer_rows(shape, Parallel(1), 0, Store(CPU)))
    source.load(3)
    landing.load_misc((fqn, view) for fqn, _, view in source.rows if view.shape == table[fqn].shape)
    by_group = [row for row in source.rows if row[2].shape != table[row[0]].shape]
    for fqn in {row[0] for row in by_group}:
        whole = torch.empty(table[fqn].shape, dtype=DTYPE)
        for _, region, view in (row for row in by_group if row[0] == fqn):
            whole[region.slices_in(Region.whole(table[fqn].shape))] = view
        landing.load_misc([(fqn, whole)])
    assert landing.wrong(3) == [] and len(landing.wrong(4)) == len(landing.rows)
    store.parameters["model.layers.1.mlp.experts.w2_weight"].view(torch.int16)[2, 5, 7] ^= 1
    assert landing.wrong(3) == ["model.layers.1.mlp.experts.2.down_proj.weight"]
    landing.scramble()
    assert len(landing.wrong(3)) == len(landing.rows)


if __name__ == "__main__":
    traced(sys.argv[1])
