"""The loop and rollouts with in-process handles: order of work, versions, seeds, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from nemo_rl.config import Config, GrpoConfig, MegatronConfig, OptimizerConfig, PolicyConfig
from nemo_rl.grpo.data import EOS, Task, byte_tokenizer, make_prompts
from nemo_rl.grpo.loop import GrpoLoop, Metrics, RefitSummary
from nemo_rl.grpo.loss import LossInputs, LossOptions
from nemo_rl.grpo.rollouts import GenerationRequest, SamplingOptions, sample_seed, split_requests
from nemo_rl.grpo.types import Completion, RolloutBatch

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
        return [Completion(t, (-self.served,) * len(t), True, self.version) for t in tokens]

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


def run(world: World, **grpo: int) -> list[Metrics]:
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
    errors = [r["gen_kl_error"] for r in rows]
    assert errors[0] == 0.0 and errors == sorted(errors) and errors[2] > errors[1] > 0.1
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
