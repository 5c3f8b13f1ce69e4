"""Twins of models that this platform cannot run: what vLLM lacks a kernel for, answered for the layout alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from nemo_rl.generator.ranks import attributes


@contextlib.contextmanager
def real_expert_maps() -> Iterator[None]:
    """Inside, the map of experts to ranks has values although the model is built without storage: loaders read it."""
    try:
        from vllm.model_executor.layers.fused_moe import expert_map_manager as owner
    except ImportError:  # vLLM 0.25
        from vllm.model_executor.layers.fused_moe import layer as owner
    determine: Any = owner.determine_expert_map

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    with attributes(owner, determine_expert_map=on_cpu):
        yield
