"""Simulated trainers against real Megatron models: every rank of every layout holds the same boxes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.model import Parallel, model_shape
from nemo_rl.trainer.pipeline import split_layers, stage_layers
from nemo_rl.trainer.shape import ModelShape
from nemo_rl.trainer.simulated import Coordinate, SimulatedTrainer, simulate
from tests.unit.trainer.models import make_config
from tests.unit.trainer.ranks import run_ranks
from tests.unit.trainer.real import real_rows, storage_less_rows

FOUR = {"num_hidden_layers": 4}
CASES: dict[str, tuple[str, dict[str, Any], Parallel]] = {
    "TP2": ("dense", {}, Parallel(2, tensor=2)),
    "TP4, 2 key/value heads": ("dense", {}, Parallel(4, tensor=4)),
    "TP4, 1 key/value head, tied, padded, biased": ("biased", {}, Parallel(4, tensor=4)),
    "PP2 uneven": ("dense", {}, Parallel(2, pipeline=2, pipeline_layers=(1, 2))),
    "PP3": ("dense", {}, Parallel(3, pipeline=3)),
    "PP4, embedding and loss alone": ("dense", FOUR, Parallel(4, pipeline=4, pipeline_layers=(0, 2, 2, 0))),
    "PP4 by Megatron's options": (
        "dense",
        {"num_hidden_layers": 6},
        Parallel(4, pipeline=4, first_layers=1, last_layers=1),
    ),
    "VPP2 x PP2": ("dense", FOUR, Parallel(2, pipeline=2, virtual_pipeline=2)),
    "VPP2 x PP2 uneven": (
        "dense",
        {"num_hidden_layers": 5},
        Parallel(2, pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2, 2, 0)),
    ),
    "tied, PP2": ("biased", FOUR, Parallel(2, pipeline=2)),
    "TP2 x PP2 x DP2": ("dense", FOUR, Parallel(8, tensor=2, pipeline=2)),
    "padded, TP4": ("dense", {"vocab_size": 121}, Parallel(4, tensor=4)),
    "EP2 x TP2 / ETP1": ("moe", {}, Parallel(2, tensor=2, expert=2)),
    "EP2 x ETP2 x TP2": ("moe", {}, Parallel(4, tensor=2, expert=2, expert_tensor=2)),
    "EP4 x DP2": ("moe", {}, Parallel(8, expert=4)),
    "EP2 x ETP2 x TP4 x PP2": ("moe", FOUR, Parallel(8, tensor=4, pipeline=2, expert=2, expert_tensor=2)),
    "EP4 x TP2 x PP2 x DP2": ("moe", FOUR, Parallel(8, tensor=2, pipeline=2, expert=4)),
    "TP2 x CP2": ("dense", {}, Parallel(4, tensor=2, context=2)),
    "TP2 x CP2 x EP8": ("moe", {}, Parallel(8, tensor=2, context=2, expert=8)),
    "EP8 x PP2": ("moe", FOUR, Parallel(16, pipeline=2, expert=8)),
    "TP8 x EP8 x PP4, 2 key/value heads": (
        "moe",
        {"num_attention_heads": 8, **FOUR},
        Parallel(32, tensor=8, pipeline=4, expert=8),
    ),
    "latent, TP2 x EP2 / ETP1": ("latent", {}, Parallel(2, tensor=2, expert=2)),
    "latent, EP4 x PP2 x DP2": ("latent", FOUR, Parallel(16, pipeline=2, expert=4)),
    "latent, full-rank queries, TP4 x EP2 x ETP2": (
        "latent",
        {"q_lora_rank": None},
        Parallel(4, tensor=4, expert=2, expert_tensor=2),
    ),
    "draft layer, TP2 x EP2": ("latent", {"num_nextn_predict_layers": 1}, Parallel(2, tensor=2, expert=2)),
    "draft layer, PP2 x VPP2": (
        "latent",
        {"num_nextn_predict_layers": 1, **FOUR},
        Parallel(2, pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 2, 1, 0)),
    ),
    "hybrid, EP2 x TP2": ("hybrid", {}, Parallel(2, tensor=2, expert=2)),
    "hybrid, padded, TP4 x ETP2 x EP2 x PP2": (
        "hybrid",
        {"vocab_size": 126},
        Parallel(8, tensor=4, pipeline=2, expert=2, expert_tensor=2),
    ),
    "hybrid of latent experts, EP4 x PP3 uneven": (
        "hybrid",
        {"moe_latent_size": 24},
        Parallel(12, pipeline=3, expert=4, pipeline_layers=(1, 3, 2)),
    ),
    "hybrid without experts, TP2": ("hybrid", {"hybrid_override_pattern": "M*-M"}, Parallel(2, tensor=2)),
    "shared expert, EP2 x TP2": ("shared", {}, Parallel(2, tensor=2, expert=2)),
}


def shape_of(name: str) -> ModelShape:
    kind, changes, _ = CASES[name]
    return model_shape(make_config(kind, **changes))


@pytest.fixture(scope="module")
def real() -> dict[str, list[list[tuple[str, Region]]]]:
    cases = [(shape_of(name), CASES[name][2]) for name in CASES]
    return dict(zip(CASES, run_ranks(real_rows, 1, cases, torch.float32)[0], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_what_megatron_says(real: dict[str, Any], name: str) -> None:
    found = simulate(shape_of(name), CASES[name][2], torch.float32)
    for rank, rows in enumerate(real[name]):
        assert set(found.rows[rank]) == set(rows), f"rank {rank}"
        assert len(found.rows[rank]) == len(rows)
    assert_tiled(found)


def test_deepseek_v3_at_its_real_size() -> None:
    """256 ranks, of which some are played by a Megatron model without storage."""
    config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])
    shape = model_shape(config)
    parallel = Parallel(256, pipeline=16, expert=16, pipeline_layers=(4,) * 15 + (1,))
    found = simulate(shape, parallel, torch.bfloat16)
    (real,) = run_ranks(storage_less_rows, 1, shape, parallel, [0, 37, 255])
    assert {rank: set(rows) for rank, rows in real.items()} == {rank: set(found.rows[rank]) for rank in real}
    elements = {fqn: math.prod(meta.shape) for fqn, meta in found.table.items()}
    held: dict[str, int] = dict.fromkeys(elements, 0)
    for fqn, region in {row for rows in found.rows for row in rows}:
        held[fqn] += region.volume
    assert held == elements


def test_deepseek_v3_has_the_elements_of_the_public_checkpoint() -> None:
    config = DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"])
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    count: Counter[torch.dtype] = Counter()
    for meta in families.table(model_shape(config), torch.bfloat16).values():
        count[meta.dtype] += math.prod(meta.shape)
    assert count == {
        torch.float8_e4m3fn: 680_571_043_840,
        torch.bfloat16: 3_918_786_560,
        torch.float32: 41_555_600,
    }


def assert_tiled(found: SimulatedTrainer) -> None:
    """Distinct boxes of all ranks cover every element of every tensor once."""
    hits = {fqn: torch.zeros(meta.shape, dtype=torch.int8) for fqn, meta in found.table.items()}
    for fqn, region in {row for rows in found.rows for row in rows}:
        hits[fqn][region.slices_in(Region.whole(found.table[fqn].shape))] += 1
    assert [fqn for fqn, count in hits.items() if not bool((count == 1).all())] == []


def test_ranks_are_numbered_as_megatron_numbers_them() -> None:
    """Tensor ranks first, then context, data, pipeline; expert-tensor ranks, then expert, expert-data, pipeline."""
    parallel = Parallel(32, tensor=2, context=2, pipeline=2, expert=4, expert_tensor=2)
    assert parallel.data == 4
    assert Coordinate.of(0, parallel) == Coordinate(0, 0, 0, 0, 0, 0, 0)
    assert Coordinate.of(7, parallel) == Coordinate(1, 1, 1, 0, 1, 3, 0)
    assert Coordinate.of(13, parallel) == Coordinate(1, 0, 3, 0, 1, 2, 1)
    assert Coordinate.of(22, parallel) == Coordinate(0, 1, 1, 1, 0, 3, 0)
    with pytest.raises(ValueError, match="rank 32 is not one of the 32"):
        Coordinate.of(32, parallel)


def test_replicas_share_rows_and_layouts() -> None:
    found = simulate(shape_of("TP2"), Parallel(8, tensor=2, context=2), torch.bfloat16)
    layouts = found.layouts()
    assert all(found.rows[rank] is found.rows[rank % 2] and layouts[rank] is layouts[rank % 2] for rank in range(8))
    assert found.rows[0] is not found.rows[1]
    assert [(layouts[1].fqn(i), layouts[1].region(i)) for i in range(len(layouts[1]))] == list(found.rows[1])
    assert {meta.dtype for meta in found.table.values()} == {torch.bfloat16}


def test_layouts_that_cannot_hold_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="no such trainer: .*wrong expert gradients"):
        simulate(shape_of("EP4 x DP2"), Parallel(2, tensor=2), torch.float32)
    with pytest.raises(ValueError, match="context parallel size = 3 x 1 x 2.*does not divide the 4 attention heads"):
        simulate(shape_of("TP2"), Parallel(8, tensor=3, context=2), torch.float32)


def test_stages_split_by_megatrons_options() -> None:
    assert split_layers(8, 4) == (2, 2, 2, 2)
    assert split_layers(8, 2, 2) == (2, 2, 2, 2)
    assert split_layers(7, 3, first=2, last=1) == (2, 4, 1)
    assert split_layers(6, 4, embedding=True, loss=True) == (1, 2, 2, 1)
    assert split_layers(2, 4, embedding=True, loss=True) == (0, 1, 1, 0)
    assert split_layers(14, 4, 2, embedding=True, loss=True) == (1, 2, 2, 2, 2, 2, 2, 1)
    assert split_layers(10, 3, 2, first=2) == (1, 2, 2, 1, 2, 2)
    assert stage_layers((1, 2, 2, 0), 2, 1) == [range(1, 3), range(5, 5)]
    for options, text in (
        ({"first": 2, "loss": True}, "exclude each other"),
        ({"first": 9}, "does not come out even"),
        ({"last": 1}, "7 of 8 layers are left for 3 stages"),
        ({"virtual": 3}, "virtual_pipeline_model_parallel_size=3 does not divide the layers of the stages"),
    ):
        with pytest.raises(ValueError, match=text):
            split_layers(8, 4, **options)
