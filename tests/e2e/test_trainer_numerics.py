"""Real Megatron ranks against transformers: the same logits, log-probabilities, gradients and checkpoints."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rl.refit.region import Region
from nemo_rl.trainer import families
from nemo_rl.trainer.model import Parallel, model_shape, read_config
from nemo_rl.trainer.simulated import simulate
from tests.unit.trainer.hybrid import hybrid_logits
from tests.unit.trainer.models import caches_of, logits_of, make_config, save_reference
from tests.unit.trainer.probe import (
    calibrate,
    load_and_export,
    move_bias,
    probe,
    refuse,
    resume,
    same_checkpoint,
    step_fails,
    unchecked,
)
from tests.unit.trainer.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

ROWS, LENGTH = 5, 17  # neither divides by micro-batches, data-parallel ranks or sequence shards
Model = Callable[[str], Path]

LAYOUTS: dict[str, tuple[str, Parallel]] = {
    "dense": ("dense", Parallel(1)),
    "dense TP2": ("dense", Parallel(2, tensor=2)),
    "dense PP2, 1 + 2 layers": ("dense", Parallel(2, pipeline=2, pipeline_layers=(1, 2))),
    "dense PP2 x VPP2, 1 + 1 + 1 + 0 layers": (
        "dense",
        Parallel(2, pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 1, 1, 0)),
    ),
    "dense PP3, embedding alone": ("dense", Parallel(3, pipeline=3, pipeline_layers=(0, 1, 2))),
    "dense DP2": ("dense", Parallel(2)),
    "dense TP2 x PP2, 2 + 1 layers": ("dense", Parallel(4, tensor=2, pipeline=2, pipeline_layers=(2, 1))),
    "moe EP2 x TP2": ("moe", Parallel(2, tensor=2, expert=2)),
    "moe EP2 x DP2": ("moe", Parallel(2, expert=2)),
    "moe TP2 x ETP2": ("moe", Parallel(2, tensor=2, expert_tensor=2)),
    "moe EP2 x TP2 x PP2": ("moe", Parallel(4, tensor=2, expert=2, pipeline=2, pipeline_layers=(1, 2))),
    "tied and padded, TP2, 1 key/value head": ("biased", Parallel(2, tensor=2)),
    "tied, PP2": ("biased", Parallel(2, pipeline=2, pipeline_layers=(2, 1))),
    "tied and padded, TP2 with sequence parallelism": ("biased", Parallel(2, tensor=2, sequence_parallel=True)),
    "latent, TP2 x EP2": ("latent", Parallel(2, tensor=2, expert=2)),
    "latent, EP2 x PP2": ("latent", Parallel(4, pipeline=2, expert=2, pipeline_layers=(1, 2))),
    "latent, full-rank queries, stretched positions, TP2 x ETP2": (
        "stretched",
        Parallel(2, tensor=2, expert_tensor=2),
    ),
    "shared expert, EP2 x TP2": ("shared", Parallel(2, tensor=2, expert=2)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Folder of a kind of model, made once, with what transformers computes beside it."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            run_ranks(save_reference, 1, kind, {}, str(made[kind]), ROWS, LENGTH)
        return made[kind]

    return make


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_transformers_computes(model: Model, out: Path, name: str) -> None:
    kind, parallel = LAYOUTS[name]
    folder = model(kind)
    ranks = run_ranks(probe, parallel.world_size, str(folder), parallel, str(out))
    for said in ranks:
        assert said["logits"] < 2e-6
        assert said["logprobs"] < 2e-6
        assert said["loss"] < 2e-6
        assert said["grad_norm"] < 1e-6
        assert said["grads"][0] < 5e-6, said["grads"][1]
        assert said["stable"], "views must stay valid over an optimizer step"
        assert said["moved"] > 1e-2, "the step must change the model"
        assert said["reference"] < 2e-6, "reference log-probabilities are those of the start weights"
        assert said["restored"], "the trained weights must come back bit for bit"
        assert said["metrics"] == ranks[0]["metrics"]
        assert torch.equal(said["after"], ranks[0]["after"])
    assert_held_exactly(folder, [said["rows"] for said in ranks])
    assert same_checkpoint(str(folder), str(out / "loaded")), "export must give the loaded checkpoint back"
    assert not same_checkpoint(str(folder), str(out / "stepped"))
    ids = torch.load(folder / "reference.pt")["ids"]
    exported = run_ranks(logits_of, 1, str(out / "stepped"), ids)[0]
    logprobs = torch.log_softmax(exported[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    assert float((logprobs - ranks[0]["after"][:, 1:]).abs().max()) < 5e-6


def assert_held_exactly(folder: Path, ranks: list[list[tuple[str, Region]]]) -> None:
    """Distinct boxes tile every tensor; what several ranks hold, they hold as the same box."""
    table = families.table(model_shape(read_config(folder)), torch.float32)
    hits = {fqn: torch.zeros(meta.shape, dtype=torch.int32) for fqn, meta in table.items()}
    for rows in ranks:
        assert len(set(rows)) == len(rows), "a rank holds a box once"
    for fqn, region in {row for rows in ranks for row in rows}:
        hits[fqn][region.slices_in(Region.whole(table[fqn].shape))] += 1
    assert [fqn for fqn, count in hits.items() if not bool((count == 1).all())] == []


@pytest.mark.parametrize("parallel", [Parallel(1), Parallel(2, tensor=2, expert=2)], ids=["1 rank", "TP2 x EP2"])
def test_a_hybrid_loaded_by_its_rule_computes_what_transformers_computes(model: Model, parallel: Parallel) -> None:
    folder = model("hybrid")
    wanted = torch.load(folder / "reference.pt")["logits"]
    for logits in run_ranks(hybrid_logits, parallel.world_size, str(folder), parallel):
        assert float((logits[..., : wanted.shape[-1]] - wanted).abs().max()) < 5e-6


@pytest.mark.parametrize("name", ["dense TP2", "moe EP2 x TP2"])
def test_micro_batches_do_not_change_a_step(model: Model, out: Path, name: str) -> None:
    kind, parallel = LAYOUTS[name]
    folder = str(model(kind))
    one, two = (
        run_ranks(partial(probe, micro_batch_size=size), parallel.world_size, folder, parallel, str(out / str(size)))[0]
        for size in (5, 3)
    )
    assert one["metrics"].keys() == two["metrics"].keys() == {"loss", "grad_norm"}
    assert all(abs(one["metrics"][k] / two["metrics"][k] - 1) < 1e-6 for k in one["metrics"])
    # Adam divides each gradient by its own size: elements near zero amplify rounding, the model as a whole does not.
    assert float((one["after"] - two["after"]).abs().max()) < 2e-3


@pytest.mark.parametrize("name", ["dense TP2", "moe EP2 x TP2", "latent, TP2 x EP2"])
def test_bfloat16_stays_near(model: Model, out: Path, name: str) -> None:
    kind, parallel = LAYOUTS[name]
    rounded = partial(probe, precision="bfloat16")
    said = run_ranks(rounded, parallel.world_size, str(model(kind)), parallel, str(out))[0]
    assert said["logprobs"] < 0.2
    assert said["loss"] < 0.02
    assert said["stable"] and said["restored"]
    assert said["moved"] > 1e-2


def test_a_routers_bias_is_held_alive_in_float32(model: Model) -> None:
    for biases in run_ranks(move_bias, 2, str(model("latent")), Parallel(2, tensor=2, expert=2)):
        assert [fqn for fqn, _, _ in biases] == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
        assert all(alive and abs(moved - 0.125) < 1e-6 for _, alive, moved in biases)


def test_scales_of_an_fp8_cache_are_calibrated_alike_by_every_layout(model: Model, out: Path, tmp_path: Path) -> None:
    caches = run_ranks(caches_of, 1, str(model("dense")))[0]
    folder = tmp_path / "cached"
    shutil.copytree(model("dense"), folder)
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    for precision, parallel in (
        ("float32", Parallel(1)),
        ("float32", Parallel(4, pipeline=2, pipeline_layers=(1, 2))),
        ("bfloat16", Parallel(2, tensor=2)),
    ):
        tolerance = 1e-5 if precision == "float32" else 0.05
        ranks = run_ranks(partial(calibrate, precision=precision), parallel.world_size, str(folder), parallel, str(out))
        exported = load_file(out / "model.safetensors")
        simulated = simulate(model_shape(read_config(folder)), parallel, torch.float32)
        for rank, said in enumerate(ranks):
            assert said["fresh"] and said["scales"] and set(said["rows"]) == set(simulated.rows[rank])
            for fqn, scale in said["scales"].items():
                assert scale == float(exported[fqn]), "all ranks of a stage hold the same"
                if fqn in caches:
                    assert abs(scale * 448 / caches[fqn] - 1) < tolerance, fqn
        assert {f for f in exported if f.endswith("_scale")} == {
            f"model.layers.{i}.self_attn.{kind}_scale" for i in range(3) for kind in "kvq"
        }
        assert ranks[0]["logprobs"] < (2e-6 if precision == "float32" else 0.2)
        shutil.rmtree(out)


def test_draft_layers_are_held_and_change_nothing(model: Model, out: Path, tmp_path: Path) -> None:
    plain, drafting = tmp_path / "plain", tmp_path / "drafting"
    for folder, count in ((plain, 0), (drafting, 1)):
        config = make_config("latent", num_nextn_predict_layers=count)
        config.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        table = families.table(model_shape(config), torch.float32)
        tensors = {
            f: torch.randn(m.shape, generator=torch.Generator().manual_seed(zlib.crc32(f.encode()))) / 8
            for f, m in table.items()
        }
        for name in ("embed_tokens", "shared_head.head"):
            original = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
            if count:
                tensors[f"model.layers.3.{name}.weight"] = tensors[original].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layout = Parallel(2, pipeline=2, pipeline_layers=(1, 2))
    with_draft = run_ranks(load_and_export, 2, str(drafting), layout, str(out))[0]
    without = run_ranks(load_and_export, 1, str(plain), Parallel(1), str(tmp_path / "again"))[0]
    assert float((with_draft - without).abs().max()) < 2e-6
    assert same_checkpoint(str(drafting), str(out))


def test_the_refused_expert_layout_would_train_wrongly(model: Model, out: Path) -> None:
    errors = run_ranks(unchecked, 2, str(model("moe")), Parallel(2, tensor=2, expert=1, expert_tensor=1), str(out))
    assert max(errors) > 0.1


def test_a_longer_run_learns_and_its_export_trains_on(model: Model, out: Path) -> None:
    losses, resumed = run_ranks(resume, 2, str(model("moe")), Parallel(2, tensor=2, expert=2), str(out))[0]
    assert losses[-1] < losses[0] - 1.0
    assert abs(resumed - losses[-1]) < 1e-5


def test_a_gradient_that_is_not_finite_changes_no_weight(model: Model) -> None:
    for message, unchanged in run_ranks(step_fails, 2, str(model("dense")), Parallel(2, tensor=2)):
        assert "a gradient is not finite, no weight was changed" in message
        assert unchanged


def test_all_ranks_refuse_before_they_meet(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model("moe"), folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (message,) = run_ranks(refuse, 1, str(folder), Parallel(2, tensor=2, expert=2))
    assert "truncated" in message
    (message,) = run_ranks(refuse, 1, str(folder), Parallel(2, tensor=2, expert=1))
    assert "wrong expert gradients" in message
