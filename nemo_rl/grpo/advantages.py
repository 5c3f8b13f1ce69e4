"""Group-relative advantages: how much better a sample is than the others of its prompt."""

from __future__ import annotations

import torch


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, normalize: bool, leave_one_out: bool, epsilon: float = 1e-6
) -> torch.Tensor:
    """Reward minus the group's baseline, divided by the group's standard deviation if `normalize`.

    The baseline is the mean of the group, or with `leave_one_out` the mean of the others of the group; the standard
    deviation is taken over the same samples as the baseline, with Bessel's correction. Where that deviation is not
    above `epsilon`, the difference is left undivided. A group of one gets advantage 0.

    Args:
        rewards: `[N]`.
        groups: `[N]` group numbers; a group's rows need not be neighbours.

    Returns:
        float32 `[N]`.

    Raises:
        ValueError: the shapes differ.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must be equal 1-D shapes")
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for group in groups.unique():
        rows = groups == group
        advantages[rows] = _of_group(rewards[rows].double(), normalize, leave_one_out, epsilon)
    return advantages.float()


def _of_group(rewards: torch.Tensor, normalize: bool, leave_one_out: bool, epsilon: float) -> torch.Tensor:
    count = len(rewards)
    if count == 1:
        return torch.zeros_like(rewards)
    others = count - 1 if leave_one_out else count
    own = rewards if leave_one_out else torch.zeros_like(rewards)
    baseline = (rewards.sum() - own) / others
    advantages = rewards - baseline
    if not normalize:
        return advantages
    if not leave_one_out:
        deviation = rewards.std(correction=1).expand(count)
    elif others == 1:
        return advantages  # one other sample has no spread to divide by
    else:
        squares = (rewards.square().sum() - own.square()) / others - baseline.square()
        deviation = (squares.clamp_min(0.0) * others / (others - 1)).sqrt()
    return torch.where(deviation > epsilon, advantages / (deviation + epsilon), advantages)
