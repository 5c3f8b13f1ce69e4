"""`nemo-rl plan`: from a configuration to text, page, picture and saved plan, without engines or processes of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rl import cli
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.generator.simulated import SimulatedGenerator
from nemo_rl.planview import build
from nemo_rl.planview.model import load_view
from nemo_rl.refit.base import Declaration
from nemo_rl.refit.layout import Layout
from nemo_rl.refit.region import Region
from nemo_rl.trainer.model import Parallel, model_shape, read_config

ROOT = Path(__file__).parents[2]
MOE = ROOT / "examples" / "configs" / "grpo_qwen3_moe_tiny_cpu.yaml"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Everything that one planning of the example configuration writes."""
    folder = tmp_path_factory.mktemp("plan")
    outputs = [f"--{kind}={folder / f'plan.{kind}'}" for kind in ("html", "png", "json")]
    assert cli.main(["plan", "--config", str(MOE), *outputs]) == 0
    return folder


def test_the_example_is_planned_whole(saved):
    view = load_view(saved / "plan.json")
    assert (len(view.trainers), len(view.generators)) == (2, 2)
    assert view.title == "grpo_qwen3_moe_tiny_cpu: TP2 x EP2 -> TP2"
    assert not view.misc and not view.unused and view.bulk_share == 1.0
    table_bytes = sum(g.held_bytes for g in view.generators)
    assert view.matrix.sum() == view.bulk_bytes == view.required_bytes == table_bytes > 0
    assert any("experts.*.down_proj" in line and "ep one" in line for line in view.layouts["trainer"])
    assert any("experts.*.down_proj" in line and "tp Shard(1)" in line for line in view.layouts["generators (TP2)"])
    assert (saved / "plan.html").read_text().startswith("<!doctype html>")
    assert (saved / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_saved_plans_are_compared(saved, capsys, tmp_path):
    path = str(saved / "plan.json")
    assert cli.main(["plan", "--diff", path, path]) == 0
    assert "one plan, byte for byte" in capsys.readouterr().out
    tree = json.loads((saved / "plan.json").read_text())
    tree["num_rounds"] += 1
    tree["digest"] = "other"
    (tmp_path / "b.json").write_text(json.dumps(tree))
    assert cli.main(["plan", "--diff", path, str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "one plan" not in out and "rounds" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--model", "examples/configs"], "config.json is missing"),
        (["--model", "examples/models/qwen3_30b_a3b", "--trainer", "tp=3"], "tensor_model_parallel_size=3"),
        (["--model", "examples/models/qwen3_30b_a3b", "--trainer", "pt=2"], "write key=value with tp, pp"),
        (["--model", "examples/models/qwen3_30b_a3b", "--generator", "tp=x"], "'x' in 'tp=x': give a whole number"),
        (["--diff", "nowhere.json", "b.json"], "nowhere.json: [Errno 2]"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_reason(arguments, text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nemo-rl plan: ") and text in said


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", Parallel(1)),
        ("tp=2,cp=2,dp=3", Parallel(12, tensor=2, context=2, expert_tensor=2, sequence_parallel=True)),
        ("ep=16,pp=16", Parallel(256, pipeline=16, expert=16, pipeline_layers=(4,) * 13 + (3,) * 3)),
        ("ep=4,tp=2,etp=2", Parallel(8, tensor=2, expert=4, expert_tensor=2, sequence_parallel=True)),
        ("tp=8,ep=4", Parallel(8, tensor=8, expert=4, expert_tensor=1, sequence_parallel=True)),
        (
            "pp=2,vpp=2,layers=16:15:15:15",
            Parallel(2, pipeline=2, virtual_pipeline=2, pipeline_layers=(16, 15, 15, 15)),
        ),
    ],
)
def test_trainers_as_people_write_them(text, want):
    assert build.parse_trainer(text, 61, moe=True) == want


def test_generators_as_people_write_them():
    found = build.parse_generator("tp=4,dp=2,ep=1,replicas=3,redundant=8", EngineSpec("m"))
    spread = EngineSpec("m", tp=4, dp=2, expert_parallel=True, redundant_experts=8)
    assert found == build.Engines(spread, 3)
    assert build.parse_generator("tp=4,dp=2,replicas=3", EngineSpec("m")) == build.Engines(EngineSpec("m", tp=4), 6)
    found = build.parse_generator("quantization=fp8_per_channel,kv=fp8", EngineSpec("m", precision="float32"))
    want = EngineSpec("m", precision="float32", quantization="fp8_per_channel", kv_cache_dtype="fp8")
    assert found == build.Engines(want)


def test_every_rank_has_its_place():
    """The coordinates that the drawings show are those that the layouts were made with."""
    engines = build.parse_generator("tp=2,pp=2,dp=2,ep=1,replicas=2", EngineSpec("m"))
    at = engines.coordinates()
    assert at[0] == {"replica": 0, "dp": 0, "pp": 0, "tp": 0} and at[-1] == {"replica": 1, "dp": 1, "pp": 1, "tp": 1}
    assert all(engines.spec.coordinates(r % 8) == (a["dp"], a["pp"], a["tp"]) for r, a in enumerate(at))
    assert build._nodes(2, 2, 4) == [0, 0, 0, 0] and build._nodes(6, 3, 4) == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def planted(*problems: str):
    """A generator side whose ranks take `w` of the table by rows, without a process."""

    def simulate(spec, table, environ):
        name, meta = next((n, m) for n, m in table.items() if len(m.shape) == 2)
        rows = meta.shape[0] // spec.tp
        boxes = [Region((rank * rows, 0), (rows, meta.shape[1])) for rank in range(spec.tp)]
        made = {r: Declaration(Layout.from_regions([(name, b)], table), {}, problems) for r, b in enumerate(boxes)}
        return SimulatedGenerator(made, f"planted {spec.tp}")

    return simulate


def test_engines_of_several_kinds_are_planned_together(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "simulate_apart", planted())
    path = tmp_path / "plan.json"
    kinds = ["--generator", "tp=2", "--generator", "tp=1,dp=3"]
    assert cli.main(["plan", "--config", str(MOE), *kinds, f"--json={path}"]) == 0
    view = load_view(path)
    assert view.title.endswith("TP2 x EP2 -> TP2 + 1 rank, 3 replicas")
    assert [dict(g.at) for g in view.generators] == [
        {"kind": 0, "replica": 0, "tp": 0},
        {"kind": 0, "replica": 0, "tp": 1},
        *({"kind": 1, "replica": i, "tp": 0} for i in range(3)),
    ]
    halves, wholes = view.generators[:2], view.generators[2:]
    assert len({w.held_bytes for w in wholes}) == 1 and sum(h.held_bytes for h in halves) == wholes[0].held_bytes
    assert {"planted 2", "planted 1"} <= set(view.notes) and len(view.layouts) == 3


def test_a_plan_that_is_refused_says_why(monkeypatch, capsys):
    monkeypatch.setattr(build, "simulate_apart", planted("w2: bytes 0:8 of 16 written by no tensor"))
    assert cli.main(["plan", "--config", str(MOE)]) == 2
    said = capsys.readouterr().err
    assert "generator 0 (rank 2): w2: bytes 0:8 of 16 written by no tensor" in said


@pytest.mark.parametrize(("name", "layers", "experts"), [("deepseek_v3", 61, 256), ("qwen3_30b_a3b", 48, 128)])
def test_the_example_models_are_known(name, layers, experts):
    shape = model_shape(read_config(ROOT / "examples" / "models" / name))
    assert (shape.num_layers, shape.num_experts) == (layers, experts)
