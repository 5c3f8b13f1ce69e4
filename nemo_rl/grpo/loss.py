"""The GRPO loss: clipped policy gradient with importance correction and a KL penalty. Pure torch, any device.

All token tensors are `[N, L]`; column t belongs to token t of the row. Normalizers are those of the whole global
batch, so that the losses of micro-batches and data-parallel ranks add up to the loss of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LossOptions:
    """See `nemo_rl.schema.LossConfig`.

    Attributes:
        kl_penalty: weight of the KL divergence to the reference policy.
        clip_low, clip_high: the ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        token_level: mean over all tokens of the batch; else over samples of each sample's mean.
        importance_correction: weigh tokens by p_trainer / p_generator at the time of sampling.
        importance_cap: largest such weight; None for no cap.
    """

    kl_penalty: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.28
    token_level: bool = True
    importance_correction: bool = True
    importance_cap: float | None = 2.0


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch.

    Attributes:
        advantages: `[N]`.
        mask: 1.0 at tokens that count.
        old_logprobs: of the trainer before the first update with this batch.
        generator_logprobs: of the engine that sampled.
        reference_logprobs: of the reference policy.
    """

    advantages: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    generator_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor

    def rows(self, start: int, stop: int) -> LossInputs:
        """The inputs of samples `start .. stop - 1`."""
        return LossInputs(*(column[start:stop] for column in self._columns))

    def to(self, device: torch.device) -> LossInputs:
        """The inputs on `device`."""
        return LossInputs(*(column.to(device) for column in self._columns))

    @property
    def _columns(self) -> tuple[torch.Tensor, ...]:
        return self.advantages, self.mask, self.old_logprobs, self.generator_logprobs, self.reference_logprobs


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Tokens and samples that count in the global batch."""

    num_tokens: float
    num_samples: float

    @classmethod
    def of(cls, mask: torch.Tensor) -> Normalizer:
        return cls(float(mask.sum()), float((mask.sum(-1) > 0).sum()))


def k3(logprobs: torch.Tensor, other_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(p || other) from samples of p: `exp(d) - d - 1` with `d = log other - log p`.

    Never negative, and unbiased where the samples are p's.
    """
    delta = other_logprobs - logprobs
    return torch.expm1(delta) - delta


def grpo_loss(
    logprobs: torch.Tensor, inputs: LossInputs, options: LossOptions, normalizer: Normalizer
) -> tuple[torch.Tensor, dict[str, float]]:
    """This micro-batch's part of the batch's loss, and parts of metrics that add up to means over the batch.

    Returns:
        A scalar to call `backward` on; `policy_loss`, `kl_reference`, `clip_fraction`, `ratio_mean`,
        `importance_weight_mean`.
    """
    ratio = torch.exp(logprobs - inputs.old_logprobs)
    clipped = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    advantages = inputs.advantages.unsqueeze(-1)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    weight = importance_weights(inputs, options)
    kl = k3(logprobs, inputs.reference_logprobs)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return batch_mean(values, inputs.mask, normalizer, options.token_level)

    policy_loss = -mean(weight * surrogate)
    kl_mean = mean(kl)
    metrics = {
        "policy_loss": policy_loss,
        "kl_reference": kl_mean,
        "clip_fraction": mean((ratio * advantages > clipped * advantages).to(ratio.dtype)),
        "ratio_mean": mean(ratio),
        "importance_weight_mean": mean(weight),
    }
    loss = policy_loss + options.kl_penalty * kl_mean
    return loss, {name: float(value.detach()) for name, value in metrics.items()}


def importance_weights(inputs: LossInputs, options: LossOptions) -> torch.Tensor:
    """p_trainer / p_generator of each token, capped; 1 without correction. Carries no gradient."""
    if not options.importance_correction:
        return torch.ones_like(inputs.old_logprobs)
    weight = torch.exp(inputs.old_logprobs - inputs.generator_logprobs).detach()
    return weight if options.importance_cap is None else weight.clamp(max=options.importance_cap)


def batch_mean(values: torch.Tensor, mask: torch.Tensor, normalizer: Normalizer, token_level: bool) -> torch.Tensor:
    """Masked sum of `values` over the global batch's count: of tokens, or of samples after each sample's mean.

    Positions outside the mask never count, not even where they hold NaN.
    """
    kept = torch.where(mask > 0, values * mask, 0.0)
    if token_level:
        return kept.sum() / max(normalizer.num_tokens, 1.0)
    per_sample = kept.sum(-1) / mask.sum(-1).clamp_min(1.0)
    return per_sample.sum() / max(normalizer.num_samples, 1.0)


def generator_kl_error(trainer_logprobs: torch.Tensor, generator_logprobs: torch.Tensor, mask: torch.Tensor) -> float:
    """k3 estimate of KL(generator || trainer) on the sampled tokens: 0 where both hold the same weights."""
    kept = mask > 0
    return float(k3(generator_logprobs[kept].double(), trainer_logprobs[kept].double()).mean())


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of one global batch as a trainer calls it, part by part; sent to every trainer rank."""

    inputs: LossInputs
    options: LossOptions
    normalizer: Normalizer

    def __call__(self, logprobs: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and metrics of rows `start .. stop - 1`, whose token log-probabilities are `logprobs`."""
        return grpo_loss(logprobs, self.inputs.rows(start, stop).to(logprobs.device), self.options, self.normalizer)
