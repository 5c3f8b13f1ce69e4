"""Kernels in plain torch for FP8 weights with a scale a block, which vLLM's CPU backend runs on few processors only.

They let vLLM's own loaders and processing run anywhere; activations stay in the engine's precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

BLOCK = 128


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """One scale an element of a tensor of `shape`, from one a block of its last two axes."""
    wide = scales.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return wide[..., : shape[-2], : shape[-1]]


def install() -> None:
    """Offer the kernels to vLLM's CPU backend in this process, after those that the processor runs."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu():
        return
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(_linear_kernel())
    experts: Any = cpu_moe.CPUExpertsFp8
    if not experts._supports_current_device():
        experts._supports_current_device = staticmethod(lambda: True)
        experts.apply = _apply_experts
        cpu_moe.prepare_fp8_moe_layer_for_cpu = lambda w13, w2: (w13, w2)


def _linear_kernel() -> Any:
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.utils import replace_parameter

    class TransposedBlocks(Fp8BlockScaledMMLinearKernel):
        """Keeps weights transposed, so that their kernel format is not the loaded one."""

        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            replace_parameter(layer, "weight", layer.weight.data.t().contiguous())

        def apply_weights(
            self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any
        ) -> torch.Tensor:
            weight = layer.weight.t()
            out = functional.linear(x, (weight.float() * spread(layer.weight_scale_inv, weight.shape)).to(x.dtype))
            return out if bias is None else out + bias

        def apply_block_scaled_mm(self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor) -> Any:
            raise NotImplementedError

    return TransposedBlocks


def _apply_experts(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """Expert by expert; scales are those that the kernel was built with."""
    first = (w1.float() * spread(self.w1_scale, w1.shape)).to(hidden_states.dtype)
    second = (w2.float() * spread(self.w2_scale, w2.shape)).to(hidden_states.dtype)
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, choices = torch.where(topk_ids == expert)
        gate, up = functional.linear(hidden_states[tokens], first[expert]).chunk(2, dim=-1)
        answers = functional.linear(functional.silu(gate) * up, second[expert])
        total.index_add_(0, tokens, answers.float() * topk_weights[tokens, choices, None].float())
    output.copy_(total)
