"""What a storage holds of one Hugging Face tensor, and which box of it a copy from a view moves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nemo_rl.refit.layout import TensorMeta
from nemo_rl.refit.region import Region

Placed = tuple[Region, tuple[int, ...]]
"""A box of a tensor, and the strides of its destination in elements, axes in that tensor's order."""


@dataclass(frozen=True, slots=True)
class Held:
    """A storage that holds `region` of `fqn` and nothing else, unchanged.

    Neighbours along axis `a` are `steps[a]` elements apart, and the first element of the region is the storage's.
    """

    fqn: str
    dtype: torch.dtype
    region: Region
    steps: tuple[int, ...]

    @classmethod
    def whole(cls, fqn: str, meta: TensorMeta) -> Held:
        """A contiguous tensor."""
        steps = [math.prod(meta.shape[axis + 1 :]) for axis in range(len(meta.shape))]
        return cls(fqn, meta.dtype, Region.whole(meta.shape), tuple(steps))

    def box_of(self, src: torch.Tensor, dst: torch.Tensor) -> Placed | str:
        """The box that `dst.copy_(src)` moves, `src` being a view of this storage, or why there is none."""
        if src.dtype != self.dtype or dst.dtype != src.dtype:
            return f"cast from {self.dtype} to {dst.dtype}" if src.dtype == self.dtype else f"viewed as {src.dtype}"
        lead = dst.dim() - src.dim()
        sizes = (1,) * lead + tuple(src.shape)
        if sizes != tuple(dst.shape):
            return f"broadcast from {tuple(src.shape)} to {tuple(dst.shape)}"
        dims = zip(sizes, (0,) * lead + src.stride(), dst.stride(), strict=True)
        return self._box(src.storage_offset(), _coalesce([d for d in dims if d[0] > 1]))

    def copied(self, src: torch.Tensor, made: torch.Tensor) -> Held | str:
        """What `made` holds, a fresh tensor with the values of `src`, which is a view of this storage."""
        placed = self.box_of(src, made)
        if isinstance(placed, str):
            return placed
        return Held(self.fqn, self.dtype, *placed)

    def _box(self, offset: int, dims: list[tuple[int, int, int]]) -> Placed | str:
        """Give each dim (size, source stride, destination stride) the axes that it runs over.

        Axes without a dim have size 1.
        """
        if any(src == 0 or dst == 0 for _, src, dst in dims):
            return "an expanded view (stride 0)"
        shape = self.region.sizes
        order = sorted((a for a in range(len(shape)) if shape[a] > 1), key=lambda a: -self.steps[a])  # slowest first
        offsets, sizes, strides = [0] * len(shape), [1] * len(shape), [1] * len(shape)
        for axis in order:
            offsets[axis], offset = divmod(offset, self.steps[axis])
        for size, src, dst in dims:
            at = next((i for i, a in enumerate(order) if self.steps[a] == src), -1)
            while size > 1:
                if at < 0 or sizes[order[at]] > 1:
                    return f"a view of shape {shape} that takes steps or regroups axes, which is no box"
                axis, at = order[at], at - 1
                take = min(size, shape[axis])
                if size % take or offsets[axis] + take > shape[axis]:
                    return f"a view of shape {shape} that crosses from one row into the next, which is no box"
                sizes[axis], strides[axis] = take, dst
                size, dst = size // take, dst * take
        return Region(tuple(offsets), tuple(sizes)).moved(self.region.offsets), tuple(strides)


def _coalesce(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join dims (size, source stride, destination stride) that are one run in source and destination alike."""
    out: list[tuple[int, int, int]] = []
    for size, src, dst in sorted(dims, key=lambda d: -d[1]):
        if out and out[-1][1] == src * size and out[-1][2] == dst * size:
            out[-1] = (out[-1][0] * size, src, dst)
        else:
            out.append((size, src, dst))
    return out
