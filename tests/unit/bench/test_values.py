"""The bit check of the benchmark finds what it must find."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.refit.region import Region
from scripts.bench.values import Cell, Values, expected, seed

WHOLE = (40, 24)


def cell(region: Region, fqn: str = "w", shape: tuple[int, ...] = WHOLE) -> Cell:
    """A view with gaps between its rows."""
    raw = torch.zeros((*region.sizes[:-1], region.sizes[-1] + 5), dtype=torch.bfloat16)
    return Cell(fqn, shape, region, raw[..., : region.sizes[-1]])


def bits(view: torch.Tensor) -> torch.Tensor:
    return view.view(torch.int16)


def test_every_rank_makes_the_same_values_of_its_part() -> None:
    whole = expected(cell(Region.whole(WHOLE)), 3)
    for region in (Region((0, 0), (40, 12)), Region((7, 5), (3, 11)), Region((39, 23), (1, 1))):
        part = cell(region)
        Values([part]).write(3)
        assert torch.equal(bits(part.view), whole[region.slices_in(Region.whole(WHOLE))])


def test_values_differ_by_name_version_and_place() -> None:
    region = Region.whole(WHOLE)
    made = [expected(cell(region, name), version) for name in ("a", "b") for version in (0, 1)]
    made += [made[0].flip(0), made[0].roll(1)]
    for i, one in enumerate(made):
        for other in made[:i]:
            assert float((one == other).float().mean()) < 0.01
    assert len(made[0].unique()) > 900  # of 960: no pattern that a wrong stride could hide in


def test_a_wrong_bit_is_found_and_named() -> None:
    cells = [cell(Region.whole(WHOLE), name) for name in ("a", "b", "c")]
    cells.append(cell(Region((3,), (20,)), "d", (64,)))
    values = Values(cells)
    values.write(1)
    assert values.wrong(1) == [] and values.wrong(2) == ["a", "b", "c", "d"]
    bits(cells[1].view)[39, 23] ^= 1
    bits(cells[3].view)[0] ^= -(1 << 15)
    assert values.wrong(1) == ["b", "d"]
    cells[0].view.copy_(cells[2].view)
    assert values.wrong(1) == ["a", "b", "d"]


def test_what_the_check_cannot_see_is_refused() -> None:
    three = Cell("w", (2, 3, 4), Region.whole((2, 3, 4)), torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    turned = Cell("t", (4, 3), Region.whole((4, 3)), torch.zeros(3, 4, dtype=torch.bfloat16).t())
    wide = Cell("f", (4,), Region.whole((4,)), torch.zeros(4))
    for bad in (three, turned, wide):
        with pytest.raises(ValueError, match=f"one or two dims are needed, not {bad.fqn}"):
            Values([bad])


def test_seeds_do_not_depend_on_the_process() -> None:
    assert seed("model.norm.weight") == 0x24124F42
