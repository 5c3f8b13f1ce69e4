"""What a rank's device is, and the software that moves its bytes, in words: measurements of links go with them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_CPUS = Path("/proc/cpuinfo")


def hardware_of(device: torch.device) -> str:
    """One line; equal lines promise equal speed."""
    versions = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"{_cpu()}, {os.cpu_count()} cores, {versions}"
    properties = torch.cuda.get_device_properties(device)
    driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else "driver unknown"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{properties.name}, {driver}, {versions}, NCCL {nccl}"


def gpu_of(device: torch.device) -> str:
    """Identity of the GPU, the same in all processes; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _cpu() -> str:
    lines = _CPUS.read_text().splitlines() if _CPUS.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
