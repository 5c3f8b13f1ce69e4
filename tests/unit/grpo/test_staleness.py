"""Ages of samples, which of them may train, and which tokens the trainers must reproduce."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.grpo.staleness import (
    age_metrics,
    overlap_s,
    refuse_foreign,
    refuse_too_old,
    reproducible,
    sample_ages,
)
from nemo_rl.grpo.types import Completion, Problem, Prompt, RunError, Sample, collate


def sample(*versions: int) -> Sample:
    completion = Completion(tuple(range(len(versions))), (-1.0,) * len(versions), True, versions)
    return Sample(Prompt(0, Problem("", ""), (5, 6)), completion, "", 1.0)


SAMPLES = [sample(3, 3), sample(2, 3, 3), sample(1, 2)]


def test_a_sample_is_as_old_as_its_first_token() -> None:
    assert sample_ages(SAMPLES, step=4) == [0, 1, 2]
    assert age_metrics(SAMPLES, step=4) == {
        "sample_age_mean": 1.0,
        "sample_age_max": 2,
        "token_age_mean": pytest.approx((0 + 0 + 1 + 0 + 0 + 2 + 1) / 7),
        "mixed_version_fraction": pytest.approx(2 / 3),
    }


def test_only_samples_within_the_age_train() -> None:
    refuse_too_old(SAMPLES, step=4, max_age_steps=2)
    with pytest.raises(RunError, match=r"step 4: 1 of 3 samples are 2 steps old"):
        refuse_too_old(SAMPLES, step=4, max_age_steps=1)


def test_tokens_of_weights_that_nobody_committed_are_refused() -> None:
    refuse_foreign(SAMPLES, 4, first=1, last=3)
    for first, last in ((2, 3), (1, 2)):
        with pytest.raises(RunError, match=rf"\[1, 2, 3\], not those committed meanwhile, {first} to {last}"):
            refuse_foreign(SAMPLES, 4, first, last)


@pytest.mark.parametrize("recomputed", [False, True])
def test_which_tokens_the_trainers_must_reproduce(recomputed: bool) -> None:
    found = reproducible(collate(SAMPLES, pad_id=0), 4, recomputed)
    assert found[0].tolist() == [False, False, True, True, False, False, False, False]
    assert found[1].tolist() == [False, False, False, *[recomputed] * 2, False, False, False]
    assert not found[2].any() and found.dtype is torch.bool


def test_versions_of_a_completion_never_fall() -> None:
    with pytest.raises(ValueError, match="fall"):
        sample(2, 1)
    with pytest.raises(ValueError, match="1 tokens, 1 log-probabilities and 2 versions"):
        Completion((1,), (-1.0,), True, (0, 0))


def test_shared_seconds_of_intervals() -> None:
    assert overlap_s((0.0, 2.0), (1.0, 5.0)) == 1.0 == overlap_s((1.0, 5.0), (0.0, 2.0))
    assert overlap_s((0.0, 1.0), (2.0, 3.0)) == 0.0
