"""Digests add up over any partition and change with every bit, swap and shift."""

from __future__ import annotations

import pytest
import torch

from nemo_rl.refit.digest import digest_view
from nemo_rl.refit.region import Region

from .simulated import random_bytes

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)


def whole(t):
    return digest_view(t, Region.whole(tuple(t.shape)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_add_up(dtype):
    t = random_bytes((7, 9, 5), dtype, torch.Generator().manual_seed(3))
    parts = 0
    for lo, hi in ((0, 3), (3, 7)):
        for a, b in ((0, 1), (1, 9)):
            parts += digest_view(t[lo:hi, a:b], Region((lo, a, 0), (hi - lo, b - a, 5)))
    assert (parts - whole(t)) % 2**64 == 0


def test_strided_and_transposed_views_give_the_digest_of_their_values():
    t = torch.randn(16, 24)
    assert whole(t.t().contiguous().t()) == whole(t)
    assert whole(torch.randn(16, 48)[:, ::2].copy_(t)) == whole(t)


def test_chunks_do_not_show():
    t = torch.randn(700, 1000)
    assert (
        whole(t)
        - digest_view(t[:350], Region((0, 0), (350, 1000)))
        - digest_view(t[350:], Region((350, 0), (350, 1000)))
    ) % 2**64 == 0


@pytest.mark.parametrize("bit", range(32))
def test_one_flipped_bit_shows(bit):
    t = torch.randn(33, 17)
    flipped = t.clone()
    flipped.view(torch.int32)[20, 5] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert whole(flipped) != whole(t)


def test_swaps_and_shifts_show():
    t = torch.randn(8, 4, 6)
    assert whole(t[[1, 0, *range(2, 8)]]) != whole(t)
    assert whole(t.roll(1, -1)) != whole(t)
    assert digest_view(t, Region((1, 0, 0), (8, 4, 6))) != whole(t)
    swapped = t.clone()
    swapped[0, 0, 0], swapped[5, 3, 2] = t[5, 3, 2], t[0, 0, 0]
    assert whole(swapped) != whole(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_flipped_signs_show(dtype):
    t = torch.randn(6, 10, dtype=dtype)
    row = t.clone()
    row[2] *= -1
    assert whole(-t) != whole(t) and whole(row) != whole(t)


@pytest.mark.parametrize("shape", [(1, 600_000), (1, 3, 300_000), (2, 1, 1, 300_001)])
def test_thin_tensors_add_up_too(shape):
    t = torch.randn(shape)
    left, right = t[..., :1000], t[..., 1000:]
    zeros = (0,) * (len(shape) - 1)
    total = digest_view(left, Region((*zeros, 0), tuple(left.shape)))
    total += digest_view(right, Region((*zeros, 1000), tuple(right.shape)))
    assert (total - whole(t)) % 2**64 == 0


def test_empty_and_scalar():
    assert whole(torch.zeros(0, 3)) == 0
    assert whole(torch.tensor(1.5)) == torch.tensor(1.5).view(torch.int32).item()
    with pytest.raises(ValueError, match="does not hold"):
        digest_view(torch.zeros(2), Region((0,), (3,)))
