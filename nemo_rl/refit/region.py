"""A box in the index space of one tensor. The only geometry of the package starts here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """The box `[offsets, offsets + sizes)` of a Hugging Face tensor, axes in that tensor's order.

    A zero-dimensional tensor has one region, `Region((), ())`, of volume 1.

    Raises:
        ValueError: lengths differ, or an offset or size is negative.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"region has {len(self.offsets)} offsets but {len(self.sizes)} sizes")
        if any(o < 0 for o in self.offsets) or any(s < 0 for s in self.sizes):
            raise ValueError(f"region has a negative offset or size: {self}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """The region that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies inside a tensor of `shape`."""
        return len(shape) == self.ndim and all(e <= n for e, n in zip(self.ends, shape, strict=True))

    def intersect(self, other: Region) -> Region | None:
        """The common box, or None where there is none (or it is empty)."""
        if self.ndim != other.ndim:
            raise ValueError(f"regions of different tensors: {self} and {other}")
        low = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        high = tuple(min(a, b) for a, b in zip(self.ends, other.ends, strict=True))
        if any(h <= lo for lo, h in zip(low, high, strict=True)):
            return None
        return Region(low, tuple(h - lo for lo, h in zip(low, high, strict=True)))

    def moved(self, delta: tuple[int, ...]) -> Region:
        """The same box with `delta` added to its offsets."""
        return Region(tuple(o + d for o, d in zip(self.offsets, delta, strict=True)), self.sizes)

    def slices_in(self, outer: Region) -> tuple[slice, ...]:
        """Index of this box inside a view that holds `outer`."""
        starts = tuple(o - base for o, base in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(s, s + n) for s, n in zip(starts, self.sizes, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{e}" for o, e in zip(self.offsets, self.ends, strict=True)) + "]"
