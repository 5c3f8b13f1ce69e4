"""Whether experts lie where the engine's loader puts them: a load balancer moves them while the engine runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def moved_experts(model: nn.Module) -> list[str]:
    """Layers whose experts were moved since they were loaded, with what moved; empty where nothing balances load.

    vLLM's loader fills the slots of the first placement, whatever the placement is when it runs, and so would a refit:
    tokens would then meet the wrong experts.
    """
    texts = []
    for name, layer in model.named_modules():
        slots = _slots(layer) or []
        first = _first(slots)
        moved = [expert for expert, now in enumerate(slots) if now != first[expert]]
        if moved:
            texts.append(f"{name}: experts {', '.join(map(str, moved[:8]))} are not in the slots that the loader fills")
    return texts


def _slots(layer: nn.Module) -> list[set[int]] | None:
    """Logical expert -> physical slots, of a mixture of experts under a load balancer; None of any other module."""
    state: Any = getattr(getattr(layer, "router", None), "eplb_state", None)
    slots: torch.Tensor | None = getattr(state, "logical_to_physical_map", None)
    return None if slots is None else [{slot for slot in row if slot >= 0} for row in slots.tolist()]


def _first(slots: list[set[int]]) -> list[set[int]]:
    """The slots of each expert as the loader sees them."""
    from vllm.distributed.eplb.eplb_state import EplbState

    spare = sum(map(len, slots)) - len(slots)
    found: list[set[int]] = [set() for _ in slots]
    for slot, expert in enumerate(EplbState.build_initial_global_physical_to_logical_map(len(slots), spare)):
        found[expert].add(slot)
    return found
