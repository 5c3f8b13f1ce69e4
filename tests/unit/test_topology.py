"""Ranks of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.config import load_config
from nemo_rl.schema import Config
from nemo_rl.topology import Topology, topology_of


def configured(tmp_path: Path, *overrides: str) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text("policy: {}\n")
    prefix = {
        "TP": "policy.megatron_cfg.tensor_model_parallel_size",
        "PP": "policy.megatron_cfg.pipeline_model_parallel_size",
    }
    prefix |= {
        "EP": "policy.megatron_cfg.expert_model_parallel_size",
        "GTP": "policy.generation.vllm_cfg.tensor_parallel_size",
    }
    prefix |= {"G": "policy.generation.colocated.resources.gpus_per_node", "N": "cluster.gpus_per_node"}
    prefix |= {
        "ETP": "policy.megatron_cfg.expert_tensor_parallel_size",
        "GN": "policy.generation.colocated.resources.num_nodes",
        "SHARED": "policy.generation.colocated.enabled",
    }
    pairs = [o.split("=") for o in overrides]
    return load_config(file, [f"{prefix.get(k, k)}={v}" for k, v in pairs], {})


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (["N=4", "TP=2", "G=2"], Topology(2, 2, 1)),
        (["N=4", "TP=2"], Topology(2, 2, 1)),
        (["N=4", "TP=2", "GTP=2"], Topology(2, 1, 2)),
        (["N=4", "TP=2", "EP=2", "GTP=2"], Topology(2, 1, 2)),
        (["N=8", "TP=2", "PP=2", "G=4", "GTP=2"], Topology(4, 2, 2)),
        (["N=8", "TP=2", "G=4"], Topology(4, 4, 1)),
        (["N=8", "cluster.num_nodes=2", "G=8", "GN=1", "TP=4"], Topology(8, 8, 1)),
        (["N=1", "SHARED=true"], Topology(1, 1, 1, shared=True)),
        (["N=4", "TP=2", "G=2", "SHARED=true"], Topology(4, 4, 1, shared=True)),
        (["N=4", "GTP=2", "SHARED=true"], Topology(4, 2, 2, shared=True)),
    ],
)
def test_ranks(tmp_path: Path, overrides: list[str], want: Topology) -> None:
    assert topology_of(configured(tmp_path, *overrides)) == (want, [])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["N=2", "TP=2"], "more ranks than resources"),
        (["N=4", "TP=4", "G=2"], "more ranks than resources"),
        (["N=4", "TP=2", "G=2", "GTP=4"], "more ranks than resources"),
        (["N=5", "TP=2", "G=2"], "3 trainer ranks are not a multiple of TP x PP = 2"),
        (["N=8", "EP=4", "G=2"], "6 trainer ranks are not a multiple of EP x ETP x PP = 4"),
        (["N=5", "TP=2", "G=3", "GTP=2"], "3 generator devices are not a multiple"),
        (["N=3", "GTP=2", "SHARED=true"], "3 generator devices are not a multiple"),
        (["N=2", "GTP=4", "SHARED=true"], "more ranks than resources"),
        (["N=5", "TP=2", "SHARED=true"], "5 trainer ranks are not a multiple of TP x PP = 2"),
        (["TP=0"], "policy.megatron_cfg.tensor_model_parallel_size=0: at least 1 is needed"),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], text: str) -> None:
    _, problems = topology_of(configured(tmp_path, *overrides))
    assert any(text in p for p in problems), problems


def test_world_ranks_follow_the_trainers() -> None:
    topology = Topology(2, 3, 2)
    assert [topology.first_rank(i) for i in range(3)] == [2, 4, 6]
    assert topology.num_generators == 6
