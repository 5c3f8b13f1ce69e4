"""Whole tensors that are fed to the ways of others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_rl.refit.base import World
from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.model import Parallel
from scripts.bench.cases import Case, Engines
from scripts.bench.model import DTYPE, BenchSource, Store, trainer_rows
from scripts.bench.rank import Held
from scripts.bench.values import Cell, expected
from scripts.bench.whole import Gathered, by_layer, owners


def held(parallel: Parallel) -> Held:
    case = Case("c", "small MoE", parallel, Engines(1), ())
    table = families.table(case.shape, DTYPE)
    source = BenchSource(table, trainer_rows(case.shape, parallel, 0, Store(torch.device("cpu"))))
    return Held(case, World.of(parallel.world_size, 1), source, None, table, {})


def test_one_trainer_gives_every_tensor_whole() -> None:
    """Query, key and value heads are put together from their groups."""
    one = held(Parallel(1))
    one.renew()
    gathered = Gathered(one, dist.HashStore(), 0, torch.device("cpu"))
    found = dict(gathered.tensors())
    assert list(found) == list(one.table)
    for fqn, tensor in found.items():
        want = expected(Cell(fqn, one.table[fqn].shape, Region.whole(one.table[fqn].shape), tensor), one.weights)
        assert torch.equal(tensor.view(torch.int16), want), fqn
    gathered.close()


def test_the_first_trainer_that_holds_a_tensor_whole_gives_it() -> None:
    found = owners(held(Parallel(2, expert=2)))
    assert {found[f"model.layers.3.mlp.experts.{e}.up_proj.weight"] for e in (3, 4, 5)} == {1}
    assert {rank for fqn, rank in found.items() if ".experts." not in fqn} == {0}
    stages = owners(held(Parallel(3, pipeline=3)))
    assert stages["model.embed_tokens.weight"] == 0 and stages["lm_head.weight"] == 2
    with pytest.raises(ValueError, match="these are cut: lm_head.weight"):
        owners(held(Parallel(2, tensor=2, expert_tensor=2)))


def test_layers_go_one_by_one() -> None:
    table = held(Parallel(1)).table
    groups = list(by_layer(table))
    assert [fqn for names in groups for fqn in names] == list(table)
    assert sum(len(names) > 1 for names in groups) == 6
