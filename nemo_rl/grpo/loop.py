"""The GRPO loop. It drives handles and knows neither Ray nor the engines behind them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tokenizers import Tokenizer

from nemo_rl.grpo.advantages import group_advantages
from nemo_rl.grpo.ahead import Ahead, InTurn, Rollouts
from nemo_rl.grpo.data import PAD, Task, make_prompts
from nemo_rl.grpo.loss import LossInputs, LossOptions, generator_kl_error
from nemo_rl.grpo.rewards import exact_match
from nemo_rl.grpo.rollouts import Generators, SamplingOptions, rollout
from nemo_rl.grpo.staleness import age_metrics, overlap_s, refuse_foreign, refuse_too_old, reproducible
from nemo_rl.grpo.types import RolloutBatch, RunError, Sample, collate
from nemo_rl.schema import Config

log = logging.getLogger(__name__)
Metrics = dict[str, float | int | str | bool | None]


class Trainers(Protocol):
    """All trainer ranks as one."""

    def logprobs(self, batch: RolloutBatch, *, reference: bool) -> torch.Tensor:
        """Log-probability of each token given those before it, by the current or the reference weights.

        float32 `[N, L]`; column t belongs to token t, and columns outside `batch.mask` may hold anything finite.
        """

    def train(self, batch: RolloutBatch, inputs: LossInputs, options: LossOptions, lr: float) -> dict[str, float]:
        """One optimizer step on the whole of `batch`; `loss`, `grad_norm` and the loss function's metrics."""

    def calibrate(self, batch: RolloutBatch) -> None:
        """Where the model has scales of an FP8 KV cache, set them by what its attention sees of `batch`."""


@dataclass(frozen=True, slots=True)
class RefitSummary:
    """One refit as the whole cluster saw it.

    Attributes:
        seconds: of the slowest rank, pausing and resuming engines included.
        pause_s: how long the slowest engine did not generate, by parts that add up to the whole.
        bulk_bytes, misc_bytes: received by all generators over the wire.
        phase_s: of the slowest rank of each phase.
        predicted_s: that the cost model gave the transport, engines' own work left out; None without measured links.
    """

    version: int
    transport: str
    verified: bool
    seconds: float
    bulk_bytes: int
    misc_bytes: int
    staging_bytes: int
    phase_s: Mapping[str, float]
    predicted_s: float | None = None
    pause_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def paused_s(self) -> float:
        """From pause to resume."""
        return sum(self.pause_s.values())

    @property
    def gb_per_s(self) -> float:
        return (self.bulk_bytes + self.misc_bytes) / self.seconds / 1e9 if self.seconds else 0.0


class Refitter(Protocol):
    """The refit sessions of all ranks as one."""

    def refit(self, version: int) -> RefitSummary:
        """Bring the trainers' weights into every generator as `version`, or raise RefitError."""


class GrpoLoop:
    """Generate, reward, train, refit; `record` gets one line of metrics a step."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        trainers: Trainers,
        generators: Generators,
        refitter: Refitter,
        record: Callable[[Metrics], None],
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._trainers, self._generators, self._refitter, self._record = trainers, generators, refitter, record
        data, loss = config.data, config.loss_fn
        self._task = Task(data.task, data.min_items, data.max_items, config.grpo.seed)
        self._sampling = SamplingOptions(
            config.grpo.num_generations_per_prompt,
            config.policy.generation.max_new_tokens,
            config.policy.generation.temperature,
        )
        self._loss = LossOptions(
            loss.reference_policy_kl_penalty,
            loss.ratio_clip_min,
            loss.ratio_clip_max,
            loss.token_level_loss,
            loss.use_importance_sampling_correction,
            loss.truncated_importance_sampling_ratio,
        )
        self._pad = tokenizer.token_to_id(PAD) or 0
        self._version = self._asked_version = 0  # committed for sure, and asked for
        self._seconds: dict[str, float] = {}
        self._started_s = time.monotonic()
        self._trained_s = (0.0, 0.0)
        self._rollouts: Rollouts = InTurn(self._roll)
        if config.grpo.async_grpo.enabled:
            # A rollout that a refit comes upon waits for it too.
            deadline_s = config.grpo.step_deadline_s + 2 * config.policy.refit.deadline_s
            self._rollouts = Ahead(self._roll, config.grpo.max_num_steps, deadline_s)

    def run(self) -> None:
        """Refit once, so that the first samples come from proven weights, then do all steps."""
        if self._config.grpo.refit_every:
            summary = self._refitter.refit(0)
            log.info("refit of the start weights: %s", summary)
        for step in range(1, self._config.grpo.max_num_steps + 1):
            self._record(self.step(step))

    def step(self, step: int) -> Metrics:
        """Step `step`, counted from 1. `weight_version` is that of the generators after it."""
        started = time.monotonic()
        self._seconds = {}
        samples = self._take(step)
        batch = collate(samples, self._pad)
        advantages = self._advantages(batch)
        training_s = time.monotonic()
        with self._timed("logprobs_s"):
            old, reference = (self._trainers.logprobs(batch, reference=r) for r in (False, True))
        kl = self._kl_metrics(old, batch, step)
        inputs = LossInputs(advantages, batch.mask, old, batch.generator_logprobs, reference)
        with self._timed("train_s"):
            trained = self._train(batch, inputs, self._learning_rate(step))
        self._trained_s = training_s, time.monotonic()
        self._mark("train", self._trained_s)
        summary = self._refit(step, batch)
        return {
            "step": step,
            "reward_mean": float(batch.rewards.mean()),
            "loss": trained.pop("loss"),
            **kl,
            **age_metrics(samples, step),
            **_refit_metrics(summary),
            "weight_version": self._version,
            **trained,
            **_sample_metrics(samples, advantages),
            **self._seconds,
            "step_s": time.monotonic() - started,
        }

    def _take(self, step: int) -> list[Sample]:
        """Samples of `step`, which may train it."""
        asynchronous, before_s = self._config.grpo.async_grpo, self._trained_s
        with self._timed("wait_rollout_s"):
            rollout = self._rollouts.take(step)
        if asynchronous.enabled:
            refuse_too_old(rollout.samples, step, asynchronous.max_trajectory_age_steps)
        interval = rollout.started_s, rollout.ended_s
        self._mark("rollout", interval)
        self._seconds |= {"generate_s": interval[1] - interval[0], "overlap_s": overlap_s(interval, before_s)}
        return rollout.samples

    def _roll(self, step: int) -> list[Sample]:
        """Samples of `step`; in a thread of its own where rollouts go ahead."""
        grpo, first = self._config.grpo, self._version
        prompts = make_prompts(self._task, self._tokenizer, step, grpo.num_prompts_per_step)
        samples = rollout(
            self._generators, self._tokenizer, prompts, self._sampling, exact_match, seed=grpo.seed, step=step
        )
        refuse_foreign(samples, step, first, self._asked_version)
        return samples

    def _kl_metrics(self, old: torch.Tensor, batch: RolloutBatch, step: int) -> Metrics:
        """`gen_kl_error` over tokens that the trainers' weights must reproduce, `gen_kl_drift` over all others.

        Null where there are no such tokens. Raises RunError where the error is more than equal weights can have.
        """
        same = reproducible(batch, step, self._config.grpo.async_grpo.recompute_kv_cache_after_weight_updates)
        error, drift = (
            generator_kl_error(old, batch.generator_logprobs, batch.mask * tokens) if tokens.any() else None
            for tokens in (same, (batch.mask > 0) & ~same)
        )
        if error is not None:
            self._check_kl(error, step)
        return {"gen_kl_error": error, "gen_kl_drift": drift}

    def _check_kl(self, kl_error: float, step: int) -> None:
        limit = self._config.grpo.max_gen_kl_error
        if not kl_error <= limit:
            raise RunError(
                f"step {step}: generators and trainers hold version {step - 1}, but their log-probabilities "
                f"differ by a KL of {kl_error:.3g}, above grpo.max_gen_kl_error={limit:g}; they train nothing. "
                f"A family rule or the engine computes another model: set policy.refit.verify_against_checkpoint=true "
                f"and compare the trainer with transformers"
            )

    def _advantages(self, batch: RolloutBatch) -> torch.Tensor:
        grpo = self._config.grpo
        return group_advantages(
            batch.rewards,
            batch.groups,
            normalize=grpo.normalize_rewards,
            leave_one_out=grpo.use_leave_one_out_baseline,
        )

    def _train(self, batch: RolloutBatch, inputs: LossInputs, lr: float) -> dict[str, float]:
        """One optimizer step for each global batch of the rollout; metrics are their means."""
        size = self._config.policy.train_global_batch_size
        parts = [
            self._trainers.train(batch.rows(start, start + size), inputs.rows(start, start + size), self._loss, lr)
            for start in range(0, batch.num_samples, size)
        ]
        return {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]} | {"lr": lr}

    def _refit(self, step: int, batch: RolloutBatch) -> RefitSummary | None:
        every = self._config.grpo.refit_every
        if not every or step % every:
            return None
        self._trainers.calibrate(batch)
        with self._timed("drain_s"):
            self._rollouts.before_refit(drain=not self._config.grpo.async_grpo.in_flight_weight_updates)
        self._asked_version = step
        summary = self._refitter.refit(step)
        self._version = summary.version
        return summary

    def _learning_rate(self, step: int) -> float:
        optimizer, last = self._config.policy.megatron_cfg.optimizer, self._config.grpo.max_num_steps - 1
        return optimizer.lr + (optimizer.min_lr - optimizer.lr) * (step - 1) / max(last, 1)

    def _mark(self, name: str, interval: tuple[float, float]) -> None:
        """When something ran, in seconds since the loop was made."""
        self._seconds |= {f"{name}_{e}_s": t - self._started_s for e, t in zip(("start", "end"), interval, strict=True)}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - started


def _refit_metrics(summary: RefitSummary | None) -> Metrics:
    """The refit's part of a step's metrics; null where the step had none."""
    if summary is None:
        names = ("s", "bulk_bytes", "misc_bytes", "gb_per_s", "transport", "verified")
        return {"pause_to_resume_s": None, **{f"refit_{name}": None for name in names}}
    return {
        "refit_s": summary.seconds,
        "refit_bulk_bytes": summary.bulk_bytes,
        "refit_misc_bytes": summary.misc_bytes,
        "refit_gb_per_s": summary.gb_per_s,
        "refit_transport": summary.transport,
        "refit_verified": summary.verified,
        "refit_staging_bytes": summary.staging_bytes,
        "refit_predicted_s": summary.predicted_s,
        **{f"refit_{phase}_s": seconds for phase, seconds in summary.phase_s.items()},
        "pause_to_resume_s": summary.paused_s,
        **{f"pause_{part}_s": seconds for part, seconds in summary.pause_s.items()},
    }


def _sample_metrics(samples: list[Sample], advantages: torch.Tensor) -> Metrics:
    lengths = [len(s.completion.token_ids) for s in samples]
    return {
        "response_tokens_mean": sum(lengths) / len(lengths),
        "finished_fraction": sum(s.completion.finished for s in samples) / len(samples),
        "advantage_abs_mean": float(advantages.abs().mean()),
    }
