"""Where a result was measured, and on which of its devices."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = ("vllm", "nccl-extensions", "nccl4py", "checkpoint-engine", "triton", "cuda-bindings")


def only(device: int) -> str:
    """`CUDA_VISIBLE_DEVICES` of a child process that is to see nothing but device `device` of this one."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[device] if seen else str(device)


def _nccl() -> str:
    """Of the library that this process has loaded, which need not be the one that torch was built with."""
    version = ctypes.c_int(0)
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return f"{version.value // 10000}.{version.value // 100 % 100}.{version.value % 100}"


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as this process sees them."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cpu":
        return {"hardware": f"{platform.machine()} CPU", "versions": versions}
    versions["cuda"] = str(torch.version.cuda)
    versions["nccl"] = _nccl()
    if _DRIVER.exists():
        versions["driver"] = next((w for w in _DRIVER.read_text().split() if w[:1].isdigit() and "." in w), "")
    return {"hardware": torch.cuda.get_device_name(device), "versions": versions}
