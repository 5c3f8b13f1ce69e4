"""Options and worlds that cannot be are refused when they are made."""

from __future__ import annotations

import pytest

from nemo_rl.refit.base import RefitOptions, World


@pytest.mark.parametrize("wrong", [{"bucket_bytes": 1023}, {"num_streams": 0}, {"num_streams": 65}])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="num_streams from 1 to 64 are needed, got RefitOptions"):
        RefitOptions(**wrong)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e15])
def test_deadlines_that_never_come(seconds):
    with pytest.raises(ValueError, match="deadline_s above 0 and at most 1e.06 is needed, got RefitOptions"):
        RefitOptions(deadline_s=seconds)


def test_links_are_measured_when_asked_in_a_known_word():
    with pytest.raises(ValueError, match="measure_links='often' is not one of auto, always, never"):
        RefitOptions(measure_links="often")


@pytest.mark.parametrize(
    ("trainers", "generators"),
    [((), (0,)), ((0,), ()), ((0, 0), (1,)), ((0,), (1, 1)), ((0,), (2,)), ((1,), (2,))],
)
def test_worlds_that_cannot_be(trainers, generators):
    with pytest.raises(ValueError, match="trainers and generators, each once"):
        World(trainers, generators)


def test_roles_by_name():
    world = World((0, 1), (1, 2))
    assert (world.size, world.shared) == (3, (1,))
    assert world.describe(1) == "trainer 1 and generator 0 (rank 1)"
    assert world.describe(2) == "generator 1 (rank 2)"
