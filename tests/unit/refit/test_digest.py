"""Digests add up over any partition and change with every bit, swap and shift."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch

from nemo_rl.refit.digest import HIGH_HALF, Piece, Pieces, digest_view
from nemo_rl.refit.digest_planes import odd_weights, planes_of, tiles_of
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


def random_piece(rng):
    """A box, in any place of a tensor of its own, inside a larger one; strided, transposed, thin, scalar or empty."""
    shape = [rng.choice((0, 1, 2, 3, 5, 17) if rng.random() < 0.1 else (1, 2, 3, 17)) for _ in range(rng.randint(0, 4))]
    held = Region(tuple(rng.randint(0, 3000) for _ in shape), tuple(n + 2 for n in shape))
    view = random_bytes(held.sizes, rng.choice(DTYPES), torch.Generator().manual_seed(rng.randint(0, 99)))
    if len(shape) > 1 and rng.random() < 0.5:
        view = view.transpose(0, -1).contiguous().transpose(0, -1)
    inside = [rng.randint(0, 2) for _ in shape]
    return view, held, Region(tuple(a + b for a, b in zip(held.offsets, inside, strict=True)), tuple(shape))


def weight_of(first, count, seed):
    return np.ones(count, np.uint64) if seed == -1 else odd_weights((seed >> 56) - 1, first + np.arange(count))


def sum_of_tile(plane, first_row, first_col, item, rows, cols):
    """What the kernel adds to a piece's number for one tile."""
    start, num_rows, row_step, row_at, row_seed, num_cols, col_step, col_at, col_seed, scale = plane[:10]
    rows, cols = min(rows, num_rows - first_row), min(cols, num_cols - first_col)
    here = start + (first_row * row_step + first_col * col_step) * item
    span = (rows - 1) * row_step + (cols - 1) * col_step + 1
    flat = np.frombuffer((ctypes.c_char * (span * item)).from_address(here), {1: "u1", 2: "i2", 4: "i4", 8: "i8"}[item])
    bits = np.lib.stride_tricks.as_strided(flat, (rows, cols), (row_step * item, col_step * item)).astype(np.int64)
    if item == 8:
        bits = (bits & 0xFFFFFFFF) + (bits >> 32) * HIGH_HALF
    weights = weight_of(row_at + first_row, rows, row_seed)[:, None] * weight_of(col_at + first_col, cols, col_seed)
    return int((bits.view(np.uint64) * weights).sum(dtype=np.uint64)) * scale


def test_planes_and_tiles_of_any_pieces_sum_up_to_their_digests():
    """What the kernel is told about many pieces at once, added up the way it does."""
    rng = random.Random(11)
    pieces = [random_piece(rng) for _ in range(200)]
    views = {n: view for n, (view, _, _) in enumerate(pieces)}
    together = Pieces([Piece(n, n, region, held) for n, (_, held, region) in enumerate(pieces)])
    want = [digest_view(p.of(views[p.row]), p.region) for p in together._pieces]
    got = dict.fromkeys(range(len(pieces)), 0)
    with np.errstate(over="ignore"):
        for located in together.located(views):
            for item in (1, 2, 4, 8):
                planes = planes_of(located.take(np.flatnonzero(located.item == item)))
                for number, row, col in tiles_of(planes, 8, 4).tolist():
                    plane = planes[number].tolist()
                    got[plane[10]] += sum_of_tile(plane, row, col, item, 8, 4)
    assert len({view.ndim for view in views.values()}) == 5 and min(view.numel() for view in views.values()) > 0
    assert [(got[n] - value) % 2**64 for n, value in enumerate(want)] == [0] * len(pieces)
    assert any(region.volume == 0 for _, _, region in pieces) and sum(value != 0 for value in want) > 150
