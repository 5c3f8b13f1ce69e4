"""Engines without an engine: what the short traces say must be what every rank's whole trace says.

The real loaders run in one process of their own, as vLLM keeps state per process: this file as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_rl.generator import simulated
from nemo_rl.generator.fold import Rows, fold
from nemo_rl.generator.preflight import PREFLIGHT_ENV
from nemo_rl.generator.ranks import EngineSpec
from nemo_rl.generator.simulated import RankTrace, simulate_apart, trace_ranks
from nemo_rl.generator.twin import trace_rank
from nemo_rl.refit.layout import Layout, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from nemo_rl.refit.trace import Trace, TracedRow
from tests.golden.families import FAMILIES, checkpoint_table

ROOT = Path(__file__).parents[3]
ENGINES = {
    "qwen3": {"tp": 2},
    "qwen3_moe": {"tp": 2, "dp": 2, "expert_parallel": True, "redundant_experts": 4},
    "deepseek_v3": {"tp": 2},
    "qwen2_bias": {"pp": 2},
}


def main(folder: str) -> None:
    """For every engine: how its ranks were traced, and the ranks whose whole trace says otherwise."""
    said = {}
    for name, sizes in ENGINES.items():
        spec, table = EngineSpec(f"{folder}/{name}", **sizes), checkpoint_table(name)
        made, how = trace_ranks(spec, table)
        wrong = [r for r, found in made.items() if not found.same(RankTrace.of(trace_rank(spec, r, table), table))]
        rows = {r: len(found.rows.tensor) for r, found in made.items()}
        said[name] = {"how": how, "wrong": wrong, "rows": rows}
    sys.stderr.write("ANSWER " + json.dumps(said) + "\n")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ENGINES:
        FAMILIES[name](folder / name)
    environ = {**os.environ, **PREFLIGHT_ENV, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ANSWER ")]
    assert done.returncode == 0 and lines, done.stderr[-2000:]
    return json.loads(lines[-1].removeprefix("ANSWER "))


@pytest.mark.parametrize("name", ENGINES)
def test_every_rank_takes_what_its_whole_trace_says(answers, name):
    answer = answers[name]
    assert answer["wrong"] == []
    assert len(answer["rows"]) == EngineSpec("", **ENGINES[name]).num_ranks and all(answer["rows"].values())


def test_repeated_layers_are_traced_once_but_on_one_rank(answers):
    assert "2 ranks on the first 1 of 3 layers" in answers["qwen3"]["how"]
    assert "2 ranks on the first 2 of 3 layers" in answers["deepseek_v3"]["how"]
    assert answers["qwen2_bias"]["how"] == "traced 2 ranks whole"  # stages have different layers


def test_a_model_that_cannot_be_traced_is_refused_with_the_last_words(tmp_path):
    with pytest.raises(ValueError, match="could not be traced .*No such file or directory"):
        simulate_apart(EngineSpec(str(tmp_path / "none"), tp=2), TABLE, os.environ)


# ---- without vLLM: loaders that are planted


NUM_LAYERS = 6
TABLE: TensorTable = {
    name: TensorMeta((4, 8), torch.bfloat16)
    for name in natural_order([*(f"model.layers.{i}.w" for i in range(NUM_LAYERS)), "embed", "model.layers.6.head"])
}


def planted(odd: dict[tuple[int, str], str]):
    """A loader that takes its rows of every tensor but the head's, except as `odd` says: (rank, fqn) -> misc reason."""

    def trace(spec: EngineSpec, rank: int, table: TensorTable) -> Trace:
        region = Region((2 * rank, 0), (2, 8))
        names = [n for n in table if not n.endswith("head")]
        misc = {n: odd[rank, n] for n in names if (rank, n) in odd}
        rows = tuple(TracedRow(n, region, n, 0, (8, 1)) for n in names if n not in misc)
        return Trace(rows, misc, {}, ())

    return trace


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": NUM_LAYERS, "kinds": ["a"] * NUM_LAYERS}))
    return EngineSpec(str(tmp_path), tp=2)


def test_a_fold_that_holds_is_used(monkeypatch, spec):
    trace = planted({})
    monkeypatch.setattr(simulated, "trace_rank", trace)
    made, how = trace_ranks(spec, TABLE)
    assert "first 1 of 6 layers" in how
    assert all(made[rank].same(RankTrace.of(trace(spec, rank, TABLE), TABLE)) for rank in (0, 1))


@pytest.mark.parametrize("fqn", ["model.layers.0.w", "model.layers.5.w"])
def test_a_fold_that_does_not_hold_is_given_up(monkeypatch, spec, fqn):
    """One layer of the rank that is traced whole is not like the others: every rank is traced whole."""
    trace = planted({(1, fqn): "computed"})
    monkeypatch.setattr(simulated, "trace_rank", trace)
    made, how = trace_ranks(spec, TABLE)
    assert how == "traced 2 ranks whole"
    assert made[1].misc == {fqn: "computed"} and made[0].misc == {}
    assert all(made[rank].same(RankTrace.of(trace(spec, rank, TABLE), TABLE)) for rank in (0, 1))


def test_every_rank_has_a_declaration(monkeypatch, spec):
    monkeypatch.setattr(simulated, "trace_rank", planted({}))
    found = simulated.simulate(spec, TABLE).declarations
    assert sorted(found) == [0, 1]
    for rank, declaration in found.items():
        layout = declaration.layout
        assert layout.names == tuple(name for name in TABLE if not name.endswith("head"))
        assert {layout.region(row) for row in range(len(layout))} == {Region((2 * rank, 0), (2, 8))}
        assert Layout.from_bytes(layout.to_bytes()).digest == layout.digest


def test_answers_survive_the_file(monkeypatch, spec, tmp_path):
    monkeypatch.setattr(simulated, "trace_rank", planted({(1, "embed"): "computed"}))
    made, how = trace_ranks(spec, TABLE)
    simulated._write(tmp_path / "answer.npz", made, how)
    read, said = simulated._read(tmp_path / "answer.npz")
    assert said == how and sorted(read) == [0, 1] and all(read[rank].same(made[rank]) for rank in read)


def test_what_a_fold_keeps():
    config = {"num_hidden_layers": NUM_LAYERS, "kinds": list("abcdef"), "pattern": "MMMMMM", "other": [1, 2]}
    found = fold(config, TABLE)
    assert found is not None
    assert dict(found.config) == {"num_hidden_layers": 1, "kinds": ["a"], "pattern": "M", "other": [1, 2]}
    assert list(found.table) == ["embed", "model.layers.0.w"]
    assert found.copies["model.layers.0.w"] == tuple(f"model.layers.{i}.w" for i in range(NUM_LAYERS))
    assert found.copies["embed"] == ("embed",)


def test_no_fold_where_layers_do_not_repeat_or_are_missing():
    different = {f"layers.{i}.w{i}": TensorMeta((1,), torch.float32) for i in range(4)}
    assert fold({"num_hidden_layers": 4}, different) is None
    assert fold({"num_hidden_layers": 7}, {n: m for n, m in TABLE.items() if not n.endswith("head")}) is None
    assert fold({}, TABLE) is None


def test_unfolding_repeats_every_row():
    rows = Rows.sorted(np.array([1, 0, 0]), np.array([[0], [2], [0]]), np.array([[4], [2], [2]]))
    out = rows.unfolded((np.array([5, 3]), np.array([], np.int64)))
    assert out.tensor.tolist() == [3, 3, 5, 5] and out.offsets[:, 0].tolist() == [0, 2, 0, 2]


if __name__ == "__main__":
    main(sys.argv[1])
