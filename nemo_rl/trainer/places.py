"""Whether a model's tensors still lie where they lay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias

import torch
from torch.distributed.tensor import DTensor

Live: TypeAlias = Callable[[], torch.Tensor]
"""Gives a tensor that a module has, whatever it was moved to since."""


class Places:
    """Addresses of tensors, which tell whether one has other storage than before.

    Views of the old storage would go on to say what the model held then; nothing else shows that.
    """

    def __init__(self, tensors: Iterable[Live]) -> None:
        self._tensors = tuple(tensors)
        self._known = self._now()

    @property
    def moved(self) -> bool:
        return self._now() != self._known

    @torch.no_grad()
    def _now(self) -> list[int]:
        tensors = (live() for live in self._tensors)
        return [(t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in tensors]


def live_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Live]]:
    """Parameters, which stay the same objects wherever they are moved, and buffers, which do not."""
    yield from ((name, partial(_itself, p)) for name, p in module.named_parameters(remove_duplicate=False))
    yield from ((name, partial(module.get_buffer, name)) for name, _ in module.named_buffers())


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
