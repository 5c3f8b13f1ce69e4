"""Options and worlds that cannot be are refused when they are made."""

from __future__ import annotations

import pytest

from nemo_rl.refit.base import RefitOptions, World


@pytest.mark.parametrize("wrong", [{"bucket_bytes": 1023}, {"num_streams": 0}, {"deadline_s": 0.0}])
def test_options_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="are needed, got RefitOptions"):
        RefitOptions(**wrong)


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
