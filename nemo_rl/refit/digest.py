"""Position-sensitive digests of tensor pieces that add up: any partition of a tensor gives the same total.

The digest of a piece is `sum(bits[i, j, ...] * w0[i] * w1[j] * ... ) mod 2**64` over the piece's elements, where `bits`
are an element's bits as an integer and `w_axis[index]` is a pseudo-random odd number of the *global* index along that
axis. An odd weight maps every single-bit change to a change of the sum. Weights are random, so that swapped, shifted or
stale pieces agree with a chance of about 2**-63, or 2**-33 where they differ in nothing but sign bits.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from nemo_rl.refit.region import Region

_CHUNK_ELEMENTS = 1 << 18  # bounds the int64 temporaries, and keeps them inside a core's cache
_HIGH_HALF = 0x2545F4914F6CDD1D
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@lru_cache(maxsize=64)
def _weights(axis: int, length: int, device: str) -> torch.Tensor:
    """Odd 64-bit weights of indices `0 .. length - 1` along `axis`: splitmix64 of the index, by axis."""
    with np.errstate(over="ignore"):
        z = np.arange(length, dtype=np.uint64) + np.uint64(1)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64((axis + 1) << 56)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)


def _axis_weights(axis: int, offset: int, size: int, device: torch.device) -> torch.Tensor:
    length = max(1024, 1 << (offset + size - 1).bit_length()) if offset + size else 1024
    return _weights(axis, length, str(device))[offset : offset + size]


def digest_view(view: torch.Tensor, region: Region) -> int:
    """Digest of `view`, which holds `region` of its tensor, as a signed 64-bit number.

    `view` may be strided and on any device; the sum is taken where the data is. Only the last step synchronizes.

    Raises:
        ValueError: the view's shape is not the region's.
    """
    if tuple(view.shape) != region.sizes:
        raise ValueError(f"view of shape {tuple(view.shape)} does not hold region {region}")
    if region.volume == 0:
        return 0
    bits = view.detach().view(_BITS[view.element_size()])
    weights = [_axis_weights(a, region.offsets[a], region.sizes[a], view.device) for a in range(bits.ndim)]
    if view.element_size() < 8:
        return int(_sum(bits, weights).item())
    # Times an odd weight, the top bit of 64 is the same for every position; halves of 32 bits keep it apart.
    low, high = _sum(bits, weights, mask=True), _sum(bits, weights, shift=32)
    return int((low + high * _HIGH_HALF).item())


def _sum(bits: torch.Tensor, weights: list[torch.Tensor], *, mask: bool = False, shift: int = 0) -> torch.Tensor:
    """Weighted sum of `bits` in runs of at most `_CHUNK_ELEMENTS`, whatever the shape."""
    if bits.ndim == 0:
        return _half(bits, mask, shift)
    inner = bits.numel() // bits.shape[0]
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if inner > _CHUNK_ELEMENTS:
        for row in range(bits.shape[0]):
            total += weights[0][row] * _sum(bits[row], weights[1:], mask=mask, shift=shift)
        return total
    rows = max(1, _CHUNK_ELEMENTS // inner)
    for start in range(0, bits.shape[0], rows):
        chunk = _half(bits[start : start + rows], mask, shift)
        for axis in range(bits.ndim - 1, 0, -1):
            chunk = (chunk * weights[axis]).sum(-1)
        total += (chunk * weights[0][start : start + rows]).sum()
    return total


def _half(bits: torch.Tensor, mask: bool, shift: int) -> torch.Tensor:
    wide = bits.to(torch.int64) >> shift if shift else bits.to(torch.int64)
    return wide & 0xFFFFFFFF if mask else wide
