"""LoRA on any rank: what vLLM's own adapter code takes, and what it makes of whole adapter tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_rl.generator.options import AdapterConfig
from nemo_rl.generator.ranks import EngineSpec, as_rank
from nemo_rl.generator.twin import build_twin
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.trace import Trace

RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = AdapterConfig(RANK, RANK, TARGETS)
"""The adapter counts once: with another alpha the engine scales what landed, which tests of engines look at."""


def trace(spec: EngineSpec, role: int, table: TensorTable) -> Trace:
    """As `trace_rank`, of adapters alone."""
    from nemo_rl.generator.adapter import trace_adapter

    with _workers(spec, role) as workers:
        return trace_adapter(workers._adapter_manager, CONFIG, table)


def load(spec: EngineSpec, role: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As `load_rank`: the adapter's slot in every stacked tensor, which was random before."""
    from nemo_rl.generator.adapter import replace_adapter, slot_of, stacked_tensors

    with _workers(spec, role) as workers:
        manager = workers._adapter_manager
        for tensor in stacked_tensors(manager).values():
            tensor.view(torch.uint8).random_(0, 256)
        replace_adapter(workers, CONFIG, dict(tensors))
        return {name: stacked[slot_of(manager)] for name, stacked in stacked_tensors(manager).items()}


@contextmanager
def _workers(spec: EngineSpec, role: int) -> Iterator[Any]:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from nemo_rl.generator.adapter import serve_adapter

    with as_rank(spec, role) as config:
        config.lora_config = LoRAConfig(max_lora_rank=2 * RANK, max_cpu_loras=1, target_modules=list(TARGETS))
        config.lora_config.verify_with_model_config(config.model_config)
        workers = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), {})
        workers.create_lora_manager(build_twin(config, "cpu"), config)
        serve_adapter(workers, CONFIG)
        yield workers
