"""Kernels that are launched again and again with the same arguments."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class Repeated:
    """A launch of a Triton kernel on a stream of the current device.

    What Triton finds out of arguments before each launch, which takes longer than the launch, it finds out once here.

    Args:
        kernel: a function of `triton.jit`.
        grid: number of programs.
        arguments: all of them, in order; tensors stay where they are, and are kept.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, grid: int, *arguments: Any, **options: Any) -> None:
        self._kernel, self._grid, self._arguments, self._options = kernel, grid, arguments, options
        self._compiled: Any = None  # interpreted kernels have none

    def __call__(self, stream: torch.cuda.Stream | None = None) -> None:
        """On the current stream where none is given. Does not wait."""
        if self._compiled is not None:
            self._compiled[(self._grid, 1, 1)](*self._arguments, stream=stream and stream.cuda_stream)
            return
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self._compiled = self._kernel[(self._grid,)](*self._arguments, **self._options)
