"""The kernel's digests are those of the plain implementation, for any strides, offsets and item sizes."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_rl.refit.digest import Piece, Pieces, digest_view
from nemo_rl.refit.region import Region

pytestmark = pytest.mark.gpu(1)

DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def random_piece(rng: random.Random) -> tuple[torch.Tensor, Region]:
    shape = [rng.choice((1, 2, 3, 5, 17, 40)) for _ in range(rng.randint(0, 4))]
    dtype = rng.choice(DTYPES)
    count = int(torch.Size(shape).numel())
    raw = torch.randint(0, 256, (count * dtype.itemsize + 64,), dtype=torch.uint8, device="cuda")
    view = (raw & 1 if dtype is torch.bool else raw).view(dtype)[3 : 3 + count].view(shape)
    if len(shape) > 1 and rng.random() < 0.5:
        view = view.transpose(0, -1)
    return view, Region(tuple(rng.randint(0, 3000) for _ in shape), tuple(view.shape))


def test_a_batch_has_the_digests_of_its_pieces() -> None:
    from nemo_rl.refit.digest_kernel import KernelBatch

    rng = random.Random(7)
    pieces = [random_piece(rng) for _ in range(60)]
    large = torch.randint(0, 256, (3000 * 5000,), dtype=torch.uint8, device="cuda").view(torch.bfloat16).view(1500, -1)
    pieces.append((large[10:1490, 7:4400], Region((5, 9), (1480, 4393))))
    views = {number: view for number, (view, _) in enumerate(pieces)}
    located = Pieces([Piece(n, n, region, region) for n, (_, region) in enumerate(pieces)]).located(views)
    batch = KernelBatch(torch.device("cuda", 0), located)

    def launched() -> list[int]:
        out = torch.zeros(len(pieces), dtype=torch.int64, device="cuda")
        batch.launch(out)
        return list(out.tolist())

    assert launched() == [digest_view(view.cpu(), region) for view, region in pieces]
    large[700, 800] += 1  # the batch reads storage at every launch
    assert launched()[:-1] == [digest_view(view.cpu(), region) for view, region in pieces[:-1]]
    assert launched()[-1] == digest_view(large[10:1490, 7:4400].cpu(), pieces[-1][1])
