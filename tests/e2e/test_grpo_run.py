"""GRPO runs of a few steps with real trainers, real generators and real refits, started as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from nemo_rl.actors import Actors
from nemo_rl.cluster import Actor, Cluster, ClusterError, wait_all
from nemo_rl.config import load_config
from nemo_rl.driver import stop_token_ids
from nemo_rl.grpo.data import load_tokenizer
from nemo_rl.grpo.loop import GrpoLoop
from nemo_rl.grpo.rollouts import GenerationRequest, SamplingOptions
from nemo_rl.grpo.warmup import ensure_start_model
from nemo_rl.schema import Config
from nemo_rl.topology import topology_of

ROOT = Path(__file__).parents[2]
DENSE, MOE = (ROOT / "examples" / "configs" / f"grpo_qwen3_{kind}tiny_cpu.yaml" for kind in ("", "moe_"))
SMALL = [
    "start_model.warmup_steps=80",
    "data.min_items=2",
    "data.max_items=3",
    "grpo.num_prompts_per_step=8",
    "policy.train_global_batch_size=64",
]
SMALL += ["policy.train_micro_batch_size=32", "policy.megatron_cfg.optimizer.lr=1e-3"]
SMALL += ["policy.refit.measure_links=never"]  # so that `auto` takes the same transport in every run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def start(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "run_grpo.py"), "--config", str(config), *overrides]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("NRL_")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)


def run(config: Path, models: Path, outputs: Path, steps: int, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Metrics of a run that must succeed, and what it printed."""
    places = [f"start_model.cache_dir={models}", f"logger.log_dir={outputs}", f"grpo.max_num_steps={steps}"]
    done = start(config, *SMALL, *places, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (outputs / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    return rows, done.stdout


def assert_proven(rows: list[dict[str, Any]], transport: str) -> None:
    """Every row's refit was verified, and its samples were those of the trainers' weights."""
    for row in rows:
        assert row["refit_verified"] is True and row["refit_transport"] == transport
        assert row["weight_version"] == row["step"]
        assert row["refit_s"] > 0 and row["refit_bulk_bytes"] + row["refit_misc_bytes"] > 1_000_000
        assert 0 < row["reward_mean"] <= 1 and row["grad_norm"] > 0
    assert all(0 <= row["gen_kl_error"] < FRESH for row in rows)


FRESH, STALE = 1e-6, 1e-4
"""`gen_kl_error` of samples of the trainers' weights, and `gen_kl_drift` of those of the weights of a step before."""


def test_dense_run_and_what_it_leaves(models: Path, tmp_path: Path) -> None:
    """Samples are the trainers' after every refit and, as the control, never where a refit is left out."""
    rows, printed = run(DENSE, models, tmp_path, 4, "grpo.refit_every=2")
    assert [r["weight_version"] for r in rows] == [0, 2, 2, 4]
    assert all(0 <= r["gen_kl_error"] < FRESH and r["gen_kl_drift"] is None for r in rows[0::2])
    assert all(r["gen_kl_error"] is None and r["gen_kl_drift"] > STALE and r["refit_verified"] for r in rows[1::2])
    assert all(r["refit_s"] is None and r["refit_verified"] is None for r in rows[0::2])
    assert {r["refit_misc_bytes"] for r in rows[1::2]} == {0} and len({r["refit_bulk_bytes"] for r in rows[1::2]}) == 1
    assert "margin" in printed and "verified" in printed
    folder = (tmp_path / "latest").resolve()
    assert (folder / "summary.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").iterdir())
    assert load_config(folder / "config.yaml", [], {}).grpo.max_num_steps == 4
    said = (folder / "run.log").read_text()
    assert "refit plan" in said and "; predicted: peer" in said


@pytest.mark.slow
def test_mixture_of_experts_run(models: Path, tmp_path: Path) -> None:
    measured = ["policy.refit.measure_links=auto", f"policy.refit.cache_dir={tmp_path}/cache"]
    rows, _ = run(MOE, models, tmp_path, 2, "policy.refit.verify_against_checkpoint=true", *measured)
    chosen = rows[0]["refit_transport"]
    assert chosen in ("peer", "gloo"), "what was measured to be faster"
    assert_proven(rows, chosen)
    assert all(r["refit_predicted_s"] > 0 for r in rows)
    assert [p.name.startswith("links-") for p in (tmp_path / "cache").iterdir()] == [True]


@pytest.mark.slow
def test_conventional_refits(models: Path, tmp_path: Path) -> None:
    rows, _ = run(DENSE, models, tmp_path, 2, "policy.nccl_xfer_refit=false")
    assert_proven(rows, "broadcast")
    assert all(r["refit_bulk_bytes"] == 0 for r in rows)


@pytest.mark.slow
def test_devices_that_trainers_and_an_engine_share(models: Path, tmp_path: Path) -> None:
    sizes = ["cluster.gpus_per_node=2", "policy.generation.vllm_cfg.tensor_parallel_size=2"]
    rows, printed = run(DENSE, models, tmp_path, 2, "policy.generation.colocated.enabled=true", *sizes)
    assert_proven(rows, "peer")
    assert "2 trainer ranks and 1 generators of 2 rank(s)" in printed


@pytest.mark.slow
def test_without_refits_generator_and_trainer_part(models: Path, tmp_path: Path) -> None:
    rows, _ = run(DENSE, models, tmp_path, 3, "grpo.refit_every=0")
    assert rows[0]["gen_kl_error"] < FRESH and min(r["gen_kl_drift"] for r in rows[1:]) > STALE
    assert [r["sample_age_max"] for r in rows] == [0, 1, 2]
    assert all(r["refit_s"] is None and r["weight_version"] == 0 for r in rows)


AHEAD = ["grpo.async_grpo.enabled=true", "grpo.async_grpo.in_flight_weight_updates=true"]


@pytest.mark.slow
def test_rollouts_one_step_ahead(models: Path, tmp_path: Path) -> None:
    """Engines that answer two requests at a time are slower than training: refits come upon their requests."""
    sizes = ["grpo.num_prompts_per_step=16", "policy.train_global_batch_size=128"]
    sizes += ["policy.megatron_cfg.optimizer.lr=3e-4", "policy.generation.vllm_cfg.max_num_seqs=2"]
    rows, printed = run(DENSE, models, tmp_path, 20, *sizes, *AHEAD)
    rewards = [r["reward_mean"] for r in rows]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.05, rewards
    assert all(r["refit_verified"] and r["weight_version"] == r["step"] for r in rows)
    for before, row in zip(rows, rows[1:], strict=False):  # this step's rollout ran beside the training before
        assert row["rollout_start_s"] < before["train_end_s"] and row["overlap_s"] > 0
        assert row["overlap_s"] <= before["train_end_s"] - before["train_start_s"]
        assert row["sample_age_max"] == 1 and 0 < row["token_age_mean"] <= 1
    assert rows[0]["sample_age_max"] == rows[0]["mixed_version_fraction"] == 0
    assert sum(r["mixed_version_fraction"] > 0 for r in rows) >= 5
    # What began after a refit is of the trainers' weights, key by key and value by value; what is older drifts.
    fresh = [r["gen_kl_error"] for r in rows if r["gen_kl_error"] is not None]
    assert len(fresh) >= 5 and max(fresh) < FRESH
    assert all(r["gen_kl_drift"] > FRESH for r in rows[1:])
    for row in rows:
        parts = {n: s for n, s in row.items() if n.startswith("pause_") and n != "pause_to_resume_s"}
        assert {"pause_transfer_s", "pause_begin_s", "pause_verify_s", "pause_commit_s"} <= set(parts)
        assert sum(parts.values()) == pytest.approx(row["pause_to_resume_s"]) and row["pause_to_resume_s"] > 0
    assert "pause to resume: " in printed


@pytest.mark.slow
def test_samples_without_refits_grow_too_old(models: Path, tmp_path: Path) -> None:
    places = [f"start_model.cache_dir={models}", f"logger.log_dir={tmp_path}", "grpo.max_num_steps=9"]
    done = start(DENSE, *SMALL, *places, *AHEAD, "grpo.refit_every=0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 3: 64 of 64 samples are 2 steps old" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "latest" / "metrics.jsonl").read_text().splitlines()]
    assert [r["sample_age_max"] for r in rows] == [0, 1]
    assert rows[0]["gen_kl_error"] < FRESH and rows[1]["gen_kl_drift"] > STALE


def test_a_refused_configuration_starts_nothing(tmp_path: Path) -> None:
    started = time.monotonic()
    key = "policy.megatron_cfg.tensor_model_parallel_size"
    done = start(DENSE, f"logger.log_dir={tmp_path}", f"{key}=8", "policy.generation.vllm_cfg.precision=fp4")
    assert done.returncode == 2 and time.monotonic() - started < 60
    assert "does not divide the 4 attention heads" in done.stderr and "fp4: unknown" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@contextmanager
def started(models: Path, *overrides: str) -> Iterator[tuple[Config, Actors, Path]]:
    places = [f"start_model.cache_dir={models}", "policy.refit.deadline_s=20"]
    config = load_config(DENSE, [*SMALL, *places, *overrides], {})
    topology, _ = topology_of(config)
    path = ensure_start_model(config)
    with Cluster(config.cluster, topology, "cpu") as cluster, Actors(config, path, topology, "cpu", cluster) as running:
        yield config, running, path


@pytest.fixture
def actors(models: Path) -> Iterator[tuple[Actors, Path]]:
    with started(models) as (_, running, path):
        yield running, path


@pytest.mark.slow
def test_a_generator_killed_in_a_rollout_ends_an_asynchronous_run(models: Path) -> None:
    with started(models, *AHEAD, "policy.generation.vllm_cfg.max_num_seqs=1") as (config, running, path):
        trainers, generators, refitter = running.groups(stop_token_ids(path))
        refitter.connect()
        killed: list[float] = []

        def record(row: Mapping[str, Any]) -> None:
            if row["step"] == 2:  # the rollout of step 3 is under way
                ray.kill(running.generators[1].handle)
                killed.append(time.monotonic())

        loop = GrpoLoop(config, load_tokenizer(path), trainers, generators, refitter, record)
        with pytest.raises(ClusterError, match=r"phase 'generate' failed: generator 1 \(rank 3\) died"):
            loop.run()
        assert time.monotonic() - killed[0] < 30


def await_end(actor: Actor) -> None:
    """A killed actor may still answer, and agree to a refit, before its process ends."""
    end = time.monotonic() + 60
    with pytest.raises(ClusterError, match="died"):
        while time.monotonic() < end:
            wait_all([(actor, actor.handle.address.remote())], "end", 60)
            time.sleep(0.05)


def test_a_killed_trainer_ends_the_refit_and_nothing_is_served(actors: tuple[Actors, Path]) -> None:
    running, path = actors
    _, generators, refitter = running.groups(stop_token_ids(path))
    refitter.connect()
    assert refitter.refit(0).verified
    request = GenerationRequest(((5, 6),), (1,), SamplingOptions(1, 4, 1.0))
    assert len(generators.generate([request, request])) == 2
    doomed = running.trainers[1]
    ray.kill(doomed.handle)
    await_end(doomed)
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"phase 'refit of version 1' failed: trainer 1 \(rank 1\) died"):
        refitter.refit(1)
    assert time.monotonic() - started < 60
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with pytest.raises(ClusterError) as caught:
            generators.generate([request, request])
        if "refuses to generate" in str(caught.value):
            return
        time.sleep(1)
    pytest.fail(f"the generators do not refuse with a reason: {caught.value}")
