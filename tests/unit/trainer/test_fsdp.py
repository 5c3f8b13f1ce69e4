"""FSDP2 trainers of real transformers modules: what they hold is the checkpoint's, stays live, and is as simulated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.layout import Holding, TensorMeta, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.refit.session import RefitSession
from nemo_rl.trainer import families
from nemo_rl.trainer.fsdp import FsdpSource, simulate_fsdp
from nemo_rl.trainer.model import model_shape
from tests.unit.refit.simulated import PlainLanding
from tests.unit.trainer.models import make_config, make_model, token_batch
from tests.unit.trainer.ranks import run_ranks
from tests.unit.trainer.test_simulated import assert_tiled

CASES: dict[str, tuple[str, int, int, int]] = {
    "dense, 3 ranks": ("dense", 3, 1, 0),
    "moe, 3 ranks": ("moe", 3, 1, 0),
    "latent, 3 ranks": ("latent", 3, 1, 0),
    "tied, 2 x 2 ranks": ("biased", 4, 2, 0),
    "shared, 4 ranks on dim 1": ("shared", 4, 1, 1),
}


def sharded(kind: str, replicas: int, dim: int) -> tuple[torch.nn.Module, torch.distributed.DeviceMesh]:
    model = make_model(make_config(kind))
    size = dist.get_world_size()
    shape, names = ((replicas, size // replicas), ("replica", "shard")) if replicas > 1 else ((size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

    def place(parameter: torch.nn.Parameter) -> Shard:
        return Shard(min(dim, parameter.ndim - 1))

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place if dim else None)
    fully_shard(model, mesh=mesh, shard_placement_fn=place if dim else None)
    return model, mesh


def hold(rank: int, meet: str, cases: list[tuple[str, int, int]], folder: str) -> list[dict[str, Any]]:
    """In a child: for each case, what this rank holds against the saved checkpoint, before and after a step."""
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=int(Path(folder).name))
    out = []
    for kind, replicas, dim in cases:
        model, _ = sharded(kind, replicas, dim)
        source = FsdpSource(model)
        saved = load_file(Path(folder).parent / kind / "model.safetensors")
        held = source.holdings()
        said: dict[str, Any] = {"rows": [(h.fqn, h.region) for h in held], "table": source.table()}
        said["unused"] = source.unused()
        said["equal"] = all(torch.equal(h.view, part_of(saved, h.fqn, h.region)) for h in held)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ids, _ = token_batch(2, 8, 100, seed=rank)
        model(ids).logits.pow(2).mean().backward()
        optimizer.step()
        after = {(h.fqn, h.region): h.view for h in FsdpSource(model).holdings()}
        said["alive"] = all(torch.equal(h.view, after[h.fqn, h.region]) for h in held)
        said["moved"] = sum(not torch.equal(h.view, part_of(saved, h.fqn, h.region)) for h in held)
        said["gathered"] = refusal(source, model, ids)
        said["follows"] = follows(source, model)
        out.append(said)
    dist.destroy_process_group()
    return out


def refusal(source: FsdpSource, model: torch.nn.Module, ids: torch.Tensor) -> str:
    """What the source says while layers are gathered; it goes on once they are sharded again."""
    before = source.holdings()
    with torch.no_grad():
        model(ids)
    said = "nothing"
    try:
        source.holdings()
    except ValueError as error:
        said = str(error)
    model.reshard()
    return said if source.holdings() == before else "other holdings"


def follows(source: FsdpSource, model: torch.nn.Module) -> bool:
    """Whether holdings are the same objects while storage stays, and views of what the model has where it went."""
    before = source.holdings()
    same = source.holdings() == before
    model.double().float()
    moved = anew(source, model, before)
    before = source.holdings()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()
    return same and moved and anew(source, model, before)


@torch.no_grad()
def anew(source: FsdpSource, model: torch.nn.Module, before: list[Holding]) -> bool:
    """Whether all lies in what the model has, which is nothing of what it had `before`."""
    local = [*(p.to_local() for p in model.parameters()), *model.buffers()]
    held, old, new = (
        {t.untyped_storage().data_ptr() for t in some} for some in (local, views(before), views(source.holdings()))
    )
    return new <= held and held.isdisjoint(old)


def views(holdings: list[Holding]) -> list[torch.Tensor]:
    return [h.view for h in holdings]


def part_of(tensors: dict[str, torch.Tensor], fqn: str, region: Region) -> torch.Tensor:
    return tensors[fqn][region.slices_in(Region.whole(tuple(tensors[fqn].shape)))]


def save(rank: int, meet: str, kinds: list[str], folder: str) -> None:
    for kind in kinds:
        make_model(make_config(kind)).save_pretrained(Path(folder) / kind)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank says; the cases of one number of ranks run in the same processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    run_ranks(save, 1, sorted({kind for kind, *_ in CASES.values()}), str(folder))
    out: dict[str, list[dict[str, Any]]] = {}
    for size in sorted({size for _, size, *_ in CASES.values()}):
        names = [name for name, case in CASES.items() if case[1] == size]
        cases = [(CASES[n][0], *CASES[n][2:]) for n in names]
        ranks = run_ranks(hold, size, cases, str(folder / str(size)))
        out |= {name: [said[i] for said in ranks] for i, name in enumerate(names)}
    return out


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_the_checkpoint_as_simulated(held: dict[str, Any], name: str) -> None:
    kind, size, replicas, dim = CASES[name]
    table = families.table(model_shape(make_config(kind)), torch.float32)
    simulated = simulate_fsdp(table, size, dim=dim, replicas=replicas)
    assert_tiled(simulated)
    for rank, said in enumerate(held[name]):
        assert said["table"] == table and list(said["table"]) == list(table)
        assert set(said["rows"]) == set(simulated.rows[rank]) and len(said["rows"]) == len(simulated.rows[rank])
        assert said["equal"], "views hold the checkpoint's values"
        assert said["alive"], "an optimizer step changes the values in the views"
        assert said["moved"] > len(said["rows"]) // 2
        assert said["follows"], "a shard in other storage, or in place of another one, is found again"
        assert "call reshard()" in said["gathered"]
        assert said["unused"] == ({"lm_head.weight": "tied to model.embed_tokens.weight"} if kind == "biased" else {})


def refit(rank: int, meet: str, port: int) -> list[dict[tuple[str, Region], torch.Tensor]]:
    """In a child: ranks 0 to 2 train, rank 3 receives; what each holds after the refits before and after a step."""
    world, store, options = World.of(3, 1), ("127.0.0.1", port), RefitOptions(bucket_bytes=4096, deadline_s=60)
    table = families.table(model_shape(make_config("latent")), torch.float32)
    rows = [(fqn, Region.whole(meta.shape)) for fqn, meta in table.items()]
    landing, source = PlainLanding(rows), None
    if rank < 3:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=3)
        model, _ = sharded("latent", 1, 0)
        source = FsdpSource(model)
    session = RefitSession(rank, world, store, options, source, None if source else landing)
    session.connect()
    session.plan()
    out = []
    for version in (0, 1):
        if source is None:
            landing.scramble()
        elif version:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.5)
        assert session.refit(version).verified
        held = zip(rows, landing.storage, strict=True) if source is None else _held(source)
        out.append({row: view.clone() for row, view in held})
    session.close()
    return out


def _held(source: FsdpSource) -> Iterator[tuple[tuple[str, Region], torch.Tensor]]:
    return (((h.fqn, h.region), h.view) for h in source.holdings())


def test_a_refit_brings_live_shards_to_a_generator() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    *trainers, received = run_ranks(refit, 4, store.port)
    for version in (0, 1):
        whole = {fqn: tensor for (fqn, _), tensor in received[version].items()}
        assert set(whole) == set(families.table(model_shape(make_config("latent")), torch.float32))
        for held in trainers:
            assert all(torch.equal(part_of(whole, *row), view) for row, view in held[version].items())
    first, second = ({f: t for (f, _), t in received[v].items()} for v in (0, 1))
    assert {f for f in first if torch.equal(first[f], second[f])} == {
        f for f in first if f.endswith("e_score_correction_bias")
    }


def test_replicas_share_rows() -> None:
    table = {"a": TensorMeta((5, 4), torch.float32), "b": TensorMeta((), torch.float32)}
    trainer = simulate_fsdp(table, 4, replicas=2)
    assert trainer.rows[0] is trainer.rows[2] and trainer.rows[1] is trainer.rows[3]
    assert trainer.rows[0] == (("a", Region((0, 0), (3, 4))), ("b", Region((), ())))
    assert trainer.rows[1] == (("a", Region((3, 0), (2, 4))), ("b", Region((), ())))
    with pytest.raises(ValueError, match="3 replicas do not divide 4 ranks"):
        simulate_fsdp(table, 4, replicas=3)


def test_stacked_experts_may_stay_stacked() -> None:
    module = torch.nn.Module()
    module.experts = torch.nn.Module()
    module.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 2, 3))
    assert FsdpSource(module, rename=lambda n: f"m.{n}", stacked_experts=True).table().keys() == {"m.experts.down_proj"}
    assert len(FsdpSource(module, rename=lambda n: f"m.{n}").table()) == 4
    table = {"m.experts.down_proj": TensorMeta((4, 2, 3), torch.float32)}
    assert simulate_fsdp(table, 2).rows[1] == (("m.experts.down_proj", Region((2, 0, 0), (2, 2, 3))),)


def test_adapters_of_a_frozen_base_travel_alone() -> None:
    module = torch.nn.Module()
    module.q_proj = torch.nn.Linear(4, 6, bias=False).requires_grad_(False)
    module.q_proj.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2, bias=False)})
    module.score = torch.nn.Linear(4, 1)
    source = FsdpSource(module, adapters_only=True, not_generated_from=("score",))
    assert list(source.table()) == ["q_proj.lora_A.weight"]
    assert source.unused() == {
        "q_proj.weight": "frozen: adapters alone are trained",
        "score.weight": "not generated from",
        "score.bias": "not generated from",
    }
    assert source.holdings()[0].view.data_ptr() == module.q_proj.lora_A["default"].weight.data_ptr()


def test_unknown_experts_are_refused_by_name() -> None:
    module = torch.nn.Module()
    module.experts = torch.nn.Module()
    module.experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"model\.experts\.gate_up_proj_bias \(2, 8\): experts come as"):
        FsdpSource(module, rename=lambda name: f"model.{name}")


def gathered(rank: int, meet: str) -> str:
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=1)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    weight = distribute_tensor(module[0].weight.data, init_device_mesh("cpu", (1,)), [Shard(0)])
    module[0].weight = torch.nn.Parameter(weight)
    try:
        FsdpSource(module)
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "no error"


def test_a_module_that_is_gathered_is_refused() -> None:
    (said,) = run_ranks(gathered, 1)
    assert "3 of 4 parameters are no DTensors, the first 0.bias" in said and "reshard()" in said


def test_the_tables_order_is_natural() -> None:
    module = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(11))
    assert list(FsdpSource(module).table()) == natural_order(f"{i}.{n}" for i in range(11) for n in ("weight", "bias"))
