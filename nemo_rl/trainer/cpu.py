"""Unmodified Megatron-Core on a machine without CUDA, over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Scope in which Megatron-Core runs on the CPU; does nothing where CUDA is available.

    The function mode is per thread, so every entry point that runs Megatron code enters the scope itself. Nests.
    """
    if torch.cuda.is_available():
        yield
        return
    saved = torch.cuda.current_device
    # Embeddings, rotary tables, the router, gradient and receive buffers allocate on `torch.cuda.current_device()`.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    try:
        with _CudaNamesMeanCpu():
            yield
    finally:
        torch.cuda.current_device = saved


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Reads the CUDA names that Megatron spells out as the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The schedules' token counter, the optimizer's scale and overflow buffers and gradient clipping allocate with
        # device="cuda".
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        # Tied embeddings over pipeline stages are moved with .cuda() before they are compared.
        if func is torch.Tensor.cuda:
            return args[0]
        # Gradient clipping and the mixed-precision optimizer take only tensors that call themselves torch.cuda.*.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return f"torch.cuda.{func(*args).rsplit('.', 1)[1]}"
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return device is not None and str(device).split(":")[0] == "cuda"


def fill_in_missing_names() -> None:
    """Define what Megatron-Core 0.16.1 defines only beside Transformer Engine; on any device.

    The router's gating function looks the name `te_general_gemm` up without having imported it: every mixture of
    experts fails with a NameError. Latent attention takes a stand-in that is no class for Transformer Engine's linear
    layer, and asks whether its own layers are instances of it.
    """
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False

    if "te_general_gemm" not in vars(moe_utils):
        vars(moe_utils)["te_general_gemm"] = None
