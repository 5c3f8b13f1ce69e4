"""The loss against scalar formulas, gradients, and sums over micro-batches."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nemo_rl.grpo.loss import LossInputs, LossOptions, Normalizer, generator_kl_error, grpo_loss, k3

ROWS, COLUMNS = 6, 9


def make_inputs(seed: int = 0, spread: float = 0.4) -> tuple[torch.Tensor, LossInputs]:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64) * spread

    logprobs = -1.5 + noise()
    lengths = torch.randint(1, COLUMNS, (ROWS,), generator=generator)
    mask = (torch.arange(COLUMNS) < lengths[:, None]).double()
    advantages = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    inputs = LossInputs(advantages, mask, logprobs + noise(), logprobs + noise(), logprobs + noise())
    return logprobs.requires_grad_(), inputs


def scalar_loss(logprobs: torch.Tensor, inputs: LossInputs, options: LossOptions) -> float:
    """The same loss written for one token at a time."""
    per_sample: list[list[float]] = []
    for i in range(ROWS):
        tokens = []
        for t in range(COLUMNS):
            if inputs.mask[i, t] == 0:
                continue
            new, old = logprobs[i, t].item(), inputs.old_logprobs[i, t].item()
            advantage, ratio = inputs.advantages[i].item(), math.exp(new - old)
            bound = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
            weight = 1.0
            if options.importance_correction:
                weight = math.exp(old - inputs.generator_logprobs[i, t].item())
                weight = weight if options.importance_cap is None else min(weight, options.importance_cap)
            away = inputs.reference_logprobs[i, t].item() - new
            kl = math.exp(away) - away - 1
            tokens.append(-weight * min(ratio * advantage, bound * advantage) + options.kl_penalty * kl)
        per_sample.append(tokens)
    if options.token_level:
        return sum(map(sum, per_sample)) / sum(map(len, per_sample))
    return sum(sum(t) / len(t) for t in per_sample) / len(per_sample)


OPTIONS = [
    LossOptions(),
    LossOptions(token_level=False),
    LossOptions(importance_correction=False, kl_penalty=0.0),
    LossOptions(importance_cap=None, kl_penalty=0.3),
    LossOptions(clip_low=0.05, clip_high=0.5, importance_cap=1.01, token_level=False),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_against_the_scalar_formula(options: LossOptions, seed: int) -> None:
    logprobs, inputs = make_inputs(seed)
    loss, _ = grpo_loss(logprobs, inputs, options, Normalizer.of(inputs.mask))
    assert loss.item() == pytest.approx(scalar_loss(logprobs.detach(), inputs, options), rel=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_is_the_slope(options: LossOptions) -> None:
    logprobs, inputs = make_inputs(7)
    grpo_loss(logprobs, inputs, options, Normalizer.of(inputs.mask))[0].backward()
    assert logprobs.grad is not None
    step = 1e-6
    for i, t in [(0, 0), (3, 0), (5, 0)]:
        moved = logprobs.detach().clone()
        moved[i, t] += step
        slope = (scalar_loss(moved, inputs, options) - scalar_loss(logprobs.detach(), inputs, options)) / step
        assert logprobs.grad[i, t].item() == pytest.approx(slope, abs=1e-5)
    assert logprobs.grad[inputs.mask == 0].abs().max() == 0


@pytest.mark.parametrize("options", OPTIONS)
def test_micro_batches_add_up(options: LossOptions) -> None:
    logprobs, inputs = make_inputs(3)
    whole = Normalizer.of(inputs.mask)
    loss, metrics = grpo_loss(logprobs, inputs, options, whole)
    parts = [grpo_loss(logprobs[s : s + 2], inputs.rows(s, s + 2), options, whole) for s in range(0, ROWS, 2)]
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), rel=1e-12)
    for name, value in metrics.items():
        assert sum(p[1][name] for p in parts) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_padding_may_hold_anything() -> None:
    logprobs, inputs = make_inputs(1)
    clean, _ = grpo_loss(logprobs, inputs, LossOptions(), Normalizer.of(inputs.mask))
    junk = torch.where(inputs.mask > 0, inputs.generator_logprobs, torch.full((), math.nan, dtype=torch.float64))
    dirty, _ = grpo_loss(
        logprobs, dataclasses.replace(inputs, generator_logprobs=junk), LossOptions(), Normalizer.of(inputs.mask)
    )
    assert dirty.item() == clean.item()


def test_on_policy_loss_is_minus_the_mean_advantage() -> None:
    """At ratio 1 nothing is clipped and the gradient is the policy gradient."""
    _, inputs = make_inputs(2)
    logprobs = inputs.old_logprobs.clone().requires_grad_()
    options = LossOptions(kl_penalty=0.0, importance_correction=False)
    loss, metrics = grpo_loss(logprobs, inputs, options, Normalizer.of(inputs.mask))
    loss.backward()
    want = -(inputs.advantages[:, None] * inputs.mask) / inputs.mask.sum()
    assert logprobs.grad is not None and torch.allclose(logprobs.grad, want)
    assert metrics["clip_fraction"] == 0.0 and metrics["ratio_mean"] == pytest.approx(1.0)


def test_k3_estimates_the_kl_divergence() -> None:
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    assert (k3(p, q) >= 0).all()


def test_kl_error_counts_response_tokens_only() -> None:
    trainer, generator = torch.zeros(2, 3), torch.zeros(2, 3)
    trainer[0, 0], mask = 5.0, torch.ones(2, 3)
    mask[0, 0] = 0
    assert generator_kl_error(trainer, generator, mask) == 0.0
    trainer[1, 1] = 0.1
    assert generator_kl_error(trainer, generator, mask) == pytest.approx((math.exp(0.1) - 1.1) / 5, rel=1e-6)
