"""Checkpoints of safetensors files: a file is one more rank that holds boxes of tensors."""

from nemo_rl.checkpoint.read import check, differences, read_into
from nemo_rl.checkpoint.write import write

__all__ = ["check", "differences", "read_into", "write"]
