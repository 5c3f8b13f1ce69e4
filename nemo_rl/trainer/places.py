"""Whether a model's tensors still lie where they lay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch.distributed.tensor import DTensor

_Slot: TypeAlias = "tuple[Mapping[str, object], str, object]"


class Places:
    """The tensors of modules and their addresses, which tell whether another tensor or other storage took a place.

    Views of the old storage would go on to say what the model held then; nothing else shows that. Tensors that modules
    were given in addition are not seen.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        owners = [owner for module in modules for owner in module.modules()]
        # Torch's own tables: asking modules by name takes ten times as long, which counts with thousands of experts.
        tables: list[Mapping[str, object]] = [t for o in owners for t in (o._modules, o._parameters, o._buffers)]
        self._slots: list[_Slot] = [(table, name, held) for table in tables for name, held in table.items()]
        self._tensors = [held for _, _, held in self._slots if isinstance(held, torch.Tensor)]
        self._known = self._addresses()

    @property
    def moved(self) -> bool:
        return any(table.get(name) is not held for table, name, held in self._slots) or self._addresses() != self._known

    @torch.no_grad()
    def _addresses(self) -> list[int]:
        return [(t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in self._tensors]
