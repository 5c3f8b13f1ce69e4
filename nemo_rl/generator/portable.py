"""Twins of models that this platform cannot run: what vLLM lacks a kernel for, answered for the layout alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def real_expert_maps() -> Iterator[None]:
    """Inside, the map of experts to ranks has values although the model is built without storage: loaders read it."""
    from vllm.model_executor.layers.fused_moe import expert_map_manager as owner

    determine: Any = owner.determine_expert_map

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    with attributes(owner, determine_expert_map=on_cpu):
        yield


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
    """Inside, models are built whose kernels a CPU lacks; what decides shapes stays vLLM's own.

    On other platforms nothing changes: what vLLM refuses there is refused.
    """
    from vllm.platforms import current_platform

    with contextlib.ExitStack() as stack:
        if current_platform.is_cpu():
            _offer_kernels(stack)
        yield


def _offer_kernels(stack: contextlib.ExitStack) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized

    gated = _unless(FusedMoEConfig.__post_init__, "is_act_and_mul", None)  # the last of its checks
    stack.enter_context(attributes(FusedMoEConfig, __post_init__=gated))
    chosen = _unless(linear.choose_scaled_mm_linear_kernel, "Failed to find a kernel", _NoKernel)
    stack.enter_context(attributes(linear, choose_scaled_mm_linear_kernel=chosen))
    for oracle in (fp8, unquantized):
        stack.enter_context(attributes(oracle, backend_to_kernel_cls=_with_last(oracle.backend_to_kernel_cls)))


class _NoKernel:
    """Stands for a kernel where none is; it cannot run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def is_supported_config(*_: Any) -> tuple[bool, str | None]:
        return True, None


def _with_last(kernels_of: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    return lambda backend: [*kernels_of(backend), _NoKernel]


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
