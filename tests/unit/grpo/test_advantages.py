"""Advantages against plain loops over groups."""

from __future__ import annotations

import statistics

import pytest
import torch

from nemo_rl.grpo.advantages import group_advantages


def oracle(rewards: list[float], groups: list[int], normalize: bool, leave_one_out: bool) -> list[float]:
    out = []
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        peers = [
            r
            for j, (r, g) in enumerate(zip(rewards, groups, strict=True))
            if g == group and (j != i or not leave_one_out)
        ]
        if groups.count(group) == 1:
            out.append(0.0)
            continue
        value = reward - statistics.fmean(peers)
        deviation = statistics.stdev(peers) if len(peers) > 1 else 0.0
        out.append(value / (deviation + 1e-6) if normalize and deviation > 1e-6 else value)
    return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_against_plain_loops(normalize: bool, leave_one_out: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 6, (40,), generator=generator)
    rewards = (
        torch.rand(40, generator=generator) if seed % 2 else torch.randint(0, 2, (40,), generator=generator).float()
    )
    got = group_advantages(rewards, groups, normalize=normalize, leave_one_out=leave_one_out)
    want = oracle(rewards.tolist(), groups.tolist(), normalize, leave_one_out)
    assert torch.allclose(got, torch.tensor(want), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_teach_nothing(leave_one_out: bool) -> None:
    rewards = torch.full((16,), 0.1)
    got = group_advantages(rewards, torch.zeros(16, dtype=torch.int64), normalize=True, leave_one_out=leave_one_out)
    assert got.abs().max() < 1e-6


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        group_advantages(torch.zeros(3), torch.zeros(4), normalize=True, leave_one_out=False)
