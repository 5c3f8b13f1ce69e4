"""Whether a model's tensors still lie where they lay."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from operator import is_

import torch
from torch.distributed.tensor import DTensor


class Places:
    """The tensors of modules and their addresses, which tell whether another tensor or other storage took a place.

    Views of the old storage would go on to say what the model held then; nothing else shows that.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        owners = [owner for module in modules for owner in module.modules()]
        # Torch's own tables: asking modules by name takes ten times as long, which counts with thousands of experts.
        tables = (table for owner in owners for table in (owner._modules, owner._parameters, owner._buffers))
        self._held: list[Collection[object]] = [table.values() for table in tables if table]
        self._known = list(chain.from_iterable(self._held))
        self._tensors = [held for held in self._known if isinstance(held, torch.Tensor)]
        self._addresses = self._where()

    @property
    def moved(self) -> bool:
        same = sum(map(len, self._held)) == len(self._known)
        same = same and all(map(is_, chain.from_iterable(self._held), self._known))
        return not same or self._where() != self._addresses

    @torch.no_grad()
    def _where(self) -> list[int]:
        return [(t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in self._tensors]
