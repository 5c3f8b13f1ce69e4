"""How old samples are when they train, and which of their tokens the trainers' weights must reproduce.

Version v is the weights after v optimizer steps, and step s trains from version s - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_rl.grpo.types import RolloutBatch, RunError, Sample


def sample_ages(samples: Sequence[Sample], step: int) -> list[int]:
    """Optimizer steps between the weights of each sample's oldest token and those that `step` trains from."""
    return [step - 1 - s.completion.oldest for s in samples]


def refuse_foreign(samples: Sequence[Sample], step: int, first: int, last: int) -> None:
    """Raises RunError where a token is not of the versions `first .. last`, those committed during its rollout."""
    versions = {v for s in samples for v in (s.completion.oldest, s.completion.newest)}
    if not all(first <= v <= last for v in versions):
        committed = f"the committed {first}" if first == last else f"those committed meanwhile, {first} to {last}"
        raise RunError(f"step {step}: samples carry weight versions {sorted(versions)}, not {committed}")


def refuse_too_old(samples: Sequence[Sample], step: int, max_age_steps: int) -> None:
    """Raises RunError where a sample may not train `step`."""
    ages = sample_ages(samples, step)
    old = [age for age in ages if age > max_age_steps]
    if old:
        raise RunError(
            f"step {step}: {len(old)} of {len(ages)} samples are {max(old)} steps old, more than "
            f"grpo.async_grpo.max_trajectory_age_steps={max_age_steps}; they train nothing. Refit more often "
            f"(grpo.refit_every), or allow older samples"
        )


def reproducible(batch: RolloutBatch, step: int, recomputed: bool) -> torch.Tensor:
    """Tokens whose log-probability the weights that `step` trains from must have given, bool `[N, L]`.

    They are of that version, and so is every key and value before them: in samples that began under it, and in those
    that an update came upon where it had the caches `recomputed`.
    """
    current = batch.versions == step - 1
    if recomputed:
        return current
    began = torch.where(batch.mask > 0, current, True).all(-1, keepdim=True)
    return current & began


def age_metrics(samples: Sequence[Sample], step: int) -> dict[str, float]:
    """Ages of samples, by their oldest tokens; of tokens; and the share of samples that an update came upon."""
    ages = sample_ages(samples, step)
    tokens = [step - 1 - version for s in samples for version in s.completion.versions]
    mixed = sum(s.completion.oldest != s.completion.newest for s in samples)
    return {
        "sample_age_mean": sum(ages) / len(ages),
        "sample_age_max": max(ages),
        "token_age_mean": sum(tokens) / len(tokens),
        "mixed_version_fraction": mixed / len(samples),
    }


def overlap_s(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Seconds that two intervals share."""
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)
