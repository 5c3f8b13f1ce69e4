"""Twins of models that this platform cannot run: what vLLM lacks a kernel for, answered for the layout alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


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


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
    """Inside, models are built whose kernels this platform lacks; what decides shapes stays vLLM's own."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as plain
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8

    gated = _unless(FusedMoEConfig.__post_init__, "is_act_and_mul", None)  # the last of its checks
    linear = _unless(fp8.init_fp8_linear_kernel, "Failed to find a kernel", None)
    experts = _unless(plain.select_unquantized_moe_backend, "backend", (plain.UnquantizedMoeBackend.TRITON, None))
    fp8_experts = _unless(fp8.select_fp8_moe_backend, "backend", (Fp8MoeBackend.TRITON, None))
    with (
        attributes(FusedMoEConfig, __post_init__=gated),
        attributes(plain, select_unquantized_moe_backend=experts),
        attributes(fp8, init_fp8_linear_kernel=linear, select_fp8_moe_backend=fp8_experts),
    ):
        yield


def _unless(ask: Callable[..., Any], refusal: str, answer: Any) -> Callable[..., Any]:
    """`ask`, but `answer` where it refuses for want of a kernel, in words that have `refusal` in them."""

    def answered(*args: Any, **kwargs: Any) -> Any:
        try:
            return ask(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            if refusal not in str(error):
                raise
            return answer

    return answered


@contextlib.contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes that `owner` has, and put the old ones back.

    Raises:
        AttributeError: `owner` lacks one: this vLLM keeps that state elsewhere.
    """
    old = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(owner, name, value)
