"""The benchmark's bit check on a GPU is that of the CPU."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.refit.region import Region
from scripts.bench.values import Cell, Values, expected

pytestmark = pytest.mark.gpu(1)


def cells() -> list[Cell]:
    big = torch.zeros(300, 70, dtype=torch.bfloat16, device="cuda")
    stacked = torch.zeros(5, 40, 64, dtype=torch.bfloat16, device="cuda")
    return [
        Cell("a", (500, 64), Region((100, 7), (130, 50)), big[20:150, 3:53]),
        Cell("b", (9001,), Region((5,), (8990,)), torch.zeros(8990, dtype=torch.bfloat16, device="cuda")),
        Cell("c", (80, 64), Region((40, 0), (40, 64)), stacked[3]),
        Cell("d", (1, 1), Region((0, 0), (1, 1)), torch.zeros(1, 1, dtype=torch.bfloat16, device="cuda")),
    ]


def test_values_are_those_of_the_cpu_and_a_wrong_bit_is_found() -> None:
    made = cells()
    values = Values(made)
    for version in (0, 1, 12345):
        values.write(version)
        for cell in made:
            assert torch.equal(cell.view.cpu().view(torch.int16), expected(cell, version)), (cell.fqn, version)
        assert values.wrong(version) == [] and values.wrong(version + 1) == ["a", "b", "c", "d"]
    made[0].view.view(torch.int16)[129, 49] ^= 1
    made[1].view.view(torch.int16)[4096] ^= 2
    made[3].view.view(torch.int16)[0, 0] ^= -(1 << 15)
    assert values.wrong(12345) == ["a", "b", "d"]


def test_nothing_beside_the_cells_is_written() -> None:
    whole = torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda")
    Values([Cell("a", (32, 32), Region.whole((32, 32)), whole[8:40, 16:48])]).write(3)
    whole[8:40, 16:48] = 0
    assert not bool(whole.view(torch.int16).any())
