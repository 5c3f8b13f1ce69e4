"""The loop and rollouts with in-process handles: order of work, versions, seeds, metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_rl.grpo.ahead import Ahead
from nemo_rl.grpo.data import EOS, Task, byte_tokenizer, make_prompts
from nemo_rl.grpo.loop import GrpoLoop, Metrics, RefitSummary
from nemo_rl.grpo.loss import LossInputs, LossOptions
from nemo_rl.grpo.rollouts import GenerationRequest, SamplingOptions, sample_seed, split_requests
from nemo_rl.grpo.types import Completion, RolloutBatch, RunError
from nemo_rl.schema import AsyncGrpoConfig, Config, GrpoConfig, MegatronConfig, OptimizerConfig, PolicyConfig

TOKENIZER = byte_tokenizer()


class World:
    """Trainers, generators and refits that only count: weights are one number, a log-probability its negative."""

    num_replicas = 3

    def __init__(self, broken_version: bool = False) -> None:
        self.trained, self.served, self.version = 1.0, 1.0, 0
        self.calls: list[str] = []
        self.seeds: list[int] = []
        self.rates: list[float] = []
        self.broken_version = broken_version

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
        self.calls.append("generate")
        self.seeds += [s for r in requests for s in r.seeds]
        return [[self._answers(p, r.sampling.num_samples) for p in r.prompts] for r in requests]

    def _answers(self, prompt: tuple[int, ...], count: int) -> list[Completion]:
        right = [*sorted(prompt[:-1]), TOKENIZER.token_to_id(EOS)]
        tokens = [tuple(right) if i % 2 else (prompt[0], prompt[0]) for i in range(count)]
        return [Completion(t, (-self.served,) * len(t), True, (self.version,) * len(t)) for t in tokens]

    def logprobs(self, batch: RolloutBatch, *, reference: bool) -> torch.Tensor:
        self.calls.append("reference" if reference else "logprobs")
        return torch.full(batch.input_ids.shape, -1.0 if reference else -self.trained)

    def train(self, batch: RolloutBatch, inputs: LossInputs, options: LossOptions, lr: float) -> dict[str, float]:
        self.calls.append(f"train {batch.num_samples}")
        self.rates.append(lr)
        self.trained += 0.5
        return {"loss": 1.0, "grad_norm": float(batch.num_samples)}

    def calibrate(self, batch: RolloutBatch) -> None:
        self.calls.append(f"calibrate {batch.num_samples}")

    def refit(self, version: int) -> RefitSummary:
        self.calls.append(f"refit {version}")
        self.served, self.version = self.trained, 99 if self.broken_version else version
        return RefitSummary(version, "gloo", True, 0.5, 1000, 10, 64, {"transfer": 0.25})


def run(world: World, **grpo: Any) -> list[Metrics]:
    settings = GrpoConfig(num_prompts_per_step=4, num_generations_per_prompt=2, max_num_steps=3)
    config = Config(
        policy=PolicyConfig(
            train_global_batch_size=4, megatron_cfg=MegatronConfig(optimizer=OptimizerConfig(lr=3.0, min_lr=1.0))
        ),
        grpo=replace(settings, **grpo),
    )
    rows: list[Metrics] = []
    GrpoLoop(config, TOKENIZER, world, world, world, rows.append).run()
    return rows


def test_order_of_a_run() -> None:
    world = World()
    rows = run(world, max_num_steps=2)
    step = ["generate", "logprobs", "reference", "train 4", "train 4"]
    assert world.calls == ["refit 0", *step, "calibrate 8", "refit 1", *step, "calibrate 8", "refit 2"]
    assert [r["weight_version"] for r in rows] == [1, 2] == [r["step"] for r in rows]
    assert all(r["reward_mean"] == 0.5 and r["grad_norm"] == 4.0 for r in rows)
    assert all(r["gen_kl_error"] == 0.0 and r["refit_verified"] for r in rows)
    assert rows[0]["refit_gb_per_s"] == pytest.approx(1010 / 0.5 / 1e9)


def test_rate_falls_in_a_straight_line() -> None:
    world = World()
    run(world)
    assert world.rates == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]


def test_without_refits_the_gap_grows() -> None:
    world = World()
    rows = run(world, refit_every=0)
    assert not [c for c in world.calls if c.startswith("refit")]
    assert [r["gen_kl_error"] for r in rows] == [0.0, None, None] and rows[0]["gen_kl_drift"] is None
    assert rows[2]["gen_kl_drift"] > rows[1]["gen_kl_drift"] > 0.1
    assert [r["sample_age_max"] for r in rows] == [0, 1, 2] == [r["token_age_mean"] for r in rows]
    assert all(r["refit_s"] is None and r["weight_version"] == 0 for r in rows)


def test_refit_every_other_step() -> None:
    rows = run(World(), refit_every=2)
    assert [r["weight_version"] for r in rows] == [0, 2, 2]
    assert [r["refit_verified"] for r in rows] == [None, True, None]


def test_samples_of_another_version_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"weight versions \[99\], not the committed 0"):
        run(World(broken_version=True))


@pytest.mark.parametrize("wrong", [0.6, float("nan")])
def test_weights_that_compute_something_else_end_the_run(wrong: float) -> None:
    """A rule that is wrong in both directions: the refit is proven and verified, the model is another one."""

    class Misruled(World):
        def refit(self, version: int) -> RefitSummary:
            summary = super().refit(version)
            self.served += wrong if version == 1 else 0.0
            return summary

    world = Misruled()
    with pytest.raises(
        RuntimeError, match=r"step 2: generators and trainers hold version 1.* KL of (0.\d+|nan), above"
    ):
        run(world)
    assert world.calls.count("generate") == 2 and sum(c.startswith("train") for c in world.calls) == 2


# ---- one step ahead

AHEAD = AsyncGrpoConfig(enabled=True)
IN_FLIGHT = AsyncGrpoConfig(enabled=True, in_flight_weight_updates=True)


class Overlapping(World):
    """Rollouts but the first are half done when training of the step before begins, and end when they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
        half = super().generate(requests)
        if self.calls.count("generate") > 1:
            self.began.release()
            assert self.go_on.acquire(timeout=20)
        return [[[self._rest(c) for c in samples] for samples in answers] for answers in half]

    def _rest(self, half: Completion) -> Completion:
        """The first token stays, the others are of the weights that are served by then."""
        count = len(half.token_ids) - 1
        logprobs = (*half.logprobs[:1], *(-self.served,) * count)
        return Completion(half.token_ids, logprobs, True, (*half.versions[:1], *(self.version,) * count))

    def train(self, batch: RolloutBatch, inputs: LossInputs, options: LossOptions, lr: float) -> dict[str, float]:
        if len(self.rates) in (0, 2):  # the first batch of the first and of the second step
            assert self.began.acquire(timeout=20)
        return super().train(batch, inputs, options, lr)

    def refit(self, version: int) -> RefitSummary:
        summary = super().refit(version)
        if version > 0:
            self.go_on.release()
        return summary


def test_rollouts_go_on_through_refits() -> None:
    world = Overlapping()
    rows = run(world, async_grpo=IN_FLIGHT)
    assert [r["sample_age_max"] for r in rows] == [0, 1, 1] and [r["weight_version"] for r in rows] == [1, 2, 3]
    assert rows[0]["mixed_version_fraction"] == 0 and rows[1]["mixed_version_fraction"] == 1.0
    assert all(0 < r["token_age_mean"] < 1 for r in rows[1:])
    for before, row in zip(rows, rows[1:], strict=False):
        assert row["rollout_start_s"] < before["train_end_s"] < row["rollout_end_s"]
        assert 0 < row["overlap_s"] <= before["train_end_s"] - before["train_start_s"]
    # Old tokens of a mixed sample are none that the trainers' weights must reproduce, nor what follows on their cache.
    assert [r["gen_kl_error"] for r in rows] == [0.0, None, None]
    assert rows[1]["gen_kl_drift"] > 0.01


def test_recomputed_caches_make_the_rest_of_mixed_samples_comparable() -> None:
    rows = run(Overlapping(), async_grpo=replace(IN_FLIGHT, recompute_kv_cache_after_weight_updates=True))
    assert [r["gen_kl_error"] for r in rows] == [0.0, 0.0, 0.0] and rows[1]["gen_kl_drift"] > 0.01


def test_without_updates_in_flight_a_refit_waits_for_the_rollout() -> None:
    class Draining(Overlapping):
        def train(self, batch: RolloutBatch, inputs: LossInputs, options: LossOptions, lr: float) -> dict[str, float]:
            trained = super().train(batch, inputs, options, lr)
            if len(self.rates) % 2 == 0:  # the step's last batch
                threading.Timer(0.1, self.go_on.release).start()
            return trained

        def refit(self, version: int) -> RefitSummary:
            return World.refit(self, version)

    rows = run(Draining(), async_grpo=AHEAD)
    assert all(r["mixed_version_fraction"] == 0 for r in rows)
    assert [r["sample_age_mean"] for r in rows] == [0, 1, 1]
    assert all(r["drain_s"] > 0.05 and r["weight_version"] == r["step"] for r in rows[:2])
    assert all(r["overlap_s"] > 0 for r in rows[1:])


def test_samples_that_are_too_old_end_the_run() -> None:
    with pytest.raises(
        RunError, match=r"step 3: 8 of 8 samples are 2 steps old, more than .*max_trajectory_age_steps=1"
    ):
        run(World(), refit_every=0, async_grpo=AHEAD, max_num_steps=4)


def test_a_rollout_that_fails_ends_the_run_before_the_next_refit() -> None:
    class Broken(World):
        def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
            if self.calls.count("generate") == 1:
                raise RuntimeError("generator 2 died")
            return super().generate(requests)

    world = Broken()
    with pytest.raises(RuntimeError, match="generator 2 died"):
        run(world, async_grpo=AHEAD)
    assert "refit 1" not in world.calls


def test_a_rollout_that_never_ends_is_named() -> None:
    rollouts = Ahead(lambda step: time.sleep(5) or [], last_step=3, deadline_s=0.05)
    with pytest.raises(RunError, match=r"the rollout of step 1 did not end within 0.05 s"):
        rollouts.take(1)


def test_seeds_are_those_of_seed_and_step() -> None:
    first, second, other = World(), World(), World()
    run(first)
    run(second)
    run(other, seed=1)
    assert first.seeds == second.seeds != other.seeds
    assert len(set(first.seeds)) == len(first.seeds) == 12
    assert first.seeds[0] == sample_seed(42, 1, 0)


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_requests_cover_all_prompts_once(num_replicas: int) -> None:
    prompts = make_prompts(Task("sort", 2, 4, 0), TOKENIZER, 1, 5)
    requests = split_requests(prompts, num_replicas, SamplingOptions(2, 8, 1.0), seed=3, step=1)
    assert len(requests) == num_replicas
    assert [p for r in requests for p in r.prompts] == [p.token_ids for p in prompts]
    sizes = [len(r.prompts) for r in requests]
    assert max(sizes) - min(sizes) <= 1
    assert [s for r in requests for s in r.seeds] == [sample_seed(3, 1, g) for g in range(5)]


def test_a_replica_that_answers_too_little_is_named() -> None:
    class Short(World):
        def generate(self, requests: Sequence[GenerationRequest]) -> list[list[list[Completion]]]:
            answers = super().generate(requests)
            answers[1] = answers[1][:-1]
            return answers

    with pytest.raises(RuntimeError, match="generator 1 was asked for 1 x 2 samples"):
        run(Short())
